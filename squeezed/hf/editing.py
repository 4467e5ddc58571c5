"""What a caller changes in a context's text: more of it, less of it, or another text."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace as altered
from itertools import accumulate, pairwise
from numbers import Integral

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from squeezed.config import GrowthConfig
from squeezed.context.growth import Kind, pieces_of
from squeezed.context.record import ContextRecord
from squeezed.context.text import check_text
from squeezed.errors import SqueezedError, expect
from squeezed.hf.cutting import cut, cut_change
from squeezed.hf.growing import Context, Growing, Progress


def append(growing: Growing, context: Context, text: str) -> Context:
    """The context with `text` behind it, tokenised by itself."""
    check_text("text", text)
    ids = context.template.further_ids(growing.tokenizer, text)
    if not len(ids):
        raise SqueezedError("text: there is nothing to append; give at least one word")
    return growing.grown(context, ids, (*pieces_of(context), len(ids)))


def crop(context: Context, tokens: int, config: GrowthConfig, progress: Progress) -> Context:
    """The context of the first `tokens` tokens, of all but the last `-tokens` if negative."""
    held = len(context.tokens)
    expect("tokens", tokens, Integral, "a whole number, -n to remove n tokens")
    left = int(tokens) if tokens >= 0 else held + int(tokens)
    if not 0 < left <= held:
        raise SqueezedError(
            f"tokens: expected 1 to {held:,} of the context's tokens to keep, or -n to remove n of "
            f"them, got {tokens:,}"
        )
    if left == held:
        return context
    return cut_change(context, left, config, progress)


def update(growing: Growing, context: Context, text: str, kind: Kind = "replace") -> Context:
    """The context of another text: what it begins with as the old one does is kept.

    The same context if nothing changes.
    """
    check_text("text", text)
    if not text.strip():
        raise SqueezedError("text: the document is empty; give at least one word")
    started, old = time.perf_counter(), context.tokens
    tokens, pieces = _tokenised(growing.tokenizer, context, text)
    kept = _alike(old, tokens.to(old.device))
    if kept == len(tokens):
        return altered(crop(context, kept, growing.config, growing.progress), pieces=pieces)
    if not kept:
        raise SqueezedError(
            "text: it does not begin as the context's does, so that nothing can be kept; index it "
            "again"
        )
    base = context if kept == len(old) else cut(context, kept)
    grown = growing.grown(base, tokens[kept:], pieces, kind, len(old) - kept)
    *past, last = grown.history
    last = altered(last, seconds=time.perf_counter() - started)
    return altered(grown, history=(*past, last))


def replace(growing: Growing, context: Context, old: str, new: str) -> Context:
    """The context in whose text `new` stands where `old` did, once."""
    if not check_text("old", old):
        raise SqueezedError("old: expected the passage to replace, got no text")
    check_text("new", new)
    texts = list(_texts(growing.tokenizer, context))
    if len(texts) < len(pieces_of(context)):
        raise SqueezedError(
            "old: this tokenizer does not give back the text that it was given, so that no passage "
            "can be found in it; give the whole new text to update()"
        )
    whole = "".join(texts)
    count = whole.count(old)
    if count != 1:
        raise SqueezedError(
            f"old: expected a passage that stands once in the text, this one stands there {count} "
            "times; " + ("give more of what is around it" if count else "copy it from the text")
        )
    return update(growing, context, whole.replace(old, new))


def _alike(one: Tensor, other: Tensor) -> int:
    """How many tokens two texts have in common at their beginning."""
    shorter = min(len(one), len(other))
    return int((one[:shorter] == other[:shorter]).long().cumprod(0).sum())


def _tokenised(
    tokenizer: PreTrainedTokenizerBase, context: ContextRecord, text: str
) -> tuple[Tensor, tuple[int, ...]]:
    """Tokens of a new text, and its pieces.

    Pieces of the old text that it begins with stay as they were tokenised; what follows them is
    tokenised by itself. Without any, all of it is tokenised at once.
    """
    done, number = "", 0
    for piece in _texts(tokenizer, context):
        if not text.startswith(done + piece):
            break
        done, number = done + piece, number + 1
    if not number:
        ids = context.template.document_ids(tokenizer, text)
        return ids, (len(ids),)
    kept = pieces_of(context)[:number]
    ids = context.template.further_ids(tokenizer, text[len(done) :])
    tokens = torch.cat([context.tokens[: sum(kept)].cpu(), ids])
    return tokens, (*kept, len(ids)) if len(ids) else kept


def _texts(tokenizer: PreTrainedTokenizerBase, context: ContextRecord) -> Iterator[str]:
    """Text of every piece, as far as the tokens of each are those of its text."""
    template, tokens = context.template, context.tokens.cpu()
    for start, end in pairwise(accumulate(pieces_of(context), initial=0)):
        ids = tokens[start:end]
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if start:
            again = template.further_ids(tokenizer, text)
        else:
            if not text.startswith(template.before):
                return
            text = text[len(template.before) :]
            again = template.document_ids(tokenizer, text)
        if not again.equal(ids):
            return
        yield text
