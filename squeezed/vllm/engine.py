"""What an engine of vLLM says of itself: its model, its ranks, its memory, and its contexts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from squeezed.context.record import ContextRecord
from squeezed.context.storage.manifest import MANIFEST
from squeezed.hf.identity.checkpoint import Checkpoint
from squeezed.vllm.catalogue import Catalogue
from squeezed.vllm.cutting import Share, bytes_on
from squeezed.vllm.settings import Settings


def catalogue_of(vllm_config, settings: Settings) -> Catalogue:
    """Contexts for an engine, after a first look."""
    ranks = vllm_config.parallel_config.tensor_parallel_size
    shares = [Share(rank, ranks) for rank in range(ranks)]

    def measured(record: ContextRecord) -> int:
        """On the rank that holds most."""
        tokens = len(record.tokens)
        return max(sum(bytes_on(x, tokens, share) for x in record.outlines) for share in shares)

    block_size = vllm_config.cache_config.block_size
    found = Catalogue(settings.contexts, block_size, measured, checkpoint_of(vllm_config).check)
    found.look()
    return found


def checkpoint_of(vllm_config) -> Checkpoint:
    """The files of an engine's model, and how it stores them."""
    model = vllm_config.model_config
    return Checkpoint(Path(model.model), model.hf_text_config, model.quantization)


def engine_of(vllm_config) -> dict[str, Any]:
    """What an `Order` says of the engine that captures."""
    model, ranks = vllm_config.model_config, vllm_config.parallel_config.tensor_parallel_size
    return {
        "model": checkpoint_of(vllm_config).fingerprint(),
        "ranks": ranks,
        "layers": model.hf_text_config.num_hidden_layers,
        "kv_heads": model.get_total_num_kv_heads(),
        "dtype": str(model.dtype),
    }


def place_of(settings: Settings) -> Path | None:
    """The directory in which contexts are saved: the first that is none itself."""
    found = (p for p in settings.contexts if p.is_dir() and not (p / MANIFEST).exists())
    return next(found, None)


def device_bytes(on_cpu: bool) -> int:
    """Memory of a rank's device."""
    if on_cpu:
        import psutil

        return psutil.virtual_memory().total
    from vllm.platforms import current_platform

    return current_platform.get_device_total_memory()
