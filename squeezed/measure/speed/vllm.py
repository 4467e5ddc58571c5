"""Milliseconds per decoding step under vLLM: requests over one document, dense and by contexts.

    python -m squeezed.measure.speed.vllm OUT.json --kind dense --cases 32768x1,131072x16
    python -m squeezed.measure.speed.vllm OUT.json --kind squeezed --cases 32768x1,131072x16

One engine per process, of Llama-3.1-8B's shape with random weights. Dense requests share the
document through vLLM's prefix cache. The contexts hold keys of one layer in the place of all, made
as `fabricated` makes them: prefilling half a million tokens would change no time measured here.
Steps are timed while all requests of a case decode.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from squeezed.config import BEST, DEFAULT_BUDGET, IndexConfig
from squeezed.errors import SqueezedError
from squeezed.measure.speed.vllm_files import context_directory, document, model_directory
from squeezed.vllm.launch import graph_pieces
from squeezed.vllm.plugin import GPU_WORKER

Case = tuple[int, int]
"""Tokens of the document, and requests at once."""

KINDS = ("dense", "fp8", "squeezed")
QUESTION_TOKENS = 32
WARM_STEPS, TIMED_STEPS = 8, 64

LARGE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
}
SMALL = LARGE | {  # to try the benchmark itself where there is no GPU
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
}


@dataclass(frozen=True)
class Row:
    """One measured case. Times of steps in milliseconds: median, 10th and 90th percentile."""

    kind: str
    tokens: int
    requests: int
    ms: float
    ms_low: float
    ms_high: float
    first_token_s: float
    again_first_token_s: float
    budget_spent: float | None


def engine(kind: str, model: Path, contexts: Path, cases: list[Case], shape: dict, given: dict):
    """vLLM in this process; `given` are further arguments of its `LLM`."""
    from vllm import LLM

    from squeezed.vllm import register
    from squeezed.vllm.launch import transfer_config
    from squeezed.vllm.settings import Settings

    register()  # where the package was not installed, vLLM does not find it
    longest, most = (max(numbers) for numbers in zip(*cases, strict=True))
    arguments = {
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "max_model_len": longest + 1024,
        "max_num_seqs": most,
        "enable_prefix_caching": True,
        "distributed_executor_backend": "uni",
        "block_size": 16 if torch.cuda.is_available() else 32,
    }
    if kind == "fp8":
        arguments["kv_cache_dtype"] = "fp8"
    if kind == "squeezed":
        memory = context_gib({tokens for tokens, _ in cases}, shape)
        settings = Settings((contexts,), own_tokens=4096, context_memory=memory)
        arguments["kv_transfer_config"] = json.loads(transfer_config(settings))
    if torch.cuda.is_available():
        arguments |= on_gpu(kind, sorted({requests for _, requests in cases}))
    return LLM(str(model), **(arguments | given))


def on_gpu(kind: str, sizes: list[int]) -> dict:
    """Arguments for a GPU: steps that decode are one graph."""
    mode = "FULL_AND_PIECEWISE" if kind == "squeezed" else "FULL_DECODE_ONLY"
    graphs = {"mode": 0, "cudagraph_mode": mode, "cudagraph_capture_sizes": sizes}
    found = {
        "gpu_memory_utilization": 0.9,
        "max_num_batched_tokens": 8192,
        "compilation_config": graphs,
    }
    if kind == "squeezed":
        found |= {"attention_backend": "CUSTOM", "worker_cls": GPU_WORKER}
    return found


def context_gib(lengths: set[int], shape: dict) -> float:
    """Memory for contexts of these lengths, in GiB; an index takes at most 8 % on top."""
    numbers = 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"]
    itemsize = 2 if torch.cuda.is_available() else 4
    return 1.1 * sum(lengths) * numbers * itemsize / (1 << 30)


def spread(model: torch.nn.Module) -> None:
    """Random weights in the place of vLLM's own, by which all queries are zero: queries here are
    as large as those that calibrated the contexts."""
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data.fill_(1)
        elif weight.numel():
            weight.data.normal_(std=weight.shape[-1] ** -0.5)


def timed(llm, prompts: list[list[int]], budget: float) -> tuple[list[float], float, float | None]:
    """Milliseconds of steps in which all requests decode, time to the first token, and budget."""
    from vllm import SamplingParams

    steps = WARM_STEPS + TIMED_STEPS
    sampling = SamplingParams(
        temperature=0,
        max_tokens=steps + 2 * len(prompts),
        ignore_eos=True,
        detokenize=False,
        extra_args={"squeezed_budget": budget},
    )
    core = llm.llm_engine
    started = time.perf_counter()
    for number, ids in enumerate(prompts):
        core.add_request(f"{started}-{number}", {"prompt_token_ids": ids}, sampling)
    first, times, spent, before = None, [], None, started
    while core.has_unfinished_requests():
        outputs = core.step()
        now = time.perf_counter()
        if first is None and any(output.outputs[0].token_ids for output in outputs):
            first = now - started
        if len(outputs) == len(prompts) and not any(output.finished for output in outputs):
            times.append(1e3 * (now - before))
        for output in outputs:
            said = (output.kv_transfer_params or {}).get("squeezed") or {}
            if said.get("fallback"):
                raise SqueezedError(f"this request ran dense: {said['fallback']}")
            spent = said.get("budget_spent", spent)
        before = now
    return times[WARM_STEPS : WARM_STEPS + TIMED_STEPS], first, spent


def measure(llm, kind: str, tokens: int, requests: int, vocabulary: int, budget: float) -> Row:
    """A case, twice: the first time the document is read, or loaded."""
    ids = document(tokens, vocabulary)

    def asked(turn: int) -> list[list[int]]:
        draw = random.Random(turn * 1000 + requests)
        return [
            ids + [draw.randrange(3, vocabulary) for _ in range(QUESTION_TOKENS)]
            for _ in range(requests)
        ]

    _, first, _ = timed(llm, asked(0), budget)
    times, again, spent = timed(llm, asked(1), budget)
    deciles = statistics.quantiles(times, n=10)
    return Row(
        kind,
        tokens,
        requests,
        round(statistics.median(times), 3),
        round(deciles[0], 3),
        round(deciles[-1], 3),
        round(first, 3),
        round(again, 3),
        spent,
    )


def parsed(cases: str) -> list[Case]:
    """`131072x4,...` as pairs of document tokens and requests."""
    try:
        return [tuple(map(int, case.split("x"))) for case in cases.split(",")]
    except ValueError as error:
        raise SqueezedError(f"cases: expected such as 131072x4,32768x1, got {cases!r}") from error


def main(
    out: Annotated[Path, typer.Argument(help="JSON to write.")],
    kind: Annotated[str, typer.Option("--kind", help="dense, fp8 or squeezed.")] = "squeezed",
    cases: Annotated[
        str, typer.Option("--cases", help="Document tokens x requests.")
    ] = "32768x1,32768x16,131072x1,131072x4,131072x16,131072x64",
    budget: Annotated[float, typer.Option("--budget", help="Share of the keys.")] = DEFAULT_BUDGET,
    arguments: Annotated[
        str, typer.Option("--arguments", help="JSON of further arguments of vLLM's LLM.")
    ] = "{}",
    small: Annotated[bool, typer.Option("--small", help="Tiny shape, to try it out.")] = False,
) -> None:
    """Time decoding steps of one kind of engine."""
    if kind not in KINDS:
        raise SqueezedError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    wanted, shape = parsed(cases), SMALL if small else LARGE
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "SQUEEZED_VLLM": "1",
    }
    os.environ |= graph_pieces(os.environ) if kind == "squeezed" else {}
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model = model_directory(place / "model", shape)
        (place / "contexts").mkdir()
        if kind == "squeezed":
            for tokens in sorted({tokens for tokens, _ in wanted}):
                context_directory(place / "contexts", shape, tokens, budget, device, dtype)
        if cuda:
            torch.cuda.empty_cache()
        given = {"dtype": str(dtype).removeprefix("torch."), **json.loads(arguments)}
        llm = engine(kind, model, place / "contexts", wanted, shape, given)
        llm.apply_model(spread)
        for tokens, requests in wanted:
            rows.append(measure(llm, kind, tokens, requests, shape["vocab_size"], budget))
            print(rows[-1], flush=True)
            write(out, kind, cases, budget, arguments, rows)


def write(out: Path, kind: str, cases: str, budget: float, arguments: str, rows: list[Row]) -> None:
    import vllm

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    settings = {"kind": kind, "cases": cases, "budget": budget, "arguments": arguments}
    record = {
        "device": device,
        "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
        "settings": settings,
        "question_tokens": QUESTION_TOKENS,
        "presets": [BEST.name],
        "index": asdict(IndexConfig()),
        "rows": [asdict(row) for row in rows],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
