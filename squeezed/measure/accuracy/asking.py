"""Questions in a batch over one fixed context: generated answers, and teacher-forced ones."""

from __future__ import annotations

import torch
from torch import Tensor

from squeezed.context.layers import WindowLayer
from squeezed.hf.build import build_cache
from squeezed.hf.cache import SqueezedCache, suffix_mask
from squeezed.hf.fixed_context import FixedContext
from squeezed.hf.support import input_device
from squeezed.hf.switch import using_attention
from squeezed.measure.accuracy.meter import Meter
from squeezed.methods.base import ContextAttention


def metered_cache(
    context: FixedContext, attentions: list[ContextAttention], meter: Meter, budget: float
) -> SqueezedCache:
    """A new cache whose full-attention layers report to `meter`."""
    metered = iter(meter.wrap(attentions))
    layers = [
        layer if isinstance(layer, WindowLayer) else next(metered) for layer in context.layers
    ]
    return build_cache(layers, budget, context.tokens)


def left_padded(rows: list[Tensor], filler: int) -> tuple[Tensor, Tensor]:
    """`[B, S]` ids that end together, and their mask."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), filler, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = row
        mask[i, width - len(row) :] = 1
    return ids, mask


def filler_id(tokenizer) -> int:
    """An id for padding: what it is does not matter, its place is masked."""
    for name in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0):
        if name is not None:
            return name
    return 0


@torch.inference_mode()
def generate_answers(
    model, tokenizer, context: FixedContext, cache: SqueezedCache, questions: list[Tensor], new: int
) -> list[str]:
    """Greedy answers to question ids, as `squeezed.generate` would give them one by one."""
    ids, mask = left_padded(questions, filler_id(tokenizer))
    ids, mask = (x.to(input_device(model)) for x in (ids, mask))
    with using_attention(model):
        output = model.generate(
            input_ids=ids,
            attention_mask=suffix_mask(len(context.tokens), mask),
            past_key_values=cache,
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=filler_id(tokenizer),
        )
    return tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)


@torch.inference_mode()
def forced_logits(
    model,
    tokenizer,
    context: FixedContext,
    cache: SqueezedCache,
    parts: list[tuple[Tensor, Tensor]],
) -> list[Tensor]:
    """Logits of every answer token given the true tokens before it, `[T, V]` float32 per question.

    The question selects as in `generate()`; answer tokens select alone, as in decoding. One forward
    pass each. Shorter answers are filled up on the right with masked tokens, which attend to
    nothing and are not measured.

    Args:
        parts: ids of each question `[S]` and of its answer `[T]`, `T >= 1`.
    """
    filler = filler_id(tokenizer)
    device = input_device(model)
    ids, mask = (x.to(device) for x in left_padded([q for q, _ in parts], filler))
    width = max(len(answer) for _, answer in parts)
    answers = torch.full((len(parts), width), filler)
    given = torch.zeros_like(answers)
    for i, (_, answer) in enumerate(parts):
        answers[i, : len(answer)] = answer
        given[i, : len(answer) - 1] = 1  # nothing follows an answer's last token
    answers, given = answers.to(device), given.to(device)
    everything = torch.cat([mask, given], 1)
    positions = (len(context.tokens) + everything.cumsum(1) - 1).clamp(min=0)
    split = ids.shape[1]
    with using_attention(model):
        logits = [
            model(
                input_ids=ids,
                attention_mask=suffix_mask(len(context.tokens), mask),
                position_ids=positions[:, :split],
                past_key_values=cache,
                logits_to_keep=1,
            ).logits
        ]
        if width > 1:
            cache.select_per_token()
            logits.append(
                model(
                    input_ids=answers[:, :-1],
                    attention_mask=suffix_mask(len(context.tokens), everything[:, :-1]),
                    position_ids=positions[:, split:-1],
                    past_key_values=cache,
                ).logits
            )
    joined = torch.cat(logits, 1)
    return [joined[i, : len(answer)].float() for i, (_, answer) in enumerate(parts)]


def compare(logits: Tensor, dense: Tensor, answer: Tensor) -> dict[str, float]:
    """KL divergence from dense, top-1 agreement and NLL in nats, means over `[T, V]` logits.

    `exact` is 1 if every answer token is the likeliest, so that greedy decoding would begin with
    the answer: generation's verdict from one forward pass.
    """
    ours, theirs = logits.log_softmax(-1), dense.log_softmax(-1)
    divergence = (theirs.exp() * (theirs - ours)).sum(-1)
    answer = answer.to(ours.device)
    return {
        "kl": float(divergence.mean()),
        "top1": float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
        "nll": float(-ours.gather(1, answer[:, None]).mean()),
        "exact": float((ours.argmax(-1) == answer).all()),
    }
