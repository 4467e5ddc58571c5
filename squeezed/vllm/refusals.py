"""What cannot work together with contexts, by the name of the setting that says it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from squeezed.errors import SqueezedError

LARGEST_BLOCK = 64


def check_engine(config: Any, on_cpu: bool) -> None:
    """Raise `SqueezedError` for a configuration of vLLM (`VllmConfig`) that cannot work."""
    for complaint in complaints(config, on_cpu):
        raise SqueezedError(complaint)


def complaints(config: Any, on_cpu: bool) -> Iterator[str]:
    cache, parallel = config.cache_config, config.parallel_config
    if not cache.enable_prefix_caching:
        yield "enable_prefix_caching: contexts need it, got False; drop --no-enable-prefix-caching"
    if cache.block_size > LARGEST_BLOCK:
        yield (
            f"block_size: expected at most {LARGEST_BLOCK}, got {cache.block_size}; pass "
            f"--block-size {32 if on_cpu else 16}"
        )
    if cache.cache_dtype not in ("auto", "float16", "bfloat16", "float32"):
        yield (
            f"kv_cache_dtype: expected auto, got {cache.cache_dtype!r}; keys of requests in 8 bits "
            "are not joined with contexts"
        )
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            yield f"{name}: expected 1, got {getattr(parallel, name)}; use tensor parallelism"
    if parallel.pipeline_parallel_size > 1:
        yield (
            f"pipeline_parallel_size: expected 1, got {parallel.pipeline_parallel_size}; use "
            "tensor parallelism"
        )
    if config.speculative_config is not None:
        yield "speculative_config: contexts do not go with speculative decoding yet; leave it out"
    if getattr(config.model_config, "use_mla", False):
        yield "model: latent attention (MLA) cannot be squeezed; use another model"
    if not on_cpu and not config.use_v2_model_runner:
        yield (
            "model runner: expected V2, got V1, which does not say which row is which request; set "
            "VLLM_USE_V2_MODEL_RUNNER=1"
        )


def impossible(request: Any, looks_up: bool = True) -> str | None:
    """Why a request cannot read any context; `looks_up` says whether it should."""
    if request.prompt_token_ids is None or getattr(request, "prompt_embeds", None) is not None:
        return "prompt_embeds: a prompt of embeddings has no tokens to compare with a context"
    if request.lora_request is not None:
        return "lora_request: contexts were made without adapters, and this request ran dense"
    if request.mm_features:
        return "multi-modal prompts run dense"
    if request.skip_reading_prefix_cache and looks_up:
        return "prompt_logprobs: all of the prompt must be computed, so this request ran dense"
    if request.pooling_params is not None or getattr(request, "resumable", False):
        return "contexts are for requests that generate, with a prompt that is complete"
    return None
