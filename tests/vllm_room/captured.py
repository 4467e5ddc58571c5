"""What ranks capture of a document, made up."""

import torch

from squeezed.context.captured import CapturedLayer
from squeezed.vllm.cutting import Share
from squeezed.vllm.news import Order
from squeezed.vllm.parts import Parts

CPU, HEADS, KV_HEADS, DIM, DOCUMENT, PROBE, LAYERS = torch.device("cpu"), 4, 2, 16, 400, 30, 11
TEMPLATE = {"before": "", "between": "", "after": "", "keep_control_tokens": False}


def order(place, ranks=1, layers=LAYERS):
    ids = list(range(DOCUMENT + PROBE))
    engine = {"ranks": ranks, "layers": layers, "kv_heads": KV_HEADS}
    return Order(
        "x", place / "x.sqz", ids, DOCUMENT, len(ids), TEMPLATE, "t", {"weights": {}}, **engine
    )


def whole(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, KV_HEADS, DOCUMENT, DIM, generator=generator).to(dtype)
    return CapturedLayer(
        keys, values, torch.randn(HEADS, PROBE, DIM, generator=generator).to(dtype), 0.25
    )


def of_rank(layer, share):
    """What a rank captures of a layer."""
    own = share.heads(KV_HEADS)
    queries = layer.queries[share.heads(HEADS)]
    return CapturedLayer(layer.keys[own], layer.values[own], queries, layer.scale)


def written(found, layers=LAYERS, dtype=torch.float32):
    parts = Parts.of(found)
    for rank in range(found.ranks):
        parts.begin(found)
        for number in range(layers):
            part = of_rank(whole(number, dtype), Share(rank, found.ranks))
            parts.put(rank, number, part)
        assert not parts.is_complete(found.ranks)
        parts.end(rank, layers, 1.0 + rank)
    return parts
