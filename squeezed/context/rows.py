"""Keys and values of a layer as they lie in memory: their encoding, their type and their place.

Kernels reach plain ones through `plain` and encoded ones through `codes`, and what reading one
costs is `bytes_per_row`. Who does not know an encoding refuses it instead of reading wrong numbers.
What codes mean says `squeezed.context.encoding`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from squeezed.errors import SqueezedError

PLAIN: Literal["plain"] = "plain"


@dataclass(frozen=True)
class Codes:
    """Differences of the clustered rows from the means of their leaves, `n` of them per KV head.

    Attributes:
        keys, values: `[Hkv, n, D / 2]` uint8 or `[Hkv, n, D]` int8, as the encoding has them.
        scales: `[Hkv, n, 2]` bfloat16, what a level of the key's and of the value's codes is worth:
            side by side, since a GPU copies no fewer than 4 bytes in the background.
        key_turn: `[Hkv, D, D]` in the layer's dtype: a key's difference from its leaf's mean is
            `key_scale * key_turn @ level`, so a query `q` sees it as `q @ key_turn`.
        value_turn: `[Hkv, D, D]` in the layer's dtype: a value's is
            `value_scale * level @ value_turn`.
    """

    keys: Tensor
    values: Tensor
    scales: Tensor
    key_turn: Tensor
    value_turn: Tensor

    @property
    def key_scales(self) -> Tensor:
        """`[Hkv, n]`."""
        return self.scales[..., 0]

    @property
    def value_scales(self) -> Tensor:
        """`[Hkv, n]`."""
        return self.scales[..., 1]

    @property
    def tokens(self) -> int:
        return self.keys.shape[1]

    def named(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def of_rows(self) -> dict[str, Tensor]:
        """Those that have an entry for every row."""
        return {"keys": self.keys, "values": self.values, "scales": self.scales}

    def of_heads(self, own: slice | int) -> Codes:
        """Those of some KV heads, or of one without a dimension for it."""
        return Codes(**{name: tensor[own] for name, tensor in self.named().items()})

    def to(self, device: torch.device | str) -> Codes:
        return Codes(**{name: tensor.to(device) for name, tensor in self.named().items()})


@dataclass(frozen=True)
class Rows:
    """A key and a value of every token and KV head.

    Attributes:
        keys, values: `[Hkv, P, D]` if they are plain; of encoded rows only the pinned ones,
            `[Hkv, pinned, D]`.
        encoding: how the numbers are written; `plain` is one of the tensor's type per dimension.
        codes: of the rows behind the pinned ones, if they are encoded.
    """

    keys: Tensor
    values: Tensor
    encoding: str = PLAIN
    codes: Codes | None = None

    @property
    def tokens(self) -> int:
        return self.keys.shape[1] + (0 if self.codes is None else self.codes.tokens)

    @property
    def device(self) -> torch.device:
        """Where they lie."""
        return self.keys.device

    @property
    def bytes_per_row(self) -> int:
        """Bytes of one key with its value, of a clustered row."""
        return sum(x[:1, :1].numel() * x.element_size() for x in self._clustered())

    def kv_bytes(self) -> int:
        """Bytes of keys and values, codes and scales included."""
        front = [] if self.codes is None else [self.keys, self.values]
        return sum(x.numel() * x.element_size() for x in (*front, *self._clustered()))

    def _clustered(self) -> list[Tensor]:
        if self.codes is None:
            return [self.keys, self.values]
        return list(self.codes.of_rows().values())

    def tensors(self) -> list[Tensor]:
        codes = [] if self.codes is None else self.codes.named().values()
        return [self.keys, self.values, *codes]

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
        """Keys and values `[Hkv, P, D]` as numbers of that type, in place if they are.

        Encoded rows need their leaves besides: `ClusteredLayer.wide`.
        """
        keys, values = self.plain()
        return keys.to(dtype), values.to(dtype)

    def of_heads(self, own: slice) -> Rows:
        """Those of some KV heads, as views."""
        codes = None if self.codes is None else self.codes.of_heads(own)
        return replace(self, keys=self.keys[own], values=self.values[own], codes=codes)

    def of_tokens(self, chosen: Tensor | slice) -> Rows:
        """Those of some rows, in that order."""
        keys, values = self.plain()
        return replace(self, keys=keys[:, chosen], values=values[:, chosen])

    def without(self, start: int, stop: int) -> Rows:
        """Copies of all but a run of them; of encoded rows a run of pinned ones."""
        assert self.codes is None or stop <= self.keys.shape[1]
        keys, values = (torch.cat([x[:, :start], x[:, stop:]], 1) for x in (self.keys, self.values))
        return replace(self, keys=keys, values=values)

    def to(self, device: torch.device | str) -> Rows:
        codes = None if self.codes is None else self.codes.to(device)
        return replace(self, keys=self.keys.to(device), values=self.values.to(device), codes=codes)
