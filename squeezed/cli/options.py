"""Options that commands share; their defaults live in `squeezed.config`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from squeezed.config import (
    BEST,
    DEFAULT_BUDGET,
    DEFAULT_NEW_TOKENS,
    ClusteringConfig,
    IndexConfig,
    check_rows,
)
from squeezed.errors import SqueezedError
from squeezed.hf.loading import DEMO_MODEL

INDEX = IndexConfig()

Source = Annotated[Path, typer.Argument(help="A saved context, or a text file (- reads stdin).")]
Model = Annotated[
    str,
    typer.Option("--model", "-m", help="Directory, .gguf file, hub name, or demo (SmolLM2-135M)."),
]
Budget = Annotated[
    float, typer.Option("--budget", "-b", help="Share of the context's keys read; 1.0 is dense.")
]
PresetName = Annotated[str, typer.Option("--preset", help="best or paper.")]
Implementation = Annotated[
    str, typer.Option("--implementation", help="auto, reference, cpu or triton.")
]
MethodName = Annotated[
    str, typer.Option("--method", help="squeezed, dense, quest, ... (a wrong name lists them).")
]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", help="Longest answer, tokens.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, bfloat16, float16 or float32.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
KeepControlTokens = Annotated[
    bool,
    typer.Option(
        "--keep-control-tokens",
        help="Let control tokens in the document and questions, as <|im_end|>, count as such.",
    ),
]
Levels = Annotated[
    str,
    typer.Option("--levels", help="Clusters per level, shares of the tokens, coarse to fine."),
]
Iterations = Annotated[int, typer.Option("--iterations", help="Passes of k-means.")]
RowsOption = Annotated[
    str, typer.Option("--rows", help="How keys and values are written: plain, int8 or int4.")
]
Chunk = Annotated[int, typer.Option("--chunk", help="Document tokens per forward pass.")]

DEFAULTS: dict[str, Any] = {
    "model": DEMO_MODEL,
    "budget": DEFAULT_BUDGET,
    "preset": BEST.name,
    "implementation": "auto",
    "method": "squeezed",
    "max_new_tokens": DEFAULT_NEW_TOKENS,
    "dtype": "auto",
    "device": "auto",
    "levels": ",".join(str(share) for share in INDEX.clustering.levels),
    "iterations": INDEX.clustering.iterations,
    "chunk": INDEX.prefill_chunk,
    "rows": INDEX.rows,
}
"""What an option is when it is not given."""


def index_config(levels: str, iterations: int, chunk: int, rows: str = "plain") -> IndexConfig:
    """Settings of `squeezed index`; raises `SqueezedError` for values that make no sense."""
    try:
        shares = tuple(float(share) for share in levels.split(","))
    except ValueError as error:
        raise SqueezedError(f"levels: expected shares such as 0.01,0.05, got {levels!r}") from error
    clustering = ClusteringConfig(levels=shares, iterations=iterations)
    return IndexConfig(clustering=clustering, prefill_chunk=chunk, rows=check_rows(rows))
