"""A model with random weights, and long contexts made of what it computes for a short text."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

from squeezed.config import BEST, IndexConfig
from squeezed.context.captured import CapturedLayer, ObservedLayer
from squeezed.context.prompt import PromptTemplate
from squeezed.hf.fixed_context import FixedContext
from squeezed.hf.identity.fingerprint import model_fingerprint
from squeezed.indexing.calibrate import calibrate
from squeezed.indexing.clustering import cluster_layer
from squeezed.indexing.forest import Forest


def random_model(layers: int, device: str, small: bool = False) -> LlamaForCausalLM:
    """The shape of Llama-3.1-8B with random weights in bfloat16."""
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    if small:  # to try the benchmark itself where there is no GPU
        shape = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 512}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        num_hidden_layers=layers, max_position_embeddings=1 << 21, **shape, **heads
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None
    return model


def stretched(captured: Tensor, tokens: int, noise: float = 0.3) -> Tensor:
    """`[Hkv, n, D]` repeated to `[Hkv, tokens, D]`, every copy with noise of its own."""
    heads, count, dim = captured.shape
    longer = captured.new_empty(heads, tokens, dim)
    spread = captured.float().std(1, keepdim=True) * noise
    for start in range(0, tokens, count):
        part = captured[:, : min(count, tokens - start)].float()
        longer[:, start : start + count] = (part + spread * torch.randn_like(part)).to(longer.dtype)
    return longer


def context_of(
    model: PreTrainedModel | None, seeds: list[CapturedLayer], tokens: int, budget: float
) -> FixedContext:
    """A context of `tokens` tokens, clustered and calibrated as any other.

    Args:
        model: that it belongs to; `None` for none yet.
    """
    config = IndexConfig(presets=(BEST,), budgets=(budget / 2, budget, min(0.9, budget * 2)))
    layers, seen = [], []
    for seed in seeds:
        assert seed.queries is not None  # every layer of such a model attends in full
        keys, values = stretched(seed.keys, tokens), stretched(seed.values, tokens)
        layers.append(cluster_layer(keys, values, config.clustering, seed.queries, seed.scale))
        seen.append(ObservedLayer(layers[-1], seed.queries))
    return FixedContext(
        tokens=torch.zeros(tokens, dtype=torch.long),
        layers=tuple(layers),
        windows=(None,) * len(layers),
        calibrations={BEST.name: calibrate(Forest.of(seen), BEST, config.budgets)},
        config=config,
        template=PromptTemplate.plain(),
        model={} if model is None else model_fingerprint(model),
        tokenizer="",
        seconds={},
    )


def dense_cache(
    model: PreTrainedModel, seeds: list[CapturedLayer], tokens: int, suffix: int
) -> StaticCache:
    """Transformers' static cache, filled with the same keys and values."""
    cache = StaticCache(config=model.config, max_cache_len=tokens + suffix)
    for layer, seed in zip(cache.layers, seeds, strict=True):
        layer.lazy_initialization(seed.keys[None, :, :0], seed.values[None, :, :0])
        layer.keys[0, :, :tokens] = stretched(seed.keys, tokens)
        layer.values[0, :, :tokens] = stretched(seed.values, tokens)
        layer.cumulative_length.fill_(tokens)
    return cache
