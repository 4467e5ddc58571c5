"""Control tokens inside a document or a question are text: only the template writes real ones.

A tokenizer turns `<|im_end|>` into the token that ends a turn wherever it stands, so that a
document could forge turns. Text without control tokens is tokenised in one piece with the template
around it.
"""

from __future__ import annotations

from threading import Lock

from squeezed.errors import SqueezedError

SENTINELS = ("\n", ".", "x", "0")
"""Texts before which a piece is put where a tokenizer marks the beginning of a text."""

_ONE_CALL = Lock()
"""How special tokens are split is a state of the tokenizer, which threads share."""


def encode(tokenizer, text: str, split: bool = False) -> list[int]:
    """Ids of `text` without a beginning or end added; `split` takes special tokens as text."""
    options = {"split_special_tokens": True} if split else {}
    with _ONE_CALL:
        return list(tokenizer(text, add_special_tokens=False, **options)["input_ids"])


def text_between(tokenizer, before: str, content: str, after: str, template: str = "") -> list[int]:
    """Ids of `before + content + after` in which only `before` and `after` have control tokens.

    Args:
        template: all that the template writes, where that is more than `before + after`: added
            tokens in it are control tokens even if the tokenizer does not call them special.

    Raises:
        SqueezedError: the tokenizer has no way to write one of the content's as text.
    """
    joined = encode(tokenizer, before + content + after)
    tokens = control_tokens(tokenizer, before + after + template)
    if not tokens or not _forges(tokenizer, tokens, joined, before, content, after):
        return joined
    head, tail = _cut_after_last(tokens, before)
    front, rest = _cut_before_first(tokens, after)
    middle = _as_text(tokenizer, tokens, tail + content + front, head)
    return encode(tokenizer, head) + middle + encode(tokenizer, rest)


def control_tokens(tokenizer, template: str) -> dict[int, object]:
    """Added tokens by id that are special, or that the template writes; no white space."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {
        index: token
        for index, token in added.items()
        if (token.special or token.content in template) and not token.content.isspace()
    }


def _forges(tokenizer, tokens, joined: list[int], before: str, content: str, after: str) -> bool:
    """Whether `joined` has more control tokens than the template alone.

    The unknown token stands for any text, so that only its name in the content says that it does.
    """
    unknown = getattr(tokenizer, "unk_token_id", None)
    counted = tokens.keys() - {unknown}
    own = sum(index in counted for part in (before, after) for index in encode(tokenizer, part))
    named = unknown in tokens and tokens[unknown].content in content
    return named or sum(index in counted for index in joined) > own


def _cut_after_last(tokens, before: str) -> tuple[str, str]:
    """`before` up to its last control token, and the rest, which is tokenised with the content."""
    cut = 0
    for token in tokens.values():
        start = before.rfind(token.content)
        if start >= 0:
            end = start + len(token.content)
            if token.rstrip:
                end += len(before[end:]) - len(before[end:].lstrip())
            cut = max(cut, end)
    return before[:cut], before[cut:]


def _cut_before_first(tokens, after: str) -> tuple[str, str]:
    cut = len(after)
    for token in tokens.values():
        start = after.find(token.content)
        if start >= 0:
            cut = min(cut, len(after[:start].rstrip()) if token.lstrip else start)
    return after[:cut], after[cut:]


def _as_text(tokenizer, tokens, text: str, head: str) -> list[int]:
    """Ids of `text` behind `head`, none of them a control token's."""
    ids = _behind(tokenizer, text, head)
    left = _still_in(tokenizer, tokens, ids)
    if not left:
        return ids
    pieces = _cut_inside(text, left)  # matched as a whole only; halves are ordinary text
    ids = _behind(tokenizer, pieces[0], head)
    for piece in pieces[1:]:
        ids += _continued(tokenizer, piece)
    if _still_in(tokenizer, tokens, ids):
        raise SqueezedError(
            f"text: this tokenizer cannot write {left[0]!r} as text; remove it, or index with "
            "keep_control_tokens"
        )
    return ids


def _still_in(tokenizer, tokens, ids: list[int]) -> list[str]:
    found = (tokens.keys() - {tokenizer.unk_token_id}) & set(ids)
    return [tokens[index].content for index in sorted(found)]


def _cut_inside(text: str, contents: list[str]) -> list[str]:
    """`text` cut after the first character of each of `contents` in it."""
    pieces = [text]
    for content in contents:
        parts = [piece.split(content) for piece in pieces]
        pieces = []
        for around in parts:
            pieces.append(around[0])
            for following in around[1:]:
                pieces[-1] += content[:1]
                pieces.append(content[1:] + following)
    return [piece for piece in pieces if piece]


def _behind(tokenizer, text: str, head: str) -> list[int]:
    """Ids of `text` as they are behind `head`, which is empty or ends with a control token."""
    if not text:
        return []
    begun = encode(tokenizer, head)
    if not head or encode(tokenizer, head + "a")[len(begun) :] == encode(tokenizer, "a"):
        return encode(tokenizer, text, split=True)
    return _continued(tokenizer, text)


def _continued(tokenizer, text: str) -> list[int]:
    """Ids of `text` in the middle of another: without the mark that some put at a beginning."""
    alone = encode(tokenizer, text, split=True)
    if encode(tokenizer, "\na")[-1:] == encode(tokenizer, "a")[-1:]:
        return alone
    for sentinel in SENTINELS:
        begun = encode(tokenizer, sentinel)
        ids = encode(tokenizer, sentinel + text, split=True)
        if ids[: len(begun)] == begun:
            return ids[len(begun) :]
    return alone
