"""Which passages of the document an answer came from: where the attention of its tokens lay."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from squeezed.answers.reading import QUERIES_AT_ONCE, answer_queries, entries, rows_read
from squeezed.context.encoding import wide
from squeezed.hf.answer import respond
from squeezed.hf.cache import SqueezedCache
from squeezed.hf.fixed_context import FixedContext
from squeezed.hf.watched import Watched

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PASSAGE_TOKENS = 40
"""Sentences are joined until a passage has this many tokens."""

LONGEST_PASSAGE = 120
"""Tokens after which a passage is cut even inside a sentence."""

SENTENCE_MARKS = tuple(".!?…‼⁇⁈⁉‽。．｡！？︒﹒﹖﹗؟۔܀܁܂।॥၊။።፧፨។៕᙮᠃᠉᱾᱿꓿꘎꘏꛳꛷꣎꣏꤯꧈꧉꩝꩞꩟꫰꫱꯫՜՞։߹")
"""What ends a sentence: Unicode's sentence terminals, and the ellipsis."""

CLOSERS = tuple("\"'”’»›)]}」』】〕〉》）］｝｣")
"""What may follow such a mark inside the sentence."""

LONGEST_ENDING = 16
"""Characters looked at for the end of a sentence."""

REPLACEMENT, JOINER = "\ufffd", "\u200d"

CONTINUATION_SYMBOLS = frozenset(
    map(chr, [*range(0x122, 0x144), *range(0xA1, 0xAD), *range(0xAE, 0xC0)])
)
"""How byte-level tokenizers write the bytes 0x80 to 0xBF, with which UTF-8 continues."""


NEUTRAL_QUESTION = "What does this text say?"
"""Asked to learn which passages draw attention whatever the question is."""

NEUTRAL_TOKENS = 16
"""Length of the answer to it."""


@dataclass(frozen=True)
class Passage:
    """Sentences of the document, and what an answer took from them.

    Attributes:
        start, end: token positions in the context, end excluded.
        text: the passage.
        share: of the answer's attention to the document, over layers, heads and tokens.
        excess: `share` less what a neutral question's answer gives the same passage.
        read: share of (layer, head, token) in which its keys were read exactly; `None` for methods
            without a tree.
    """

    start: int
    end: int
    text: str
    share: float
    excess: float
    read: float | None


def ask_neutral(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    context: FixedContext,
    cache: SqueezedCache,
) -> None:
    """Let a new `cache` answer the neutral question, as the measure for `sources`."""
    cache.watch_queries()
    ids = context.template.question_ids(tokenizer, NEUTRAL_QUESTION)
    respond(model, tokenizer, cache, ids, max_new_tokens=NEUTRAL_TOKENS)


def sources(
    tokenizer: PreTrainedTokenizerBase,
    context: FixedContext,
    cache: SqueezedCache | Watched,
    neutral: SqueezedCache | Watched,
    count: int = 3,
) -> list[Passage]:
    """The `count` passages that drew more of the answer's attention than of a neutral answer's.

    Attention alone names the end of the document for every question: heads look at what is near.
    Call `cache.watch_queries()` before answering, and `ask_neutral` on a second cache. Attention is
    computed exactly, over all keys, whatever the method read; the first tokens, its resting place,
    are left out.
    """
    (mass, read), (usual, _) = (attention_by_position(context, each) for each in (cache, neutral))
    found = []
    for start, end in passage_bounds(tokenizer, context.tokens):
        share, expected = float(mass[start:end].sum()), float(usual[start:end].sum())
        text = " ".join(tokenizer.decode(context.tokens[start:end]).split())
        exact = None if read is None else float(read[start:end].mean())
        found.append(Passage(start, end, text, share, share - expected, exact))
    return sorted(found, key=lambda passage: -passage.excess)[:count]


