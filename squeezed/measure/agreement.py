"""How closely one cache's answers follow dense attention's: teacher forcing, one pass an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from squeezed.hf.cache import SqueezedCache, suffix_mask
from squeezed.hf.support import input_device
from squeezed.hf.switch import using_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Agreement:
    """Of the next-token distributions with dense attention's, over the tokens of one answer.

    Attributes:
        identical: share of the answer's tokens that this attention would choose greedily too. Of
            its own answer dense itself can miss one: computed together instead of one by one, near
            ties flip.
        kl: mean Kullback-Leibler divergence from dense, nats.
        top1: share of the places at which both find the same token likeliest.
        nll: mean negative log-likelihood of the answer's tokens, nats.
        tokens: how many were compared.
    """

    identical: float
    kl: float
    top1: float
    nll: float
    tokens: int

    def scores(self) -> dict[str, float]:
        """Numbers of which means are taken; `exact` is 1 if greedy decoding would begin with the
        answer: generation's verdict from one forward pass."""
        exact = float(self.identical == 1.0)
        return {"kl": self.kl, "top1": self.top1, "nll": self.nll, "exact": exact}


def compare(ours: Tensor, dense: Tensor, answer: Tensor) -> Agreement:
    """Agreement of `ours` with `dense`, logits `[T, V]` along an answer `[T]`."""
    log_ours, log_dense = ours.log_softmax(-1), dense.log_softmax(-1)
    divergence = (log_dense.exp() * (log_dense - log_ours)).sum(-1)
    answer, chosen = answer.to(ours.device), ours.argmax(-1)
    return Agreement(
        identical=float((chosen == answer).float().mean()),
        kl=float(divergence.mean()),
        top1=float((chosen == dense.argmax(-1)).float().mean()),
        nll=float(-log_ours.gather(1, answer[:, None]).mean()),
        tokens=len(ours),
    )


@torch.inference_mode()
def forced_logits(
    model: PreTrainedModel, cache: SqueezedCache, parts: list[tuple[Tensor, Tensor]]
) -> list[Tensor]:
    """Logits of every answer token given the true tokens before it, `[T, V]` float32 per question.

    The question selects as in `generate()`; answer tokens select alone, as in decoding. One forward
    pass each. Shorter answers are filled up on the right with masked tokens, which attend to
    nothing and are not measured.

    Args:
        cache: with what stands before the questions.
        parts: ids of each question `[S]` and of its answer `[T]`, `T >= 1`.
    """
    before, (questions, answers) = cache.get_seq_length(), zip(*parts, strict=True)
    pairs = zip(left_padded(questions), _followed(answers), strict=True)
    ids, mask = (torch.cat(pair, 1).to(input_device(model)) for pair in pairs)
    positions = (before + mask.cumsum(1) - 1).clamp(min=0)

    def read(part: slice, keep: int) -> Tensor:
        return model(
            input_ids=ids[:, part],
            attention_mask=suffix_mask(before, mask[:, : part.stop]),
            position_ids=positions[:, part],
            past_key_values=cache,
            logits_to_keep=keep,
        ).logits

    split, last = max(map(len, questions)), ids.shape[1] - 1
    with using_attention(model):
        logits = [read(slice(0, split), 1)]
        if last > split:
            cache.select_per_token()
            logits.append(read(slice(split, last), last - split))
    joined = torch.cat(logits, 1)
    return [joined[i, : len(answer)].float() for i, answer in enumerate(answers)]


def _followed(answers: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """`[B, T]` ids that begin together, and which of them something follows in their answer."""
    ids = torch.zeros(len(answers), max(map(len, answers)), dtype=torch.long)
    given = torch.zeros_like(ids)
    for i, answer in enumerate(answers):
        ids[i, : len(answer)] = answer
        given[i, : len(answer) - 1] = 1
    return ids, given


def left_padded(rows: Sequence[Tensor], filler: int = 0) -> tuple[Tensor, Tensor]:
    """`[B, S]` ids that end together, and their mask; what fills them up is masked."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), filler, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = row
        mask[i, width - len(row) :] = 1
    return ids, mask
