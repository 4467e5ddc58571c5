"""Needles in a haystack: several needles in each essay haystack, and one question for each."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from squeezed.context.prompt import PromptTemplate
from squeezed.measure.accuracy.data import read_text, required
from squeezed.measure.accuracy.examples import Document, Question, Suite, SuiteOptions
from squeezed.measure.accuracy.suites.haystack import (
    draw_distinct,
    hide,
    longest_fit,
    needle,
    sentences,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEEDLES = 8
ROOM = 160  # tokens for template, question and answer
TASK = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n"
)
ASK = (
    "What is the special magic {one} for {key} mentioned in the provided text?{after} "
    "The special magic {one} for {key} mentioned in the provided text is"
)


def answering(template: PromptTemplate, key_question: str) -> str:
    """The question with the answer's beginning behind the template's own ending, as in RULER."""
    asked, _, begun = key_question.partition("{after}")
    return asked + template.after + begun.lstrip() if template.after.strip() else asked + begun


def begun_template(template: PromptTemplate, before: str) -> PromptTemplate:
    """The template for questions that already contain its ending and the answer's beginning."""
    return PromptTemplate(template.before + before, "\n\n", "")


def documents(options: SuiteOptions, tokenizer: PreTrainedTokenizerBase) -> Iterator[Document]:
    """One haystack per seed; without a limit four, so that there are 32 questions."""
    path = required(options.data, "the essays (a .txt file, or .json with a field text)", "niah")
    essays, template = read_text(path), PromptTemplate.of(tokenizer)
    for number in range(options.documents or 4):
        rng = random.Random(f"{options.seed}-{number}")
        keys = draw_distinct("words", NEEDLES, rng)
        values = draw_distinct("numbers", NEEDLES, rng)
        needles = [needle("numbers", k, v) for k, v in zip(keys, values, strict=True)]
        start = rng.randrange(max(1, len(essays) - 60 * options.context_tokens))
        state = rng.getstate()

        def build(
            count: int, needles: Any = needles, start: int = start, state: Any = state
        ) -> str:
            again = random.Random()
            again.setstate(state)
            return hide(needles, sentences(essays[start:], count), again)

        text = longest_fit(build, tokenizer, options.context_tokens - ROOM)
        questions = tuple(
            Question(
                id=key,
                text=answering(template, ASK.replace("{one}", "number").replace("{key}", key)),
                answers=(value,),
                metrics=("all_found",),
                max_new_tokens=16,
                forced=f" {value}",
            )
            for key, value in zip(keys, values, strict=True)
        )
        shown = begun_template(template, TASK.format(kind="numbers"))
        yield Document(f"essays-{number}", "needles", text, shown, questions)


NIAH = Suite("niah", "https://arxiv.org/abs/2404.06654", documents, ("needles",))
