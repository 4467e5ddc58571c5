"""PreFixQA: many short questions about one paper (arXiv 2411.09688, section 5.2).

The directory holds `papers_text.json` (title -> text) and `qa_pairs.json` (title -> question ->
answers).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from squeezed.context.prompt import PromptTemplate
from squeezed.errors import SqueezedError
from squeezed.measure.accuracy.data import field, read_json, required
from squeezed.measure.accuracy.examples import Document, Question, Suite, SuiteOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INSTRUCTION = "Answer with a few words from the paper."
NEW_TOKENS = 24


def documents(options: SuiteOptions, tokenizer: PreTrainedTokenizerBase) -> Iterator[Document]:
    """Papers from short to long, so that a limit on documents takes those most models can hold."""
    path = required(options.data, "the directory of PreFixQA", "prefixqa")
    texts_file, pairs_file = (
        required(path / name, name, "prefixqa") for name in ("papers_text.json", "qa_pairs.json")
    )
    texts, pairs = read_json(texts_file), read_json(pairs_file)
    if not isinstance(texts, dict) or not isinstance(pairs, dict):
        raise SqueezedError(
            f"{path}: expected JSON objects by paper title, got lists; check --data"
        )
    template = PromptTemplate.of(tokenizer)
    for title in sorted(texts, key=lambda title: (len(texts[title]), title)):
        text = field(texts, title, str, f"{texts_file}: line 1")
        asked = field(pairs, title, dict, f"{pairs_file}: line 1")
        yield Document(title, "papers", text, template, tuple(_questions(asked, pairs_file)))


def _questions(asked: dict, file: Path) -> Iterator[Question]:
    for text in asked:
        answers = field(asked, text, list, f"{file}: line 1")
        yield Question(
            id=text,
            text=f"{INSTRUCTION}\n{text}",
            answers=tuple(answers),
            metrics=("f1", "containment"),
            max_new_tokens=NEW_TOKENS,
            forced=answers[0],
        )


PREFIXQA = Suite("prefixqa", "https://arxiv.org/abs/2411.09688", documents, ("papers",))
