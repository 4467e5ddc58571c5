"""RULER's question answering: the paragraphs of one question among those of others.

Files are the usual development sets: SQuAD v1/v2 (`data` -> `paragraphs` -> `qas`) and HotpotQA's
distractor set (a list with `question`, `answer`, `context`).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

from squeezed.measure.accuracy.data import field, read_json, required

TASK = (
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words.\n\nThe following are given documents.\n\n"
)
ASK = (
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words.\n\nQuestion: {question}{{after}} Answer:"
)

Asked = tuple[str, tuple[str, ...], tuple[str, ...]]
"""Question, accepted answers, and the paragraphs that hold the answer."""


@cache
def squad(path: Path) -> tuple[list[Asked], list[str]]:
    asked: list[Asked] = []
    paragraphs: list[str] = []
    for article in field(read_json(path), "data", list, str(path)):
        for paragraph in field(article, "paragraphs", list, str(path)):
            text = field(paragraph, "context", str, str(path))
            paragraphs.append(text)
            for qa in field(paragraph, "qas", list, str(path)):
                if not qa.get("is_impossible"):
                    answers = field(qa, "answers", list, str(path))
                    found = tuple(field(a, "text", str, str(path)) for a in answers)
                    asked.append((field(qa, "question", str, str(path)), found, (text,)))
    return asked, paragraphs


@cache
def hotpotqa(path: Path) -> tuple[list[Asked], list[str]]:
    asked: list[Asked] = []
    paragraphs: list[str] = []
    for number, row in enumerate(read_json(path)):
        where = f"{path}: record {number}"
        own = [f"{title}\n{''.join(lines)}" for title, lines in field(row, "context", list, where)]
        paragraphs += own
        answer = (field(row, "answer", str, where),)
        asked.append((field(row, "question", str, where), answer, tuple(own)))
    return asked, paragraphs


READERS = {"squad.json": squad, "hotpotqa.json": hotpotqa}


def qa_task(file: str) -> Callable[[Path | None, random.Random, int], tuple]:
    """The maker of samples over one question file."""

    def make(data: Path | None, rng: random.Random, number: int) -> tuple:
        folder = required(data, f"a directory with {file}", "ruler")
        asked, paragraphs = READERS[file](required(folder / file, file, "ruler"))
        question, answers, own = asked[rng.randrange(len(asked))]
        others = rng.sample(paragraphs, len(paragraphs))
        others = [text for text in others if text not in own]
        seed = rng.random()

        def build(size: int) -> str:
            shown = list(own) + others[: size - 1]
            random.Random(seed).shuffle(shown)
            return "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(shown, 1))

        ask = ASK.format(question=question)
        return TASK, build, ask, answers, 32, "any_found", len(others)

    return make
