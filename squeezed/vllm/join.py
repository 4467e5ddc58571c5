"""Attention to a context joins what vLLM's kernel found among a request's own tokens.

Two softmaxes over different keys become one by their log masses (https://arxiv.org/abs/2501.01005,
section 2.2). Keys of a context are relative to its centre, vLLM's are not: so the context's log
mass gets what the centre adds to every logit of the query.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from squeezed.attention.interface import Attended
from squeezed.context.layers import ClusteredLayer


def join(
    found: Attended,
    layer: ClusteredLayer,
    query: Tensor,
    output: Tensor,
    own: Tensor,
    places: Tensor,
    reads: Tensor | None = None,
) -> None:
    """Put the joined answers of some tokens into `output`, and count what they read.

    Args:
        found: attention to the context of `B` rows of `Q` tokens, `B x Q = N`: `[B, Hq, Q, D]`.
        query: `[T, Hq, D]`, of all tokens of the batch.
        output: `[T, Hq, D]`, what vLLM's kernel found; written in place.
        own: `[Hq, T]` float32, its log-sum-exp.
        places: `[N]` int64, which tokens of the batch they are; -1 for one that is none.
        reads: `[B]` int64, to which `found.keys_read` is added; `None` counts nothing.
    """
    context, mass = _by_token(found.output), _by_token(found.log_mass)
    if output.device.type == "cuda":
        counted = None if reads is None else (found.keys_read, reads)
        _launch(context, mass, layer, query, output, own, places, counted)
        return
    if reads is not None:
        reads += found.keys_read
    is_one = places >= 0
    context, mass, places = context[is_one], mass[is_one], places[is_one]
    asked = query[places]
    common = layer.common_logit(asked.unsqueeze(2))[:, :, 0]
    share = torch.sigmoid(mass.float() + common - own.t()[places].float())[..., None]
    mixed = share * context.float() + (1 - share) * output[places].float()
    output[places] = mixed.to(output.dtype)


def _by_token(found: Tensor) -> Tensor:
    """`[B, Hq, Q, ...]` as `[B Q, Hq, ...]`; a copy only if there are several of both."""
    return found.transpose(1, 2).flatten(0, 1)


def _launch(
    context: Tensor,
    mass: Tensor,
    layer: ClusteredLayer,
    query: Tensor,
    output: Tensor,
    own: Tensor,
    places: Tensor,
    counted: tuple[Tensor, Tensor] | None = None,
) -> None:
    tokens, heads, dim = context.shape
    read, reads = (places, places) if counted is None else counted
    join_rows[(tokens, heads)](
        context,
        mass,
        layer.centre,
        query,
        output,
        own,
        places,
        read,
        reads,
        0 if counted is None else len(reads),
        layer.scale,
        context.stride(0),
        context.stride(1),
        mass.stride(0),
        mass.stride(1),
        query.stride(0),
        query.stride(1),
        output.stride(0),
        output.stride(1),
        own.stride(0),
        own.stride(1),
        GROUP=heads // layer.centre.shape[0],
        DIM=dim,
        BLOCK=triton.next_power_of_2(dim),
        num_warps=1,
    )


@triton.jit
def join_rows(
    context,
    mass,
    centre,
    query,
    output,
    own,
    places,
    read,
    reads,
    counted,
    scale,
    context_token,
    context_head,
    mass_token,
    mass_head,
    query_token,
    query_head,
    output_token,
    output_head,
    own_head,
    own_token,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token and query head; `[DIM]` numbers in one warp."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    place = tl.load(places + row)
    is_one, place = place >= 0, tl.maximum(place, 0)
    counts = (head == 0) & (row < counted)  # of one row there may be many tokens, but one count
    total = tl.load(reads + row, counts, 0) + tl.load(read + row, counts, 0)
    tl.store(reads + row, total, counts)
    lanes = tl.arange(0, BLOCK)
    inside = (lanes < DIM) & is_one
    asked = tl.load(query + place * query_token + head * query_head + lanes, inside, 0.0)
    shared = tl.load(centre + (head // GROUP) * DIM + lanes, inside, 0.0)
    common = scale * tl.sum(asked.to(tl.float32) * shared.to(tl.float32))
    of_context = tl.load(mass + row * mass_token + head * mass_head) + common
    of_own = tl.load(own + head * own_head + place * own_token)
    share = 1.0 / (1.0 + tl.exp(of_own - of_context))
    target = output + place * output_token + head * output_head + lanes
    mine = tl.load(target, inside, 0.0).to(tl.float32)
    its = tl.load(context + row * context_token + head * context_head + lanes, inside, 0.0)
    mixed = share * its.to(tl.float32) + (1.0 - share) * mine
    tl.store(target, mixed.to(output.dtype.element_ty), inside)
