"""Questions in a batch over one fixed context: generated answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from squeezed.hf.cache import SqueezedCache, suffix_mask
from squeezed.hf.fixed_context import FixedContext
from squeezed.hf.support import input_device
from squeezed.hf.switch import using_attention
from squeezed.measure.agreement import left_padded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def filler_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """An id for padding: what it is does not matter, its place is masked."""
    for name in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0):
        if name is not None:
            return name
    return 0


@torch.inference_mode()
def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    context: FixedContext,
    cache: SqueezedCache,
    questions: list[Tensor],
    new: int,
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
