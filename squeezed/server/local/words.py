"""Tokens -> text that will not change any more, up to the first text that ends the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"
MOST_PENDING = 8
"""Tokens after which bytes that are no character yet never become one."""


class Words:
    """The text of one answer.

    Attributes:
        length: characters sent so far.
        stopped: whether one of `stops` came; what follows it is not sent.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: tuple[str, ...]) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.tokens: list[int] = []
        self.length, self.stopped = 0, False
        self._from, self._read = 0, 0
        self._held = ""

    def add(self, token: int) -> str:
        """What is certain of the text now, and was not sent yet."""
        self.tokens.append(token)
        whole = self._decoded(None)
        pending = len(self.tokens) - self._read
        if whole.endswith(REPLACEMENT) and pending < MOST_PENDING:
            return ""  # half of a character
        return self._send(self._new(whole), last=False)

    @property
    def written(self) -> int:
        """Characters of the tokens so far, those that wait to be sent included."""
        return self.length + len(self._held)

    def rest(self) -> str:
        """What is left when the answer ends."""
        return "" if self.stopped else self._send(self._new(self._decoded(None)), last=True)

    def _new(self, whole: str) -> str:
        """What the last tokens add; they are decoded behind a few others, which may join them."""
        before = self._decoded(self._read)
        self._from, self._read = self._read, len(self.tokens)
        return whole[len(before) :]

    def _decoded(self, end: int | None) -> str:
        return str(self.tokenizer.decode(self.tokens[self._from : end], skip_special_tokens=True))

    def _send(self, text: str, last: bool) -> str:
        self._held += text
        found = min((at for at in map(self._held.find, self.stops) if at >= 0), default=None)
        if found is not None:
            self.stopped = True
            sent, self._held = self._held[:found], ""
        else:
            keep = 0 if last else self._beginning()
            sent, self._held = (
                self._held[: len(self._held) - keep],
                self._held[len(self._held) - keep :],
            )
        self.length += len(sent)
        return sent

    def _beginning(self) -> int:
        """Characters at the end that may begin one of the stops."""
        return max(
            (
                count
                for stop in self.stops
                for count in range(1, min(len(stop), len(self._held) + 1))
                if self._held.endswith(stop[:count])
            ),
            default=0,
        )
