"""`squeezed bench`: the benchmarks under one command."""

from squeezed.cli.lazy import lazy_group

COMMANDS = {
    "decode": (
        "squeezed.measure.speed.decode:main",
        "One generated token over a context, on a GPU.",
    ),
    "prefill": (
        "squeezed.measure.speed.prefill:main",
        "The user's tokens over a context, on a GPU.",
    ),
    "generate": ("squeezed.measure.speed.generate:app", "Tokens from generate(), on a GPU."),
    "index": ("squeezed.measure.speed.index:main", "Clustering and calibration, on a GPU."),
    "cpu": ("squeezed.measure.speed.cpu:main", "One generated token over a context, on the CPU."),
}

app = lazy_group(
    "bench",
    "Measure speed; every benchmark prints its distance from the hardware's limit.",
    COMMANDS,
)
