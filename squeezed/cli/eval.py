"""`squeezed eval`: run a suite, or turn result files into tables and plots."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from squeezed.answers.session import Session
from squeezed.cli.console import json_text, quiet_libraries
from squeezed.cli.run import say_error
from squeezed.cli.status import USAGE_STATUS
from squeezed.config import ClusteringConfig, IndexConfig, check_budget
from squeezed.errors import SqueezedError, whole
from squeezed.measure.accuracy import report as reporting
from squeezed.measure.accuracy.examples import SuiteOptions
from squeezed.measure.accuracy.results import ResultFile, check_writable
from squeezed.measure.accuracy.runner import Runner, RunOptions, limited
from squeezed.measure.accuracy.suites import suite_named
from squeezed.measure.record import about_run
from squeezed.methods import create
from squeezed.system.failures import explained

if TYPE_CHECKING:
    from transformers import PreTrainedModel

app = typer.Typer(help="Accuracy of sparse-attention methods on a model of yours.")

METHODS = "paper,best,quest,snapkv,streaming,oracle"
BUDGETS = "0.025,0.05,0.1,0.2,0.3"


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End with status 2 and one line, also where the application is not run by `squeezed`."""
    try:
        yield
    except Exception as error:
        known = explained(error)
        if known is None:
            raise
        say_error(str(known))
        raise typer.Exit(USAGE_STATUS) from None


@app.callback(invoke_without_command=True)
def run(
    ctx: typer.Context,
    suite: Annotated[str, typer.Option(help="fidelity, niah, prefixqa, ruler or longbench")] = "",
    model: Annotated[str, typer.Option(help="directory, hub name or .gguf file")] = "",
    output: Annotated[Path, typer.Option(help="result file; an older one is continued")] = Path(
        "eval.jsonl"
    ),
    data: Annotated[Path | None, typer.Option(help="local data of the suite")] = None,
    methods: Annotated[str, typer.Option(help="comma-separated; dense always runs")] = METHODS,
    budgets: Annotated[str, typer.Option(help="comma-separated shares of the keys")] = BUDGETS,
    tasks: Annotated[str, typer.Option(help="comma-separated; all of the suite if empty")] = "",
    context_tokens: Annotated[int, typer.Option(help="length of made or cut documents")] = 8192,
    documents: Annotated[int | None, typer.Option(help="at most, per task")] = None,
    questions: Annotated[int | None, typer.Option(help="at most, per document")] = None,
    batch: Annotated[int, typer.Option(help="questions asked together")] = 16,
    errors: Annotated[bool, typer.Option(help="measure each layer's output error")] = False,
    generate: Annotated[bool, typer.Option(help="let every method write answers")] = True,
    plain_clusters: Annotated[
        bool, typer.Option(help="cluster by the keys alone, as the paper does")
    ] = False,
    seed: int = 0,
    device: Annotated[str, typer.Option(help="auto is the first GPU, else the CPU")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto is the checkpoint's")] = "auto",
    implementation: Annotated[str, typer.Option(help="of squeezed attention")] = "auto",
) -> None:
    """Run a suite. Each document is prefilled and indexed once for all methods and questions."""
    if ctx.invoked_subcommand:
        return
    with one_line_errors():
        chosen = suite_named(suite)
        options = RunOptions(
            methods=split(methods),
            budgets=tuple(check_budget(number(b)) for b in split(budgets)),
            implementation=implementation,
            batch=batch,
            measure_errors=errors,
            generate=generate,
            index=IndexConfig(ClusteringConfig(query_space=not plain_clusters)),
        )
        wanted = SuiteOptions(data, context_tokens, documents, questions, split(tasks), seed)
        check(options, wanted, output)
        if not model:
            raise SqueezedError("model: expected a directory, hub name or .gguf file, got nothing")
        quiet_libraries()
        session = Session.of(model, dtype, device, log)
        results = ResultFile(output, header(chosen.name, model, session.model, wanted))
        try:
            found = limited(chosen.documents(wanted, session.tokenizer), documents, questions)
            Runner(session, options, results, log).run(found)
        finally:
            results.leave_no_header_alone()
        if not results.rows:
            raise SqueezedError(
                "data: there was no document to ask about; check --data and --tasks"
            )
        print(reporting.markdown(reporting.with_averages(reporting.collect([output]))))


def check(options: RunOptions, wanted: SuiteOptions, output: Path) -> None:
    """Raise `SqueezedError` for settings that make no sense, before a model is loaded."""
    for name in options.methods:
        create(name, implementation=options.implementation)
    for name, value in (
        ("batch", options.batch),
        ("context-tokens", wanted.context_tokens),
        ("documents", wanted.documents),
        ("questions", wanted.questions),
    ):
        if value is not None:
            whole(name, value, 1)
    check_writable(output)


def split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise SqueezedError(f"budgets: expected numbers such as 0.1, got {text!r}") from None


def header(suite: str, name: str, model: PreTrainedModel, options: SuiteOptions) -> dict:
    """What a reader of the result file must know about the run."""
    return {
        "suite": suite,
        "model": model_label(name),
        "context_tokens": options.context_tokens,
        "seed": options.seed,
        "data": options.data.name if options.data else None,
        "dtype": str(model.dtype).removeprefix("torch."),
        **about_run(model.device),
    }


def model_label(name: str) -> str:
    """The last part of a path or hub name; of a GGUF file, its directory."""
    path = Path(name)
    return path.parent.name if path.suffix == ".gguf" else path.name


@app.command("report")
def report(
    files: Annotated[list[Path], typer.Argument(help="result files")],
    output: Annotated[Path | None, typer.Option(help="directory for table and plots")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="as JSON, with intervals")] = False,
) -> None:
    """Turn result files into a Markdown table, and PNG plots if a directory is given."""
    with one_line_errors():
        tables = reporting.with_averages(reporting.collect(files))
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            (output / "table.md").write_text(reporting.markdown(tables), encoding="utf-8")
            for path in reporting.plot(tables, output):
                log(f"wrote {path}")
        if as_json:
            runs = reporting.headers(files)
            print(json_text({"runs": runs, "results": reporting.summary(tables)}))
        else:
            print(reporting.markdown(tables))
