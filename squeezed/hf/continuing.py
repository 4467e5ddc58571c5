"""A context and ids behind it -> the keys and values of those ids in every layer.

The model reads them through a cache over the context, as it reads a question; then a probe, of
which only the queries are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from squeezed.attention.interface import Attended, Suffix
from squeezed.context.record import ContextRecord
from squeezed.hf.asking import Asking
from squeezed.hf.build import build_cache
from squeezed.hf.cache import SqueezedCache
from squeezed.hf.support import input_device
from squeezed.hf.switch import using_attention


@dataclass(frozen=True)
class Continued:
    """What every layer saw.

    Attributes:
        keys, values: per layer `[Hkv, n, D]`, as the context keeps them: keys relative to the
            layer's centre.
        queries: per layer with full attention `[Hq, W, D]`, those of the probe; where further
            layers read the same keys, theirs follow. `None` without a probe.
    """

    keys: list[Tensor]
    values: list[Tensor]
    queries: list[Tensor] | None


class _Heard:
    """Listens to a layer and keeps the queries."""

    def __init__(self) -> None:
        self.queries: list[Tensor] = []

    def __call__(
        self, query: Tensor, suffix: Suffix, valid: Tensor | None, per_token: bool, found: Attended
    ) -> None:
        self.queries.append(query[0].clone())


@torch.inference_mode()
def read_on(
    model: PreTrainedModel,
    context: ContextRecord,
    ids: Tensor,
    probe: Tensor | None,
    asking: Asking,
    chunk: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Continued:
    """Let the model read `ids` `[n]` behind the context, and then a probe `[W]`.

    Args:
        asking: how the old tokens are read; at a budget of 1.0 all of them.
        chunk: tokens per forward pass.
        progress: called with the number of tokens done.
    """
    cache = build_cache(context, asking.attentions(context), asking.budget)
    with using_attention(model):
        for done in range(0, len(ids), chunk):
            _read(model, cache, ids[done : done + chunk])
            progress(min(done + chunk, len(ids)))
        seen = [(layer.keys[0].clone(), layer.values[0].clone()) for layer in cache.layers]
        queries = None if probe is None else _probed(model, cache, probe)
    keys, values = (list(found) for found in zip(*seen, strict=True))
    return Continued(keys, values, queries)


def _read(model: PreTrainedModel, cache: SqueezedCache, ids: Tensor) -> None:
    ids = ids[None].to(input_device(model))
    model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)


def _probed(model: PreTrainedModel, cache: SqueezedCache, probe: Tensor) -> list[Tensor]:
    heard = [_Heard() for _ in cache.context_layers]
    for layer, listener in zip(cache.context_layers, heard, strict=True):
        layer.listen = listener
    _read(model, cache, probe)
    return [torch.cat(listener.queries, 1) for listener in heard]
