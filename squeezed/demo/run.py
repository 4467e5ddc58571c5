"""The demo's run: index one document, ask three questions with dense and squeezed attention."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from importlib import resources

from squeezed.answers.reading import Traffic
from squeezed.answers.session import Session
from squeezed.engine import Progress, silent
from squeezed.hf.answer import Answer
from squeezed.hf.asking import Asking
from squeezed.hf.fixed_context import FixedContext
from squeezed.measure.agreement import Agreement, compare, forced_logits

QUESTIONS = (
    "Which version of SQLite first had the WAL option?",
    "Does WAL work over a network filesystem?",
    "What threshold size of the WAL file triggers an automatic checkpoint?",
)
ANSWER_TOKENS = 32
QUICK_PART = 4
"""A quick run reads one part in this many of the document, and asks its first question."""


@dataclass(frozen=True)
class Asked:
    """One answer and what it cost."""

    question: str
    budget: float
    answer: Answer
    traffic: Traffic
    agreement: Agreement

    def record(self) -> dict:
        return {
            "question": self.question,
            "budget_asked": self.budget,
            "budget_spent": self.answer.spending.budget,
            "answer": self.answer.text,
            "answer_tokens": len(self.answer.tokens),
            "bytes_per_token": self.traffic.total,
            "dense_bytes_per_token": self.traffic.dense,
            "seconds": self.answer.seconds,
            "agreement": asdict(self.agreement),
        }


@dataclass(frozen=True)
class Demo:
    """The whole run; `seconds` is its wall time without loading the model."""

    context: FixedContext
    asked: list[Asked]
    seconds: float
    document: str

    def record(self) -> dict:
        return {
            "document": self.document,
            "tokens": len(self.context.tokens),
            "dtype": str(self.context.clustered_layers[0].dtype).removeprefix("torch."),
            "kv_bytes": self.context.kv_bytes(),
            "index_bytes": self.context.index_bytes(),
            "index_seconds": self.context.seconds,
            "seconds": self.seconds,
            "asked": [each.record() for each in self.asked],
        }


def document() -> str:
    """The text that the project ships; see `squeezed/demo/README.md` for source and licence."""
    return resources.files("squeezed.demo").joinpath("sqlite_wal.txt").read_text(encoding="utf-8")


def run_demo(
    session: Session, asking: Asking, progress: Progress = silent, quick: bool = False
) -> Demo:
    """Index the demo's document and ask every question twice: dense, and at `asking`'s budget.

    Args:
        progress: called with a phase, steps done and steps in all; see `squeezed.index`.
        quick: read the beginning of the document only, and ask the one question answered there.
    """
    started = time.perf_counter()
    session.prove(asking)
    questions: tuple[str, ...] = QUESTIONS
    text, name = document(), "sqlite_wal.txt"
    if quick:
        text, questions = text[: len(text) // QUICK_PART], QUESTIONS[:1]
        name = f"the first {1 / QUICK_PART:.0%} of {name}"
    context = session.index(text, progress=progress)
    session.ask(context, questions[0], **vars(asking), max_new_tokens=2)  # compiles, untimed
    asked: list[Asked] = []
    for number, question in enumerate(questions, 1):
        asked += ask_twice(session, context, question, asking)
        progress("ask", number, len(questions))
    return Demo(context, asked, time.perf_counter() - started, name)


def ask_twice(
    session: Session, context: FixedContext, question: str, asking: Asking
) -> list[Asked]:
    """The dense answer, and the squeezed one with its agreement on the dense answer's tokens."""
    both = (replace(asking, budget=1.0), asking)
    answers = [
        session.ask(context, question, **vars(each), watch=True, max_new_tokens=ANSWER_TOKENS)
        for each in both
    ]
    along = answers[0].tokens
    ids = context.template.question_ids(session.tokenizer, question)
    logits = [
        forced_logits(session.model, context.cache_for(each), [(ids, along)])[0] for each in both
    ]
    found = [compare(own, logits[0], along) for own in logits]
    return [
        Asked(question, answer.budget, answer, session.traffic(answer), agreement)
        for answer, agreement in zip(answers, found, strict=True)
    ]
