"""Keys and values of a layer as they lie in memory: their encoding, their type and their place.

Kernels reach them through `plain`, formulas through `wide`, and what reading one costs is
`bytes_per_row`. Another encoding is another way to answer these three; who does not know it refuses
it instead of reading wrong numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from squeezed.errors import SqueezedError

PLAIN = "plain"


@dataclass(frozen=True)
class Rows:
    """A key and a value of every token and KV head.

    Attributes:
        keys, values: `[Hkv, P, D]` if they are plain.
        encoding: how the numbers are written; `plain` is one of the tensor's type per dimension.
    """

    keys: Tensor
    values: Tensor
    encoding: str = PLAIN

    @property
    def tokens(self) -> int:
        return self.keys.shape[1]

    @property
    def device(self) -> torch.device:
        """Where they lie."""
        return self.keys.device

    @property
    def bytes_per_row(self) -> int:
        """Bytes of one key with its value."""
        return sum(x[:1, :1].numel() * x.element_size() for x in self.tensors())

    def kv_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.tensors())

    def tensors(self) -> list[Tensor]:
        return [self.keys, self.values]

    def plain(self) -> tuple[Tensor, Tensor]:
        """Keys and values `[Hkv, P, D]` in place, for who reads nothing else.

        Raises:
            SqueezedError: another encoding.
        """
        if self.encoding != PLAIN:
            raise SqueezedError(
                f"rows: expected plain keys and values, got the encoding {self.encoding!r}; "
                "index the document again without it"
            )
        return self.keys, self.values

    def wide(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values `[Hkv, P, D]` as numbers of that type, in place if they are."""
        keys, values = self.plain()
        return keys.to(dtype), values.to(dtype)

    def of_heads(self, own: slice) -> Rows:
        """Those of some KV heads, as views."""
        return replace(self, keys=self.keys[own], values=self.values[own])

    def of_tokens(self, chosen: Tensor | slice) -> Rows:
        """Those of some rows, in that order."""
        return replace(self, keys=self.keys[:, chosen], values=self.values[:, chosen])

    def without(self, start: int, stop: int) -> Rows:
        """Copies of all but a run of them."""
        keys, values = (torch.cat([x[:, :start], x[:, stop:]], 1) for x in self.tensors())
        return replace(self, keys=keys, values=values)

    def to(self, device: torch.device | str) -> Rows:
        return replace(self, keys=self.keys.to(device), values=self.values.to(device))
