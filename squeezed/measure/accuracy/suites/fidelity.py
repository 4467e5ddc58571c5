"""Fidelity: the text goes on after the fixed context, and every next token is compared with dense.

The document is cut into windows of `context_tokens`; what follows each window is the forced text.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from squeezed.context.prompt import PromptTemplate
from squeezed.errors import SqueezedError
from squeezed.measure.accuracy.data import read_text, required
from squeezed.measure.accuracy.examples import Document, Question, Suite, SuiteOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEAD_TOKENS = 32  # selected as a user's input before comparison starts
FORCED_TOKENS = 160


def documents(options: SuiteOptions, tokenizer: PreTrainedTokenizerBase) -> Iterator[Document]:
    """Windows of every text under `options.data` (a file, or a directory of .txt files)."""
    path = required(options.data, "a text file or a directory of .txt files", "fidelity")
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    found = False
    for file in files:
        for document in windows(file, options.context_tokens, tokenizer):
            found = True
            yield document
    if not found:
        raise SqueezedError(
            f"data: {path} has no text longer than {options.context_tokens} + "
            f"{LEAD_TOKENS + FORCED_TOKENS} tokens; lower --context-tokens"
        )


def windows(file: Path, context: int, tokenizer: PreTrainedTokenizerBase) -> Iterator[Document]:
    """Consecutive windows of one text; a rest too short to be compared is left out."""
    before = tokenizer.bos_token if PromptTemplate.of(tokenizer).between.startswith("\n\nQ") else ""
    template = PromptTemplate(before or "", "", "")
    ids = tokenizer(read_text(file), add_special_tokens=False)["input_ids"]
    step = context + LEAD_TOKENS + FORCED_TOKENS
    for number, start in enumerate(range(0, len(ids) - step + 1, step)):
        cuts = (start, start + context, start + context + LEAD_TOKENS, start + step)
        text, lead, forced = (tokenizer.decode(ids[a:b]) for a, b in itertools.pairwise(cuts))
        question = Question("continuation", lead, (forced,), forced=forced)
        yield Document(f"{file.stem}#{number}", "text", text, template, (question,))


FIDELITY = Suite("fidelity", "any text", documents, ("text",))
