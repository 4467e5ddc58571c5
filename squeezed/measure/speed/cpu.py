"""One decode step of one layer on the CPU, against every dense form of PyTorch in the same run.

All methods take turns, so that a busy machine hits them alike and no method finds its data in the
cache; a ratio is the median of the ratios within a turn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Annotated

import torch
import typer
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from squeezed.attention import cpu, reference
from squeezed.attention.interface import Attended, Suffix
from squeezed.attention.reference.lookup import lookup
from squeezed.config import FAR_FIELDS, ROWS
from squeezed.context.bytes import LayerBytes
from squeezed.context.encoding import encoded
from squeezed.context.layers import ClusteredLayer
from squeezed.context.rule import SelectionRule
from squeezed.errors import SqueezedError
from squeezed.measure.record import write_record
from squeezed.measure.speed.common import print_table, timing_of
from squeezed.methods.traffic import step_bytes
from squeezed.testing.layers import Sizes, random_layer, random_queries
from squeezed.testing.rules import second_order_rule

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COPY_BYTES = 256 << 20
QUERY = 1.2  # scores spread by about 1.3 nats
ORACLE_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}  # about 2 ulp of the output


@dataclass(frozen=True)
class Step:
    """Inputs of one step: `query [B, Hq, 1, D]`, `suffix [B, Hkv, S, D]` as keys and as values."""

    query: Tensor
    layer: ClusteredLayer
    suffix: Tensor

    def squeezed(self, rule: SelectionRule, implementation: ModuleType = cpu) -> Attended:
        return implementation.attend(self.query, self.layer, rule, Suffix(self.suffix, self.suffix))

    def bytes_read(self, rule: SelectionRule) -> int:
        """Fewest bytes of a step: what several requests want counts once."""
        found = lookup(self.query, self.layer, rule)
        suffix = LayerBytes.of(self.layer).pinned(self.suffix.shape[:3].numel())
        return step_bytes(self.layer, found, rule) + suffix


def dense_forms(step: Step) -> dict[str, Callable[[], Tensor]]:
    """Dense attention over the context alone; the queries of a group and all requests are rows."""
    keys, values, scale = step.layer.keys, step.layer.values, step.layer.scale
    heads, _, dim = keys.shape
    batch = step.query.shape[0]
    packed = step.query.view(batch, heads, -1, dim).transpose(0, 1).reshape(heads, -1, dim)

    def softmax(logits: Tensor) -> Tensor:
        return torch.softmax(logits.mul_(scale), -1)

    def repeated() -> Tensor:
        context = (keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1))
        return scaled_dot_product_attention(step.query, *context, scale=scale, enable_gqa=True)

    return {
        "dense, SDPA, packed rows": lambda: scaled_dot_product_attention(
            packed[None], keys[None], values[None], scale=scale
        ),
        "dense, matmul and softmax": lambda: softmax(packed @ keys.mT) @ values,
        "dense, keys on the left": lambda: softmax((keys @ packed.mT).mT.contiguous()) @ values,
        "dense, SDPA with enable_gqa": repeated,
    }


def checked_error(step: Step, rule: SelectionRule, dtype: str) -> float:
    """Relative error against the float32 reference; raises rather than time a wrong result."""
    output, _, keys_read = step.squeezed(rule)
    expected, _, expected_read = step.squeezed(rule, reference)
    error = float((output.float() - expected.float()).norm() / expected.float().norm())
    off = abs(int(keys_read.sum()) / int(expected_read.sum()) - 1)
    if not (error < ORACLE_TOLERANCE[dtype] and off < 1e-3):
        raise SqueezedError(
            f"ops.cpu: expected the reference's output, got an error of {error:.2g}; do not time it"
        )
    return error


def take_turns(methods: dict[str, Callable], turns: int) -> dict[str, list[float]]:
    """Microseconds of every call, `turns` per method, one method after the other."""
    times: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(turns + 2):
        for name, call in methods.items():
            start = time.perf_counter()
            call()
            if turn >= 2:  # warm-up: compilation, thread pools, allocator
                times[name].append((time.perf_counter() - start) * 1e6)
    return times


def measure(sizes: Sizes, budget: float, turns: int) -> dict:
    """All methods for one case: times, bytes, limits, ratios."""
    layer, query = random_layer(sizes, 0, "cpu"), random_queries(sizes, 0.0, "cpu")
    suffix = torch.randn(sizes.batch, sizes.kv_heads, sizes.recent, sizes.dim).to(sizes.dtype)
    dtype = str(sizes.dtype).removeprefix("torch.")
    step = Step(query, layer, suffix)
    source = torch.randint(0, 255, (COPY_BYTES,), dtype=torch.uint8)
    target = torch.empty_like(source)
    methods: dict[str, Callable] = {"memory copy": lambda: target.copy_(source)}
    facts: dict[str, dict] = {}
    for rows in ROWS:
        own = replace(step, layer=encoded(layer, rows))
        for far_field in FAR_FIELDS:
            name = f"squeezed, far field {far_field}" + (f", {rows}" if rows != "plain" else "")
            rule = second_order_rule(query, layer, budget, far_field)
            start = time.perf_counter()
            read = own.squeezed(rule).keys_read.double().mean()
            facts[name] = {
                "first_call_s": time.perf_counter() - start,
                "budget_read": float(read / (sizes.kv_heads * layer.clustered)),
                "oracle_error": checked_error(own, rule, dtype),
                "bytes": own.bytes_read(rule),
            }
            methods[name] = lambda own=own, rule=rule: own.squeezed(rule)
    times = take_turns(methods | dense_forms(step), turns)
    return {**asdict(sizes), "dtype": dtype, "budget": budget, **summary(times, facts)}


def summary(times: dict[str, list[float]], facts: dict[str, dict]) -> dict:
    """Medians and deciles; ratios are taken turn by turn against the dense form of least median."""
    bandwidth = 2 * COPY_BYTES / (statistics.median(times["memory copy"]) * 1e-6)
    dense = {name: statistics.median(t) for name, t in times.items() if name.startswith("dense")}
    best = min(dense, key=lambda name: dense[name])
    methods = {name: asdict(timing_of(t)) for name, t in times.items()}
    for name, known in facts.items():
        ratios = [d / t for d, t in zip(times[best], times[name], strict=True)]
        spread = statistics.quantiles(ratios, n=10)
        limit_us = known["bytes"] / bandwidth * 1e6
        methods[name] |= {
            **known,
            "limit_us": limit_us,
            "share_of_limit": limit_us / methods[name]["median_us"],
            "speed_up": statistics.median(ratios),
            "speed_up_low": spread[0],
            "speed_up_high": spread[-1],
        }
    return {"copy_bytes_per_s": bandwidth, "best_dense": best, "methods": methods}


def report(row: dict) -> None:
    """One table per dtype on standard output."""
    lines = []
    for name, m in row["methods"].items():
        ours = [f"{m[k]:.3g}" if k in m else "-" for k in ("budget_read", "limit_us", "speed_up")]
        spread = f"{m['low_us']:.0f}-{m['high_us']:.0f}"
        lines.append([name, f"{m['median_us']:.0f}", spread, *ours])
    print(f"{row['dtype']}, copy {row['copy_bytes_per_s'] / 1e9:.1f} GB/s")
    print_table(["method", "µs", "10-90 %", "read", "limit µs", "speed-up"], lines)


TIMED = ["float32", "bfloat16"]


def main(
    tokens: Annotated[int, typer.Option(help="Context tokens.")] = 32768,
    kv_heads: Annotated[int, typer.Option(help="Key/value heads.")] = 8,
    group: Annotated[int, typer.Option(help="Query heads per KV head.")] = 4,
    dim: Annotated[int, typer.Option(help="Head dimension.")] = 128,
    batch: Annotated[int, typer.Option(help="Requests that share the context.")] = 1,
    suffix: Annotated[int, typer.Option(help="Recent tokens of every request.")] = 64,
    budget: Annotated[float, typer.Option(help="Share of the clustered keys read.")] = 0.1,
    dtype: Annotated[list[str], typer.Option(help="float32, bfloat16, float16.")] = TIMED,
    threads: Annotated[int, typer.Option(help="Threads of torch and of Numba.")] = 2,
    turns: Annotated[int, typer.Option(help="Timed calls per method.")] = 40,
    output: Annotated[Path, typer.Option(help="JSON file to write.")] = Path(
        "benchmarks/cpu_decode.json"
    ),
) -> None:
    """Time one decode step: squeezed against dense, and against the bytes over the bandwidth."""
    settings = dict(locals())
    torch.set_num_threads(threads)
    shape = (group * kv_heads, kv_heads, dim, tokens, batch, suffix)
    rows = []
    for name in dtype:
        sizes = Sizes(*shape, dtype=DTYPES[name], query=QUERY)
        rows.append(measure(sizes, budget, turns))
        report(rows[-1])
    write_record(output, settings, rows, "cpu")


if __name__ == "__main__":
    typer.run(main)
