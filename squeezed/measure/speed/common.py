"""What every benchmark shares: honest timing, the machine's limit, a record, a plot."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from squeezed.config import FarField
from squeezed.errors import SqueezedError

COLD_BYTES = 256 << 20
"""Bytes that one timed pass must touch, so that no cache keeps the next pass's data (L2: 60 MB)."""


@dataclass(frozen=True)
class Timing:
    """Time of one call in microseconds: median, and the 10th and 90th percentile of the replays."""

    median_us: float
    low_us: float
    high_us: float


def require_gpu() -> torch.device:
    if not torch.cuda.is_available():
        raise SqueezedError("device: this benchmark needs an NVIDIA GPU, found none; run it on one")
    return torch.device("cuda")


def rotations(bytes_touched: int, bytes_held: int, memory_share: float = 0.4) -> int:
    """How many sets of inputs to rotate, so that every call finds its data outside the caches."""
    free = torch.cuda.mem_get_info()[0] * memory_share
    return max(1, min(-(-COLD_BYTES // max(bytes_touched, 1)), int(free // max(bytes_held, 1)), 32))


def time_in_graph(calls: Sequence[Callable[[], object]], replays: int = 30) -> Timing:
    """Capture the calls, one after the other, in one CUDA graph; time per call over its replays."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in (*calls[:1], *calls):  # compile and warm up outside the capture
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    passes = max(1, 8 // len(calls))  # short graphs: several replays between two events
    times = []
    for _ in range(replays + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(passes):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / (passes * len(calls)))
    del kept
    return timing_of(times[3:])


def timing_of(microseconds: Sequence[float]) -> Timing:
    deciles = statistics.quantiles(microseconds, n=10)
    return Timing(statistics.median(microseconds), deciles[0], deciles[-1])


def copy_bandwidth(gigabytes: float = 4.0) -> float:
    """Bytes per second of a large copy on the device, bytes read plus bytes written."""
    source = torch.randn(int(gigabytes * 1e9) // 4, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(13):  # outside a graph, whose copies take a slower engine
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return 8 * source.numel() / statistics.median(times[3:])


def plot_lines(
    path: Path,
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    labels: tuple[str, str, str],
    limits: Sequence[str] = (),
) -> None:
    """One line per method on logarithmic axes; `labels` are title, x and y; limits are dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, (x, y) in lines.items():
        style: dict[str, Any] = (
            {"linestyle": "--", "color": "grey"} if name in limits else {"marker": "o"}
        )
        axes.plot(x, y, label=name, **style)
    axes.set(xscale="log", yscale="log", title=labels[0], xlabel=labels[1], ylabel=labels[2])
    axes.set_xscale("log", base=2)
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def far_fields_of(names: Sequence[str]) -> tuple[FarField, ...]:
    """Words of a command line as far fields; raises `SqueezedError` for others."""
    known = get_args(FarField)
    for name in names:
        if name not in known:
            raise SqueezedError(f"far-fields: expected some of {', '.join(known)}, got {name!r}")
    return tuple(name for each in names for name in known if name == each)


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A short aligned table on standard output."""
    cells = [[str(c) for c in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
