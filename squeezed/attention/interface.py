"""What every implementation of attention takes and returns, and how two results become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from squeezed.attention.scores import NEG_INF
from squeezed.context.layers import ClusteredLayer


@dataclass(frozen=True)
class Suffix:
    """Each request's own tokens, the user's and the generated ones: attended densely.

    Attributes:
        keys, values: `[B, Hkv, S, D]`, the queries' own tokens included. Keys are relative to the
            layer's centre: `Suffix.of` makes them so from a model's, `layer.centred` does the same.
        mask: `[B, 1, Q, S]` bool (or one for all requests), True where attended; `None` is causal:
            the queries are the last `Q` of the `S` tokens, and each sees what came before it.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | None = None

    @classmethod
    def of(
        cls, layer: ClusteredLayer, keys: Tensor, values: Tensor, mask: Tensor | None = None
    ) -> Suffix:
        """From keys and values as the model makes them."""
        return cls(layer.centred(keys), values, mask)

    @property
    def tokens(self) -> int:
        return self.keys.shape[2]

    def seen(self, rows: int) -> Tensor:
        """The mask for `rows` queries, also where it is causal."""
        return causal_mask(rows, self.tokens, self.keys.device) if self.mask is None else self.mask

    def logits(self, q: Tensor, scale: float) -> Tensor:
        """Of queries `[B, Hkv, G, Q, D]`, `[B, Hkv, G, Q, S]`; `-inf` of what they do not see."""
        found = scale * torch.einsum("bhgqd,bhsd->bhgqs", q, self.keys.to(q.dtype))
        return found.masked_fill(~self.seen(q.shape[3])[:, :, None], NEG_INF)

    def of_rows(self, first: int, last: int, rows: int) -> Suffix:
        """As the queries `[first, last)` of `rows` see it, those before and behind left out."""
        if self.mask is not None:
            return Suffix(self.keys, self.values, self.mask[:, :, first:last])
        seen = max(0, self.tokens - (rows - last))
        return Suffix(self.keys[:, :, :seen], self.values[:, :, :seen])


class Attended(NamedTuple):
    """What attention to one set of keys found.

    Attributes:
        output: `[B, Hq, Q, D]` in the dtype of the query; 0 in rows that attend to nothing.
        log_mass: `[B, Hq, Q]` float32 (float64 for queries in float64), natural logarithm of the
            softmax's denominator, the far field included; `-inf` in rows that attend to nothing.
            It is that of keys relative to the layer's centre. An engine whose keys are those of
            the model has `log_mass + layer.common_logit(query)`.
        keys_read: `[B]` int64, clustered keys that each request read, summed over KV heads and
            query tokens, without the pinned ones.
    """

    output: Tensor
    log_mass: Tensor
    keys_read: Tensor


def merge(*parts: Attended) -> Attended:
    """Attention to all keys of several disjoint sets, from attention to each of them.

    All log masses must be those of the same keys: relative to one centre, or of the model. A part
    that another engine computed is `Attended(output, its log-sum-exp, 0)`. A row of which a part
    has no key (`-inf`) is that of the others, and 0 and `-inf` where no part has any; NaN shows.
    """
    dtype = parts[0].output.dtype
    wide = torch.promote_types(dtype, torch.float32)
    masses = torch.stack([part.log_mass.to(wide) for part in parts])  # [parts, B, Hq, Q]
    peak = masses.amax(0)
    weights = (masses - peak.masked_fill(peak == NEG_INF, 0.0)).exp()
    total = weights.sum(0)
    shares = (weights / total.masked_fill(total == 0, 1.0)).masked_fill(masses == NEG_INF, 0.0)
    outputs = [
        share[..., None] * part.output.to(wide).masked_fill(mass[..., None] == NEG_INF, 0.0)
        for share, mass, part in zip(shares, masses, parts, strict=True)
    ]
    log_mass = torch.where(total == 0, NEG_INF, peak + total.log())
    read = reduce(torch.add, (part.keys_read for part in parts))
    return Attended(reduce(torch.add, outputs).to(dtype), log_mass, read)


def in_sequence(parts: Sequence[Attended]) -> Attended:
    """Results of consecutive query rows as one."""
    if len(parts) == 1:
        return parts[0]
    outputs, masses, reads = zip(*parts, strict=True)
    return Attended(torch.cat(outputs, 2), torch.cat(masses, 2), sum(reads))


def causal_mask(rows: int, suffix: int, device: torch.device) -> Tensor:
    """`[1, 1, Q, S]` bool: the last `rows` of `suffix` tokens, each seeing what came before."""
    return torch.ones(rows, suffix, dtype=torch.bool, device=device).tril(suffix - rows)[None, None]
