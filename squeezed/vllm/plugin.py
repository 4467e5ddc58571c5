"""What vLLM calls in each of its processes, perhaps twice: it names our classes by strings."""

from __future__ import annotations

import logging
import os

CONNECTOR = "SqueezedConnector"
GPU_WORKER = "squeezed.vllm.gpu_worker.Worker"
SUPPORTED = ((0, 32), (0, 33))
ON_CPU = "SQUEEZED_VLLM"
"""Environment variable that puts our backend in the place of vLLM's for CPUs, which knows no
`--attention-backend`. `squeezed vllm` sets it."""

log = logging.getLogger("squeezed")


def register() -> None:
    """Register backend and connector; a server that does not ask for them is as without us."""
    from vllm import __version__ as version

    if not is_supported(version):
        log.warning("squeezed-attention does nothing here: %s", unsupported(version))
        return
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, "squeezed.vllm.backend.SqueezedBackend")
    if os.environ.get(ON_CPU) == "1":
        register_backend(
            AttentionBackendEnum.CPU_ATTN, "squeezed.vllm.backend_cpu.SqueezedCPUBackend"
        )
    try:
        KVConnectorFactory.register_connector(CONNECTOR, "squeezed.vllm.connector", CONNECTOR)
    except ValueError:  # registered by an earlier call
        return


def is_supported(version: str) -> bool:
    return tuple(_number(part) for part in version.split(".")[:2]) in SUPPORTED


def unsupported(version: str) -> str:
    known = " and ".join(".".join(map(str, pair)) for pair in SUPPORTED)
    return f"vllm: expected {known}, got {version}; install one of those"


def _number(part: str) -> int:
    return int(part) if part.isdigit() else -1
