"""What a fixed context holds, what a request read of it, and pictures of both."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from squeezed.context import FixedContext
from squeezed.errors import SqueezedError, expect
from squeezed.failures import cause_of, readable_failures
from squeezed.hf.cache import SqueezedCache
from squeezed.manifest import numbers
from squeezed.sources import answer_queries, rows_read
from squeezed.tree import ClusteredLayer

PICTURES = (".png", ".jpg", ".jpeg", ".pdf", ".svg", ".webp")


@dataclass(frozen=True)
class Traffic:
    """Bytes of the context that one generated token reads, mean over the answer.

    Attributes:
        dense: all keys and values, again for every layer that reads those of another one.
        exact: keys and values read exactly, the pinned ones included.
        index: centroids and statistics of the nodes scored, mean values of those dropped.
    """

    dense: int
    exact: float
    index: float

    @property
    def total(self) -> float:
        return self.exact + self.index


def traffic(context: FixedContext, cache: SqueezedCache) -> Traffic:
    """What one request's answer read per token. Needs `cache.watch_queries()` before asking.

    The exact keys are the ones that the cache counted, on the question and the answer alike.
    """
    index = exact = 0.0
    dense = float(context.kv_bytes())
    for entry, scale in zip(cache.context_layers, context.scales, strict=True):
        layer, query = entry.context.layer, answer_queries(entry)
        per_key = layer.kv_bytes() / (layer.keys.shape[0] * layer.tokens)
        tokens, queries = max(1, int(entry.tokens_answered)), int(entry.queries_answered)
        dense += layer.kv_bytes() * (queries / tokens - 1)
        exact += layer.pinned * layer.keys.shape[0] * per_key * queries / tokens
        exact += float(entry.keys_read) / tokens * per_key
        if cache.budget < 1:
            index += (
                float(entry.context.index_bytes(query, scale)) / query.shape[2] * queries / tokens
            )
    windows = sum(x.kv_bytes() for x in context.layers if not isinstance(x, ClusteredLayer))
    return Traffic(round(dense), exact + windows, index)


def describe(context: FixedContext) -> dict:
    """The context in plain numbers, for people and for JSON."""
    layers = context.clustered_layers
    kv, extra = context.kv_bytes(), context.index_bytes()
    return {
        "tokens": len(context.tokens),
        "layers": len(context.layers),
        "clustered_layers": sum(bool(layer.levels) for layer in layers),
        "kv_heads": layers[0].keys.shape[0],
        "head_dim": layers[0].keys.shape[2],
        "dtype": str(layers[0].keys.dtype).removeprefix("torch."),
        "pinned_tokens": layers[0].pinned,
        "dense": context.is_dense,
        "kv_bytes": kv,
        "index_bytes": extra,
        "overhead": extra / kv,
        "levels": [_level_summary(layers, depth) for depth in range(len(layers[0].levels))],
        "presets": {name: _thresholds(c) for name, c in context.calibrations.items()},
        "seconds": context.seconds,
        "model": context.model,
        "tokenizer": context.tokenizer,
    }


def cluster_sizes(context: FixedContext, depth: int = -1) -> Tensor:
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


def _thresholds(calibration) -> dict:
    """Log thresholds in nats by layer, budget, level and KV head; `None` keeps every node."""
    return {
        "budgets": list(calibration.budgets),
        "per_token": [numbers(grid.round(decimals=3)) for grid in calibration.per_token],
        "per_block": [numbers(grid.round(decimals=3)) for grid in calibration.per_block],
    }


def budget_by_head(context: FixedContext, cache: SqueezedCache) -> Tensor:
    """Share of the clustered keys that the answer's tokens read, `[layers, Hkv]` float32."""
    rows = []
    for entry, scale in zip(cache.context_layers, context.scales, strict=True):
        read = rows_read(entry, answer_queries(entry), scale)
        if read is None:
            raise SqueezedError("method: only squeezed attention spends a budget per head")
        clustered = read[:, entry.context.layer.pinned :]
        share = clustered.mean(1) if clustered.shape[1] else read.new_ones(len(read))
        rows.append(share.cpu())  # a document too short to cluster is read whole
    return torch.stack(rows)


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


def plot(context: FixedContext, budgets: Tensor, path: Path) -> None:
    """Write a picture: budget by layer and head `[layers, Hkv]`, and the cluster-size histogram."""
    check_picture(path)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    image = left.imshow(
        100 * budgets.T.numpy(), aspect="auto", interpolation="nearest", cmap="viridis"
    )
    left.set(xlabel="layer", ylabel="KV head", title="keys read exactly")
    left.set_yticks(range(budgets.shape[1]))
    figure.colorbar(image, ax=left, label="% of the clustered keys")
    sizes = cluster_sizes(context)
    right.hist(sizes.numpy(), bins=60, log=True, color="#31688e")
    right.set(xlabel="keys in a cluster", ylabel="clusters", title="cluster sizes, finest level")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise SqueezedError(
            f"plot: could not write {path} ({cause_of(error)}); choose another place"
        ) from error
    finally:
        pyplot.close(figure)