def attention_by_position(
    context: FixedContext, cache: SqueezedCache | Watched
) -> tuple[Tensor, Tensor | None]:
    """Softmax mass and share of exact reads of every token of the context, each `[P]` float64.

    Both are means over layers, heads and the tokens that produced the answer; the mass sums to 1
    over the tokens after the first pinned ones.
    """
    mass = torch.zeros(len(context.tokens), dtype=torch.float64)
    read = torch.zeros_like(mass)
    layers = entries(cache)
    for entry in layers:
        layer, positions = entry.context.layer, entry.context.layer.positions.long().cpu()
        query = answer_queries(entry)
        weight, exact = (
            _row_mass(query, wide(layer, torch.float32)[0], layer.scale),
            rows_read(entry, query),
        )
        mass.scatter_add_(0, positions.flatten(), weight.double().cpu().flatten())
        if exact is not None:
            read.scatter_add_(0, positions.flatten(), exact.double().cpu().flatten())
    heads = len(layers) * layers[0].context.layer.kv_heads
    has_tree = layers[0].context.rule is not None
    mass[: context.config.clustering.pinned_first] = 0
    return mass / mass.sum().clamp(min=1e-30), read / heads if has_tree else None


def _row_mass(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Mean softmax weight of every row over the queries of its head's group, `[Hkv, P]`, from
    float32 keys."""
    kv_heads, tokens, _ = keys.shape
    grouped = query[0].float().unflatten(0, (kv_heads, -1))  # [Hkv, G, N, D]
    total = torch.zeros(kv_heads, tokens, device=keys.device)
    for part in grouped.split(QUERIES_AT_ONCE, 2):
        logits = scale * part.flatten(1, 2) @ keys.mT
        total += logits.softmax(-1).sum(1)
    return total / (grouped.shape[1] * grouped.shape[2])


def passage_bounds(tokenizer: PreTrainedTokenizerBase, tokens: Tensor) -> list[tuple[int, int]]:
    """Token ranges of passages: whole sentences, joined to at least `PASSAGE_TOKENS`.

    A passage without an end is cut after `LONGEST_PASSAGE` tokens, but never inside a character.
    """
    bounds, start, text = [], 0, ""
    units = characters(tokenizer, tokens)
    for (end, piece), (_, following) in pairwise([*units, (0, "")]):
        text = (text + piece)[-LONGEST_ENDING:]
        ends = ends_sentence(text) and not following.startswith(CLOSERS)
        if (ends and end - start >= PASSAGE_TOKENS) or end - start >= LONGEST_PASSAGE:
            bounds.append((start, end))
            start, text = end, ""
    if start < len(tokens):
        bounds.append((start, len(tokens)))
    return bounds


def ends_sentence(text: str) -> bool:
    """Whether a sentence ends with `text`: a mark of any script, with quotes and brackets after."""
    bare = text.rstrip(" ")
    return bare.endswith("\n") or bare.rstrip("".join(CLOSERS) + " ").endswith(SENTENCE_MARKS)


def characters(tokenizer: PreTrainedTokenizerBase, tokens: Tensor) -> list[tuple[int, str]]:
    """The shortest runs of tokens that hold whole characters, each as its end and its text.

    A character's combining marks are part of it, and so is what a joiner ties to it.
    """
    ids = tokens.tolist()
    inside = {token: starts_inside(tokenizer, token) for token in set(ids)}
    ends = [i for i in range(1, len(ids) + 1) if i == len(ids) or not inside[ids[i]]]
    decode = cache(lambda run: tokenizer.decode(list(run)))
    found: list[tuple[int, str]] = []
    begun, start = 0, 0
    for end in ends:
        text = decode(tuple(ids[start:end]))
        if found and end - begun <= LONGEST_PASSAGE and _belong_together(found[-1][1], text):
            found[-1] = end, found[-1][1] + text
        else:
            begun = start
            found.append((end, text))
        start = end
    return found


def starts_inside(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    """Whether a token begins inside a character.

    Only tokens of bytes do, alone or merged; the first byte tells, for UTF-8 continues with 0x80
    to 0xBF.
    """
    piece = tokenizer.convert_ids_to_tokens(token) or ""
    byte = re.fullmatch("<0x([0-9A-Fa-f]{2})>", piece)
    if byte:
        return 0x80 <= int(byte[1], 16) < 0xC0
    return piece[:1] in CONTINUATION_SYMBOLS and tokenizer.decode([token]).startswith(REPLACEMENT)


def _belong_together(left: str, right: str) -> bool:
    if not right:
        return False
    mark = unicodedata.category(right[0]).startswith("M") or right[0] == JOINER
    return mark or left.endswith(JOINER)
