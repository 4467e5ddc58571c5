"""Is there room for the context? Said before anything is allocated."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel

from squeezed.config import BEST, ClusteringConfig
from squeezed.costs.plan import plan
from squeezed.costs.shape import ModelShape, model_shape
from squeezed.errors import SqueezedError
from squeezed.hf.support import text_config

ACTIVATIONS = {"cuda": 1 << 30, "cpu": 0}
"""Bytes set aside for a chunk of activations and for the clustering of one layer.

On a CPU only what is certainly too much is refused; memory that runs out later is one line too.
"""

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def context_bytes(
    shape: ModelShape, tokens: int, clustering: ClusteringConfig, activations: int
) -> int:
    """Most bytes held while a document of `tokens` is indexed: one layer is there twice."""
    costs = plan(shape, tokens, 1.0, 1.0, clustering, BEST)
    held = costs.kv_bytes + costs.index_bytes
    return held + held // max(1, shape.full_layers) + activations


def check_memory(model: PreTrainedModel, tokens: int, clustering: ClusteringConfig) -> None:
    """Raise `SqueezedError` if the model's GPU, or the process, has no room for the context."""
    if model.device.type not in ACTIVATIONS:
        return
    free = free_bytes(model.device)
    if free is None:
        return
    activations = ACTIVATIONS[model.device.type]
    shape = model_shape(model.config, model.dtype.itemsize)
    needed = context_bytes(shape, tokens, clustering, activations)
    if needed <= free:
        return
    on_gpu = model.device.type == "cuda"
    fitting = fitting_tokens(shape, free, clustering, activations)
    raise SqueezedError(
        f"text: a context of {tokens:,} tokens needs {needed / 1e9:.1f} GB on {model.device}, "
        f"{free / 1e9:.1f} GB are free; about {fitting:,} tokens of this "
        f"{text_config(model).model_type} model would fit: shorten the document or "
        + ("use a larger GPU" if on_gpu else "give the process more memory")
    )


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a GPU, with what PyTorch holds in reserve, or of this process on a CPU.

    `None` where the system does not say.
    """
    if device.type == "cuda":
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserve
    return min((*_of_machine(), *_of_control_groups(), *_of_limits()), default=None)


def _of_machine() -> Iterator[int]:
    """What Linux can hand out, swap included; of another system, all that the machine has."""
    held = _named_numbers(PROC / "meminfo")
    if "MemAvailable" in held:
        yield 1024 * (held["MemAvailable"] + held.get("SwapFree", 0))
    elif {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= os.sysconf_names.keys():
        yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _of_control_groups() -> Iterator[int]:
    """What the limits of a container or service leave; caches of files do not count as used."""
    for line in _text(PROC / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2, one hierarchy
            base, limit, used, cached = CGROUPS, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit = CGROUPS / "memory", "memory.limit_in_bytes"
            used, cached = "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        own = base / path.strip("/")
        for group in {base, own, *(x for x in own.parents if base in x.parents)}:
            most, now = _text(group / limit).strip(), _text(group / used).strip()
            if most.isdigit() and now.isdigit():
                reclaimed = _named_numbers(group / "memory.stat").get(cached, 0)
                yield max(0, int(most) - int(now) + reclaimed)


def _of_limits() -> Iterator[int]:
    """What the limits of the process leave of address space and of data."""
    try:
        import resource
    except ImportError:  # not Unix
        return
    held = _named_numbers(PROC / "self" / "status")
    for limit, name in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        most = resource.getrlimit(limit)[0]
        if most != resource.RLIM_INFINITY and name in held:
            yield max(0, most - 1024 * held[name])


def _named_numbers(path: Path) -> dict[str, int]:
    """Lines such as `MemAvailable:  12 kB` or `inactive_file 12`."""
    words = (line.replace(":", " ").split() for line in _text(path).splitlines())
    return {word[0]: int(word[1]) for word in words if len(word) > 1 and word[1].isdigit()}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def fitting_tokens(
    shape: ModelShape, free: int, clustering: ClusteringConfig, activations: int
) -> int:
    """The longest document whose context takes at most `free` bytes, to a thousand tokens."""
    low, high = 0, 1 << 30
    while high - low > 1000:
        middle = (low + high) // 2
        fits = context_bytes(shape, middle, clustering, activations) <= free
        low, high = (middle, high) if fits else (low, middle)
    return low // 1000 * 1000
