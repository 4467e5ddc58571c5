"""Every method on every question of a suite: one prefill and one index per document.

Dense attention runs first on each document and is what the others are compared with.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from squeezed.answers.session import Session
from squeezed.config import IndexConfig
from squeezed.hf.asking import Asking
from squeezed.hf.build import build_cache
from squeezed.hf.cache import SqueezedCache
from squeezed.hf.fixed_context import FixedContext
from squeezed.hf.support import text_config
from squeezed.measure.accuracy.asking import generate_answers
from squeezed.measure.accuracy.examples import Document, Question
from squeezed.measure.accuracy.meter import ErrorHistogram, Meter
from squeezed.measure.accuracy.metrics import score
from squeezed.measure.accuracy.results import ResultFile
from squeezed.measure.agreement import compare, forced_logits
from squeezed.methods import Method, create
from squeezed.methods.base import ContextAttention

REFERENCE = "dense"


@dataclass(frozen=True)
class RunOptions:
    """How a suite is run.

    Attributes:
        methods: names or aliases of `squeezed.methods`, besides dense.
        budgets: shares of the clustered keys.
        batch: questions asked together.
        measure_errors: compare the attention output of every layer with dense.
        generate: also let every method write its own answers, which takes most of the time.
    """

    methods: tuple[str, ...]
    budgets: tuple[float, ...]
    implementation: str = "auto"
    batch: int = 16
    measure_errors: bool = False
    generate: bool = True
    index: IndexConfig = field(default_factory=IndexConfig)


@dataclass
class Asked:
    """A document in work: its context, and dense logits of the questions already forced."""

    document: Document
    context: FixedContext
    dense: dict[str, Tensor]


class Runner:
    """Runs documents through methods and writes what comes out."""

    def __init__(
        self, session: Session, options: RunOptions, results: ResultFile, log: Callable[[str], None]
    ) -> None:
        self.session, self.options = session, options
        self.model, self.tokenizer = session.model, session.tokenizer
        self.results = results
        self.log = log
        self.reference = create(REFERENCE)
        self.methods: dict[str, Method] = {
            name: create(name, implementation=options.implementation)
            for name in options.methods
            if name != REFERENCE
        }

    def run(self, documents: Iterable[Document]) -> None:
        for name in self.methods:
            asking = Asking(implementation=self.options.implementation, method=name)
            self.session.prove(asking, self.options.index)
        for document in documents:
            if not self._pending(document):
                continue
            if self._too_long(document):
                continue
            started = time.perf_counter()
            context = self.session.index(document.text, None, self.options.index, document.template)
            asked = Asked(document, context, {})
            self.log(
                f"{document.task} {document.id[:40]!r}: {len(context.tokens):,} tokens indexed in "
                f"{time.perf_counter() - started:.1f} s"
            )
            self._run_document(asked)
            self.log(f"{document.task}: {time.perf_counter() - started:.1f} s with all methods")

    def _plan(self) -> list[tuple[str, Method, float]]:
        plan = [(REFERENCE, self.reference, 1.0)]
        for name, method in self.methods.items():
            plan += [(name, method, budget) for budget in self.options.budgets]
        return plan

    def _missing(self, document: Document, name: str, budget: float) -> list[Question]:
        done, head = self.results.done, (document.task, document.id)
        return [q for q in document.questions if (*head, q.id, name, budget) not in done]

    def _pending(self, document: Document) -> bool:
        if (document.task, document.id) in self.results.skipped:
            return False
        return any(self._missing(document, name, budget) for name, _, budget in self._plan())

    def _too_long(self, document: Document) -> bool:
        """Whether document, longest question and answer exceed the model; noted, never cut."""
        longest = getattr(text_config(self.model), "max_position_embeddings", None)
        template = document.template
        tokens = len(template.document_ids(self.tokenizer, document.text))
        tokens += max(
            len(template.question_ids(self.tokenizer, q.text)) + self._answer_room(q)
            for q in document.questions
        )
        if not longest or tokens <= longest:
            return False
        reason = f"{tokens} tokens with question and answer, the model has {longest} positions"
        self.results.append(
            {"kind": "skipped", "task": document.task, "document": document.id, "reason": reason}
        )
        self.log(f"skipped {document.task} {document.id[:40]!r}: {reason}")
        return True

    def _answer_room(self, question: Question) -> int:
        forced = len(self._forced_ids(question)) if question.forced else 0
        return max(forced, question.max_new_tokens if question.metrics else 0)

    def _forced_ids(self, question: Question) -> Tensor:
        ids = self.tokenizer(question.forced, add_special_tokens=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.long)

    def _run_document(self, asked: Asked) -> None:
        for name, method, budget in self._plan():
            missing = self._missing(asked.document, name, budget)
            if not missing:
                continue
            layers = method.prepare(asked.context, budget)
            errors = [ErrorHistogram() for _ in layers]
            for start in range(0, len(missing), self.options.batch):
                part = missing[start : start + self.options.batch]
                self._run_batch(asked, part, name, budget, layers, errors)
            if self.options.measure_errors and name != REFERENCE:
                where = self._where(asked.document, name, budget)
                rows = [histogram.record() for histogram in errors]
                self.results.append({"kind": "layers", **where, "errors": rows})

    def _where(self, document: Document, name: str, budget: float) -> dict:
        return {"task": document.task, "document": document.id, "method": name, "budget": budget}

    def _run_batch(
        self,
        asked: Asked,
        questions: list[Question],
        name: str,
        budget: float,
        layers: Sequence[ContextAttention],
        errors: list[ErrorHistogram],
    ) -> None:
        meter = Meter(measure_errors=self.options.measure_errors and name != REFERENCE)
        scores: dict[str, dict] = {q.id: {} for q in questions}
        predictions: dict[str, str] = {}
        started = time.perf_counter()
        if forced := [q for q in questions if q.forced]:
            cache = meter.metering(build_cache(asked.context, layers, budget))
            for q, found in zip(forced, self._force(asked, forced, cache), strict=True):
                scores[q.id] |= found
            for total, part in zip(errors, meter.errors, strict=True):
                total.merge(part)
            meter.measure_errors = False
            meter.enabled = not meter.keys  # all methods are measured on the same tokens
        if spoken := [q for q in questions if q.metrics and self.options.generate]:
            cache = meter.metering(build_cache(asked.context, layers, budget))
            predictions = self._generate(asked, spoken, cache)
            for q in spoken:
                scores[q.id] |= score(predictions[q.id], q)
        seconds = (time.perf_counter() - started) / len(questions)
        for q in questions:
            self.results.append(
                {
                    "kind": "answer",
                    **self._where(asked.document, name, budget),
                    "question": q.id,
                    "answers": list(q.answers),
                    "prediction": predictions.get(q.id),
                    "scores": scores[q.id],
                    **meter.spent(),
                    "seconds": round(seconds, 4),
                }
            )

    def _ids(self, asked: Asked, question: Question) -> Tensor:
        return asked.document.template.question_ids(self.tokenizer, question.text)

    def _force(
        self, asked: Asked, questions: list[Question], cache: SqueezedCache
    ) -> list[dict[str, float]]:
        """Scores against dense; the reference run fills `asked.dense`, resumed runs redo it."""
        parts = [(self._ids(asked, q), self._forced_ids(q)) for q in questions]
        missing = [i for i, q in enumerate(questions) if q.id not in asked.dense]
        if missing:
            dense = build_cache(asked.context, self.reference.prepare(asked.context, 1.0), 1.0)
            found = forced_logits(self.model, dense, [parts[i] for i in missing])
            for i, logits in zip(missing, found, strict=True):
                asked.dense[questions[i].id] = logits
        forced = forced_logits(self.model, cache, parts)
        return [
            compare(ours, asked.dense[q.id], answer).scores()
            for ours, q, (_, answer) in zip(forced, questions, parts, strict=True)
        ]

    def _generate(
        self, asked: Asked, questions: list[Question], cache: SqueezedCache
    ) -> dict[str, str]:
        ids = [self._ids(asked, q) for q in questions]
        new = max(q.max_new_tokens for q in questions)
        texts = generate_answers(self.model, self.tokenizer, asked.context, cache, ids, new)
        return {q.id: text.strip() for q, text in zip(questions, texts, strict=True)}


def limited(
    documents: Iterable[Document], most: int | None, questions: int | None
) -> Iterator[Document]:
    """At most `most` documents per task, each with at most `questions` questions."""
    seen: dict[str, int] = {}
    for document in documents:
        seen[document.task] = seen.get(document.task, 0) + 1
        if most is None or seen[document.task] <= most:
            yield replace(document, questions=document.questions[:questions])
