"""How closely one cache's answers follow another's: teacher forcing on the dense answer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from squeezed.hf.cache import SqueezedCache, suffix_mask
from squeezed.hf.support import input_device
from squeezed.hf.switch import using_attention


@dataclass(frozen=True)
class Agreement:
    """Of the next-token distributions with dense attention's, over the tokens of one answer.

    Attributes:
        identical: share of the dense answer's tokens that this attention would choose greedily too.
            Dense itself can miss one: computed together instead of one by one, near ties flip.
        kl: mean Kullback-Leibler divergence from dense, nats.
        tokens: how many were compared.
    """

    identical: float
    kl: float
    tokens: int


def next_token_logits(model, cache: SqueezedCache, question: Tensor, answer: Tensor) -> Tensor:
    """Logits `[n, V]` float32 for every token of `answer [n]`, after `question [S]`.

    Every answer token selects alone, as in decoding.
    """
    with using_attention(model), torch.inference_mode():
        rows = [_forward(model, cache, question)[-1:]]
        if len(answer) > 1:
            cache.select_per_token()
            rows.append(_forward(model, cache, answer[:-1]))
    return torch.cat(rows).float()


def _forward(model, cache: SqueezedCache, ids: Tensor) -> Tensor:
    ids = ids[None].to(input_device(model))
    mask = suffix_mask(cache.get_seq_length(), torch.ones_like(ids))
    return model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits[0]


def compare(dense: Tensor, other: Tensor, answer: Tensor) -> Agreement:
    """Agreement of `other` with `dense`, logits `[n, V]` along the dense answer `[n]`."""
    log_dense, log_other = dense.log_softmax(-1), other.log_softmax(-1)
    kl = (log_dense.exp() * (log_dense - log_other)).sum(-1)
    same = other.argmax(-1) == answer.to(other.device)
    return Agreement(float(same.float().mean()), float(kl.mean()), len(dense))
