"""The demo's run: index one document, ask three questions with dense and squeezed attention."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import resources

from transformers import PreTrainedModel, PreTrainedTokenizerBase

import squeezed
from squeezed.answers.reading import Traffic, traffic
from squeezed.config import BEST, DEFAULT_BUDGET
from squeezed.hf.answer import Answer, respond
from squeezed.hf.fixed_context import FixedContext
from squeezed.measure.agreement import Agreement, compare, next_token_logits

QUESTIONS: tuple[str, ...] = (
    "Which version of SQLite first had the WAL option?",
    "Does WAL work over a network filesystem?",
    "What threshold size of the WAL file triggers an automatic checkpoint?",
)
ANSWER_TOKENS = 32
QUICK_PART = 4
"""A quick run reads one part in this many of the document, and asks its first question."""

Progress = Callable[[str, int, int], None]


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
            "dtype": str(self.context.clustered_layers[0].keys.dtype).removeprefix("torch."),
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
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    budget: float = DEFAULT_BUDGET,
    preset: str = BEST.name,
    implementation: str = "auto",
    progress: Progress = lambda phase, done, total: None,
    quick: bool = False,
) -> Demo:
    """Index the demo's document and ask every question twice: dense, and at `budget`.

    Args:
        progress: called with a phase, steps done and steps in all; see `squeezed.index`.
        quick: read the beginning of the document only, and ask the one question answered there.
    """
    started = time.perf_counter()
    text, questions, name = document(), QUESTIONS, "sqlite_wal.txt"
    if quick:
        text, questions = text[: len(text) // QUICK_PART], QUESTIONS[:1]
        name = f"the first {1 / QUICK_PART:.0%} of {name}"
    context = squeezed.index(model, tokenizer, text, progress=progress)
    squeezed.generate(  # compiles the kernels once, outside the times of the first question
        model,
        tokenizer,
        context,
        QUESTIONS[0],
        budget,
        preset,
        implementation,
        max_new_tokens=2,
    )
    asked: list[Asked] = []
    for number, question in enumerate(questions, 1):
        asked += ask_twice(model, tokenizer, context, question, budget, preset, implementation)
        progress("ask", number, len(questions))
    return Demo(context, asked, time.perf_counter() - started, name)


def ask_twice(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    context: FixedContext,
    question: str,
    budget: float,
    preset: str,
    implementation: str,
) -> list[Asked]:
    """The dense answer, and the squeezed one with its agreement on the dense answer's tokens."""
    ids = context.template.question_ids(tokenizer, question)
    asked, answers = [], []
    for share in (1.0, budget):
        cache = context.cache(share, preset, implementation)
        cache.watch_queries()
        answers.append(respond(model, tokenizer, cache, ids, max_new_tokens=ANSWER_TOKENS))
        asked.append((share, answers[-1], traffic(context, cache)))
    dense, other = (
        next_token_logits(
            model, context.cache(share, preset, implementation), ids, answers[0].tokens
        )
        for share in (1.0, budget)
    )
    return [
        Asked(question, *row, agreement=compare(dense, logits, answers[0].tokens))
        for row, logits in zip(asked, (dense, other), strict=True)
    ]
