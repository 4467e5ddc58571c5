"""The whole journey on one page: a document becomes a fixed context, a question an answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from squeezed.config import BEST, DEFAULT_BUDGET, IndexConfig, RowsName, check_rows
from squeezed.context.captured import handed_over
from squeezed.context.encoding import check_fits
from squeezed.context.prompt import PromptTemplate
from squeezed.context.storage import directory
from squeezed.context.text import check_text
from squeezed.costs.memory import check_memory
from squeezed.costs.shape import model_shape
from squeezed.errors import SqueezedError, expect
from squeezed.hf.answer import Answer, Request
from squeezed.hf.asking import Asking
from squeezed.hf.capture import capture
from squeezed.hf.fixed_context import FixedContext
from squeezed.hf.identity.fingerprint import check_model, model_fingerprint
from squeezed.hf.identity.maker import check_maker, check_pair
from squeezed.hf.identity.maker import check_tokenizer as check_tokenizer
from squeezed.hf.identity.vocabulary import tokenizer_fingerprint
from squeezed.hf.positions import check_document
from squeezed.hf.rehearsal import rehearse
from squeezed.hf.support import input_device, layer_kinds
from squeezed.indexing.build import cluster
from squeezed.indexing.calibrate import calibrate
from squeezed.indexing.encode import encode
from squeezed.indexing.probe import probe_question
from squeezed.system.failures import readable_failures

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[str, int, int], None]
"""Called with the name of a phase, steps done, and steps in all."""


def silent(phase: str, done: int, total: int) -> None:
    pass


@readable_failures()
def index(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    config: IndexConfig | None = None,
    template: PromptTemplate | None = None,
    progress: Progress = silent,
    rows: RowsName | None = None,
) -> FixedContext:
    """Prefill, cluster and calibrate a document once.

    Args:
        model: a Transformers causal language model with full or sliding-window attention.
        tokenizer: its tokenizer.
        text: the document.
        config: clustering, presets and budgets; the defaults suit most documents.
        template: text around document and question; by default the tokenizer's chat template.
        progress: called with `("prefill" | "cluster" | "calibrate" | "encode", done, total)`; rows
            are encoded unless they stay plain.
        rows: how keys and values are written, instead of what `config` says: `plain`, `int8` or
            `int4`.

    Raises:
        UnsupportedModelError: the model computes attention in another way.
        SqueezedError: the document is empty or longer than the model's positions.
    """
    check_pair(model, tokenizer)
    config = IndexConfig() if config is None else config
    expect("config", config, IndexConfig, "an IndexConfig")
    config = config if rows is None else replace(config, rows=check_rows(rows))
    check_text("text", text)
    template = PromptTemplate.of(tokenizer) if template is None else template
    expect("template", template, PromptTemplate, "a PromptTemplate")
    kinds = layer_kinds(model)
    tokens = template.document_ids(tokenizer, _document(text))
    room = check_document(model, len(tokens))
    rehearse(model, kinds, tokens)
    fingerprint = model_fingerprint(model)  # before the prefill: it may refuse
    check_memory(model, len(tokens), config.clustering)
    if config.rows != "plain":
        check_fits(config.rows, model_shape(model.config).head_dim)

    started = time.perf_counter()
    question = probe_question(text, config.calibration.probe)
    probe = template.question_ids(tokenizer, question)[-room:]
    captured = capture(
        model,
        tokens,
        probe,
        config.prefill_chunk,
        lambda done: progress("prefill", done, len(tokens)),
    )
    prefilled = time.perf_counter()
    with torch.autocast(input_device(model).type, enabled=False):
        layers, forest = cluster(
            handed_over(captured),
            len(tokens),
            config.clustering,
            lambda done: progress("cluster", done, len(kinds)),
        )
        clustered = time.perf_counter()
        calibrations = {}
        for done, preset in enumerate(config.presets):
            calibrations[preset.name] = calibrate(
                forest, preset, config.budgets, config.calibration
            )
            progress("calibrate", done + 1, len(config.presets))
    calibrated = time.perf_counter()
    observed = tuple(layer.queries for layer in forest.layers())
    del forest  # so that plain rows go where encoded ones come
    losses: tuple[tuple[float, ...], ...] = ()
    if config.rows != "plain":
        losses = encode(layers, observed, config.rows, partial(progress, "encode"))
    return FixedContext(
        tokens=tokens,
        layers=tuple(layers),
        windows=tuple(kind.sliding_window for kind in kinds),
        calibrations=calibrations,
        config=config,
        template=template,
        model=fingerprint,
        tokenizer=tokenizer_fingerprint(tokenizer),
        observed=observed,
        seconds={
            "prefill": prefilled - started,
            "cluster": clustered - prefilled,
            "calibrate": calibrated - clustered,
        }
        | ({} if config.rows == "plain" else {"encode": time.perf_counter() - calibrated}),
        rows_loss=losses,
    )


def _document(text: str) -> str:
    if not text.strip():
        raise SqueezedError("text: the document is empty; give at least one word")
    return text


@readable_failures()
def load(
    path: str | Path, model: PreTrainedModel = None, rows: RowsName | None = None
) -> FixedContext:
    """Open a saved context, on the model's device, and check that the model made it.

    Args:
        rows: encode its keys and values so, reading all of it at once; `None` leaves them as saved.

    Raises:
        ContextFileError: nothing there, damaged, another format, or made by another model.
        SqueezedError: rows that are encoded already, otherwise.
    """
    expect("path", path, (str, PathLike), "a saved context's path")
    device = "cpu" if model is None else input_device(model)
    written = None if rows is None else check_rows(rows)
    context = FixedContext.of(directory.load(Path(path), device))
    if model is not None:
        check_model(model, context)
    return context if written is None else context.encoded(written)


@readable_failures()
def append(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    context: FixedContext,
    text: str,
    budget: float = 1.0,
    progress: Progress = silent,
) -> FixedContext:
    """The next version of a context, with `text` behind it; takes and raises as
    `FixedContext.append`, and refuses what memory cannot hold."""
    check_pair(model, tokenizer)
    check_maker(model, tokenizer, context)
    more = len(context.template.further_ids(tokenizer, text))
    check_memory(model, len(context.tokens) + more, context.config.clustering)
    return context.append(model, tokenizer, text, budget, progress=progress)


@readable_failures()
def update(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    context: FixedContext,
    text: str,
    budget: float = 1.0,
    progress: Progress = silent,
) -> FixedContext:
    """The next version of a context, of another text; takes and raises as `FixedContext.update`,
    and refuses what memory cannot hold."""
    check_pair(model, tokenizer)
    check_maker(model, tokenizer, context)
    tokens = len(context.template.document_ids(tokenizer, text))
    check_memory(model, tokens, context.config.clustering)
    return context.update(model, tokenizer, text, budget, progress=progress)


@readable_failures()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    context: FixedContext,
    question: str,
    budget: float = DEFAULT_BUDGET,
    preset: str = BEST.name,
    implementation: str = "auto",
    method: str = "squeezed",
    **generate_arguments: Any,
) -> Answer:
    """Answer a question about a fixed context.

    Args:
        budget: share of the context's clustered keys read exactly, in (0, 1]; 1.0 is dense.
        preset: `best` or `paper`.
        implementation: `auto`, `reference`, `cpu` or `triton`.
        method: a name of `squeezed.methods.METHODS`.
        generate_arguments: passed to `model.generate` (`max_new_tokens`, `streamer`,
            `generation_config`, ...), which sees document and question as one prompt: penalties,
            `max_length` and streamers mean what they mean in dense. Greedy unless the call asks
            for sampling; `DEFAULT_NEW_TOKENS` long unless the call or the checkpoint says.

    Raises:
        SqueezedError: an argument that cannot be honoured, by its name, before anything is read.
    """
    asking = Asking(budget, preset, implementation, method)
    return request(model, tokenizer, context, question, asking, **generate_arguments).run()


@readable_failures()
def request(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    context: FixedContext,
    question: str,
    asking: Asking,
    watch: bool = False,
    **generate_arguments: Any,
) -> Request:
    """A question that `run()` answers, with a cache of its own; takes and raises as `generate`.

    Args:
        watch: keep the answer's queries, for `squeezed.answers.sources` and `.reading`.
    """
    check_pair(model, tokenizer)
    check_text("question", question)
    check_maker(model, tokenizer, context)
    cache = context.cache_for(asking, recognised=True)
    ids = context.template.question_ids(tokenizer, question)
    asked = Request.of(model, tokenizer, cache, ids, generate_arguments)
    return asked.watching(context, asking) if watch else asked
