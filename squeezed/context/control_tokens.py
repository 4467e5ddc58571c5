"""Control tokens inside a document, question or answer are text: only the template writes them.

A tokenizer turns `<|im_end|>` into the token that ends a turn wherever it stands, so that a
document could forge turns. So those that stand in such a text are marked, and what lies between the
template's own control tokens is tokenised as text. Without marks a prompt is tokenised in one go.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

from squeezed.errors import SqueezedError
from squeezed.system.forks import Turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BEGIN, END = "\x02TEXT\x03", "\x02/TEXT\x03"
"""Around a control token that is text."""

ANCHORS = ("a", "\n", ".", "0")
"""Texts behind which a piece is tokenised as inside a text, if no token crosses the seam."""

_ONE_CALL = Turns()
"""How special tokens are split is a state of the tokenizer, which threads share."""


def encode(tokenizer: PreTrainedTokenizerBase, text: str, split: bool = False) -> list[int]:
    """Ids of `text` without a beginning or end added; `split` takes special tokens as text."""
    options = {"split_special_tokens": True} if split else {}
    with _ONE_CALL:
        return list(tokenizer(text, add_special_tokens=False, **options)["input_ids"])


def continued(tokenizer: PreTrainedTokenizerBase, text: str, split: bool = False) -> list[int]:
    """Ids of a text that continues another one.

    Some tokenizers (SentencePiece) put a mark before the first word of whatever they are given. So
    the text is tokenised behind others, and what belongs to those is cut off.
    """
    alone = encode(tokenizer, text, split)
    found = []
    for anchor in ANCHORS:
        before, both = encode(tokenizer, anchor), encode(tokenizer, anchor + text, split)
        if both[: len(before)] == before:
            found.append(both[len(before) :])
    return alone if not found or alone in found else found[0]


def control_tokens(
    tokenizer: PreTrainedTokenizerBase, template: str, written: Collection[int] = ()
) -> dict[str, Any]:
    """Added tokens by text that are special, or that the template writes; no white space.

    Args:
        written: ids of an answer: those of them that are not special stand there as tokens.
    """
    return {
        token.content: token
        for index, token in getattr(tokenizer, "added_tokens_decoder", {}).items()
        if (token.special or (token.content in template and index not in written))
        and token.content
        and not token.content.isspace()
    }


def marked(
    tokenizer: PreTrainedTokenizerBase, text: str, template: str, written: Collection[int] = ()
) -> str:
    """`text` with marks around the control tokens in it.

    Args:
        template: all that the template writes: added tokens in it are control tokens even if the
            tokenizer does not call them special.
        written: ids that `text` was decoded from, without special tokens; see `control_tokens`.
    """
    tokens = control_tokens(tokenizer, template, written)
    if not any(content in text for content in tokens):
        return text
    return _any_of(tokens).sub(lambda match: BEGIN + match[0] + END, text)


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, text: str, template: str, begins: bool
) -> list[int]:
    """Ids of a prompt in which `marked` control tokens are text.

    Args:
        begins: whether the text begins the prompt; otherwise it continues one.

    Raises:
        SqueezedError: the tokenizer has no way to write one of them as text.
    """
    if BEGIN not in text and END not in text:
        return encode(tokenizer, text) if begins else continued(tokenizer, text)
    tokens, ids, head = control_tokens(tokenizer, template), [], None
    for piece, is_control in _segments(tokens, text):
        if is_control:
            head = piece
            ids += encode(tokenizer, piece)
        elif piece:
            ids += _as_text(tokenizer, tokens, piece, head, begins)
    return ids


def _any_of(contents: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(contents, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)))


def _segments(tokens: dict[str, Any], text: str) -> list[tuple[str, bool]]:
    """Text and control tokens in turn, without marks, and without the space that tokens take."""
    literal = f"{re.escape(BEGIN)}(?:{_any_of(tokens).pattern}){re.escape(END)}"
    found: list[list] = [["", False]]
    start, strip = 0, False
    for match in re.finditer(f"({literal})|({_any_of(tokens).pattern})", text):
        _extend(found, text[start : match.start()], strip)
        start, strip = match.end(), strip and not found[-1][0]
        if match[1]:
            found[-1][0] += match[1]
            continue
        token = tokens[match[2]]
        if token.lstrip:
            found[-1][0] = found[-1][0].rstrip()
        found += [[match[2], True], ["", False]]
        strip = token.rstrip
    _extend(found, text[start:], strip)
    return [(piece.replace(BEGIN, "").replace(END, ""), control) for piece, control in found]


def _extend(found: list[list], text: str, strip: bool) -> None:
    found[-1][0] += text.lstrip() if strip and not found[-1][0] else text


def _as_text(
    tokenizer: PreTrainedTokenizerBase,
    tokens: Collection[str],
    text: str,
    head: str | None,
    begins: bool,
) -> list[int]:
    """Ids of `text` behind the control token `head`, none of them a control token's."""
    ids = _behind(tokenizer, text, head, begins)
    left = _still_in(tokenizer, tokens, ids)
    if not left:
        return ids
    first, *further = _cut_inside(text, left)  # matched as a whole only; halves are plain text
    ids = _behind(tokenizer, first, head, begins)
    for piece in further:
        ids += continued(tokenizer, piece, split=True)
    if _still_in(tokenizer, tokens, ids):
        raise SqueezedError(
            f"text: this tokenizer cannot write {left[0]!r} as text; remove it, or index with "
            "keep_control_tokens"
        )
    return ids


def _behind(
    tokenizer: PreTrainedTokenizerBase, text: str, head: str | None, begins: bool
) -> list[int]:
    """Ids of `text` as they are where it stands: at the beginning, inside, or behind `head`."""
    if head is None:
        plain = begins
    else:
        behind = encode(tokenizer, head + "a")[len(encode(tokenizer, head)) :]
        plain = behind == encode(tokenizer, "a")
    return encode(tokenizer, text, split=True) if plain else continued(tokenizer, text, split=True)


def _still_in(
    tokenizer: PreTrainedTokenizerBase, tokens: Collection[str], ids: list[int]
) -> list[str]:
    """Control tokens that came out all the same; the unknown token stands for any text."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    known = {tokenizer.convert_tokens_to_ids(content): content for content in tokens}
    return [known[index] for index in sorted(known.keys() & set(ids)) if index != unknown]


def _cut_inside(text: str, contents: list[str]) -> list[str]:
    """`text` cut after the first character of each of `contents` in it."""
    cut = _any_of(contents).sub(lambda match: f"{match[0][:1]}{BEGIN}{match[0][1:]}", text)
    return cut.split(BEGIN)
