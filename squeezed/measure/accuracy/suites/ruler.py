"""RULER's 13 tasks (arXiv 2404.06654, appendix B), for any length and tokenizer.

Differences: `vt` and `cwe` come without the solved example in front. The haystack of the essay
tasks and the question files are local: a directory with `PaulGrahamEssays.json` (or `essays.txt`),
`squad.json` and `hotpotqa.json`; tasks need only the file they use.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from squeezed.context.prompt import PromptTemplate
from squeezed.measure.accuracy.examples import (
    Document,
    Question,
    Suite,
    SuiteOptions,
    chosen_tasks,
)
from squeezed.measure.accuracy.suites.haystack import longest_fit
from squeezed.measure.accuracy.suites.needle import answering, begun_template
from squeezed.measure.accuracy.suites.ruler_needles import NEEDLE_TASKS, needle_task
from squeezed.measure.accuracy.suites.ruler_qa import qa_task
from squeezed.measure.accuracy.suites.ruler_words import (
    common_words,
    frequent_words,
    variable_tracking,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXAMPLES = 10  # per task without a limit


@dataclass(frozen=True)
class Sample:
    """One example whose document can be made of any size.

    Attributes:
        before: text in front of the document.
        build: size -> document.
        ask: question, with `{after}` where the template's own ending belongs.
        metric: `all_found` or `any_found`.
    """

    before: str
    build: Callable[[int], str]
    ask: str
    answers: tuple[str, ...]
    new_tokens: int
    metric: str = "all_found"
    most: int = 1 << 20


Maker = Callable[[Path | None, random.Random], Sample]

TASKS: dict[str, Callable[[Path | None, random.Random, int], tuple]] = {
    **{name: needle_task(name) for name in NEEDLE_TASKS},
    "vt": variable_tracking,
    "cwe": common_words,
    "fwe": frequent_words,
    "qa_1": qa_task("squad.json"),
    "qa_2": qa_task("hotpotqa.json"),
}


def documents(options: SuiteOptions, tokenizer: PreTrainedTokenizerBase) -> Iterator[Document]:
    """Examples of every chosen task, one document and one question each."""
    for task in chosen_tasks("ruler", TASKS, options.tasks):
        for number in range(options.documents or EXAMPLES):
            rng = random.Random(f"{options.seed}-{task}-{number}")
            sample = Sample(*TASKS[task](options.data, rng, number))
            yield _document(task, number, sample, options.context_tokens, tokenizer)


def _document(
    task: str, number: int, sample: Sample, tokens: int, tokenizer: PreTrainedTokenizerBase
) -> Document:
    template = PromptTemplate.of(tokenizer)
    shown = begun_template(template, sample.before)
    question = answering(template, sample.ask)
    around = len(shown.document_ids(tokenizer, "")) + len(shown.question_ids(tokenizer, question))
    room = tokens - around - sample.new_tokens
    text = longest_fit(sample.build, tokenizer, room, sample.most)
    asked = Question(
        id="0",
        text=question,
        answers=sample.answers,
        metrics=(sample.metric,),
        max_new_tokens=sample.new_tokens,
        forced=" " + ", ".join(sample.answers),
    )
    return Document(f"{task}-{number}", task, text, shown, (asked,))


RULER = Suite("ruler", "https://arxiv.org/abs/2404.06654", documents, tuple(TASKS))
