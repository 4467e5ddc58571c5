"""What a fixed context holds, what a request read of it, and pictures of both."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from squeezed.context.calibration import Calibration
from squeezed.context.layers import ClusteredLayer
from squeezed.context.record import ContextRecord
from squeezed.context.storage.manifest import numbers
from squeezed.errors import SqueezedError, expect
from squeezed.system.failures import readable_failures

PICTURES = (".png", ".jpg", ".jpeg", ".pdf", ".svg", ".webp")


def describe(context: ContextRecord) -> dict:
    """The context in plain numbers, for people and for JSON."""
    layers = context.clustered_layers
    kv, extra = context.kv_bytes(), context.index_bytes()
    return {
        "tokens": len(context.tokens),
        "layers": len(context.layers),
        "clustered_layers": sum(bool(layer.levels) for layer in layers),
        "kv_heads": layers[0].kv_heads,
        "head_dim": layers[0].dim,
        "rows": context.rows,
        "rows_loss": describe_loss(context.rows_loss),
        "dtype": str(layers[0].dtype).removeprefix("torch."),
        "pinned_tokens": layers[0].pinned,
        "dense": context.is_dense,
        "kv_bytes": kv,
        "index_bytes": extra,
        "overhead": extra / kv,
        "levels": [_level_summary(layers, depth) for depth in range(len(layers[0].levels))],
        "presets": {name: _thresholds(c) for name, c in context.calibrations.items()},
        "made_with": asdict(context.config),
        "assumed": list(context.assumed),
        "seconds": context.seconds,
        "model": context.model,
        "tokenizer": context.tokenizer,
    }


def describe_loss(of_heads: tuple[tuple[float, ...], ...]) -> dict | None:
    """Mean, and the worst with its layer among those of full attention and its KV head; `None`
    where nothing was measured."""
    if not of_heads:
        return None
    each = [
        (x, layer, head)
        for layer, of_layer in enumerate(of_heads)
        for head, x in enumerate(of_layer)
    ]
    worst, layer, head = max(each)
    mean = sum(x for x, _, _ in each) / len(each)
    return {"mean": mean, "largest": worst, "layer": layer, "head": head}


def cluster_sizes(context: ContextRecord, depth: int = -1) -> Tensor:
    """Keys per node of one level over all layers and heads, `[n]` int64."""
    sizes = [
        layer.levels[depth].sizes.flatten() for layer in context.clustered_layers if layer.levels
    ]
    return torch.cat(sizes).cpu() if sizes else torch.zeros(0, dtype=torch.int64)


def _level_summary(layers: list[ClusteredLayer], depth: int) -> dict:
    sizes = torch.cat([layer.levels[depth].sizes.flatten() for layer in layers]).double()
    middle, high = sizes.quantile(torch.tensor([0.5, 0.99], dtype=torch.float64)).tolist()
    return {
        "nodes_per_head": layers[0].levels[depth].nodes,
        "keys_per_node": {
            "mean": float(sizes.mean()),
            "median": middle,
            "p99": high,
            "largest": int(sizes.max()),
            "empty": int((sizes == 0).sum()),
        },
    }


def _thresholds(calibration: Calibration) -> dict:
    """Log thresholds in nats by layer, budget, level and KV head; `None` keeps every node."""
    return {
        "budgets": list(calibration.budgets),
        "per_token": [numbers(grid.round(decimals=3)) for grid in calibration.per_token],
        "per_block": [numbers(grid.round(decimals=3)) for grid in calibration.per_block],
    }


def check_picture(path: Path) -> None:
    """Raise `SqueezedError` unless a picture can be written to `path`; before any work is done."""
    expect("plot", path, Path, "a path")
    if path.suffix.lower() not in PICTURES:
        known = ", ".join(PICTURES)
        raise SqueezedError(f"plot: expected a file that ends in {known}, got {path}; name a .png")
    with readable_failures():
        if path.is_dir():
            raise SqueezedError(f"plot: {path} is a directory; name a .png file")
        if not path.absolute().parent.is_dir():
            raise SqueezedError(f"plot: {path.parent} is no directory; make it or choose another")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise SqueezedError(f"plot: {path} cannot be written; choose another place")
