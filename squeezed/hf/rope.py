"""Where the rotary frequencies of a model change with the length of what it reads.

Keys are rotated once, so a context holds for one set of frequencies. `longrope` (Phi-3, Phi-4-mini)
has two and changes at a length: a document beyond it is read with the second set from its first
token on, and one below it may not be asked beyond. `dynamic` changes with every token beyond a
length, where it is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from squeezed.errors import SqueezedError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class End:
    """A number of tokens, document, question and answer together, that must not be passed."""

    tokens: int
    reason: str


@dataclass(frozen=True)
class RopeChange:
    """A length at which rotary frequencies change: for all tokens at once, or at every one."""

    tokens: int
    once: bool


def rope_changes(config: PreTrainedConfig) -> list[RopeChange]:
    """Where the rotary frequencies of a text configuration change, for any kind of its layers."""
    own = getattr(config, "rope_parameters", None) or {}
    found = []
    for rope in (own, *(x for x in own.values() if isinstance(x, dict))):
        kind = rope.get("rope_type") or ""
        if kind == "longrope":
            found.append(RopeChange(rope["original_max_position_embeddings"], once=True))
        elif "dynamic" in kind:
            found.append(RopeChange(config.max_position_embeddings - 1, once=False))
    return found


def rope_end(config: PreTrainedConfig, document: int) -> End | None:
    """The length up to which a document of so many tokens keeps its rotary frequencies."""
    ends = [x.tokens for x in rope_changes(config) if document <= x.tokens or not x.once]
    return End(min(ends), "its rotary frequencies change there") if ends else None


def first_chunk(config: PreTrainedConfig, document: int) -> int:
    """Tokens that the first forward pass must have, to use the frequencies of the whole."""
    return max((x.tokens + 1 for x in rope_changes(config) if document > x.tokens), default=1)


def check_rope(config: PreTrainedConfig, document: int, tokens: int) -> None:
    """Raise `SqueezedError` if `tokens` are read with other frequencies than the document was."""
    end = rope_end(config, document)
    if end and tokens > end.tokens:
        raise SqueezedError(
            f"past_key_values: {tokens:,} tokens with those after the document pass "
            f"{end.tokens:,}, where the model's rotary frequencies change; ask less, take a "
            "smaller suffix_tokens, or index a document longer than that"
        )
