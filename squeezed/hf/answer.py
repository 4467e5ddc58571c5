"""Ids and a cache -> an answer, by Transformers' own `generate`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from squeezed.errors import SqueezedError
from squeezed.hf.arguments import ASSISTED, Wishes, passed_on
from squeezed.hf.attention import using_attention
from squeezed.hf.cache import Spending, SqueezedCache
from squeezed.hf.positions import check_room
from squeezed.hf.support import input_device


@dataclass(frozen=True)
class Answer:
    """What `generate` returns.

    Attributes:
        text: the answer, without special tokens; of several sequences the first.
        tokens: `[n]` int64, its ids; `[N, n]` if `num_return_sequences` asked for several.
        spending: budget really spent on the answer's tokens and on the question's.
        seconds: time for the question's prefill with the first token, and per further token.
        sequences: `[N, n]` int64, ids of every sequence, padded on the right.
        output: what `model.generate` returned, if `return_dict_in_generate` asked for more than
            ids; its sequences begin with the document.
    """

    text: str
    tokens: Tensor
    spending: Spending
    seconds: dict[str, float]
    sequences: Tensor
    output: Any = None


def respond(model, tokenizer, cache: SqueezedCache, ids: Tensor, **arguments) -> Answer:
    """Generate what follows the document and then `ids` `[S]`; the cache grows by what is new.

    Args:
        ids: all that follows the document. What the cache holds of it is not read again, what it
            holds beyond is dropped: an interrupted answer leaves no trace.
        arguments: as for `squeezed.generate`.

    Raises:
        SqueezedError: as `squeezed.generate` does.
    """
    wishes, clock, ids = Wishes(model, arguments), _Clock(), ids.cpu()
    wishes.refuse_unsupported()
    prompt = torch.cat([cache.document, ids])[None].to(input_device(model))
    passed = passed_on(wishes, tokenizer, prompt.shape[1], clock)
    new_tokens = wishes.new_tokens(prompt.shape[1])
    _check_suffix(cache, ids, new_tokens, wishes)
    check_room(model, len(cache.document), prompt.shape[1], new_tokens)
    cache.rewind(ids)
    if wishes.rows > 1:
        cache.batch_repeat_interleave(wishes.rows)
    output = _generate(model, cache, prompt, passed)
    whole = output if isinstance(output, Tensor) else output.sequences
    new = whole[:, prompt.shape[1] :].cpu()
    certain = wishes.rows == 1 and "custom_generate" not in arguments
    cache.remember(torch.cat([ids, new[0]]) if certain else ids)
    return Answer(
        text=tokenizer.decode(new[0], skip_special_tokens=True).strip(),
        tokens=new[0] if len(new) == 1 else new,
        spending=cache.spending(),
        seconds=clock.seconds(),
        sequences=new,
        output=None if isinstance(output, Tensor) else output,
    )


def _check_suffix(cache: SqueezedCache, ids: Tensor, new: int, wishes: Wishes) -> None:
    """Raise `SqueezedError` for no question, or more than a cache of fixed size can hold."""
    if not len(ids):
        raise SqueezedError("question: it has no tokens; ask something")
    room = cache.get_max_length() - len(cache.document)
    if room < 0:  # it grows
        return
    if any(wishes.chosen(name) is not None for name in ASSISTED):
        raise SqueezedError(
            "suffix_tokens: assisted generation needs a cache that grows; leave suffix_tokens out"
        )
    if len(ids) + new - 1 > room:
        raise SqueezedError(
            f"suffix_tokens: what follows the document may take {len(ids) + new - 1} tokens, the "
            f"cache has room for {room}; ask for fewer new tokens or make a larger cache"
        )


def _generate(model, cache: SqueezedCache, prompt: Tensor, passed: dict[str, Any]) -> Any:
    """`model.generate`, whose refusals of arguments become one line each."""
    begun: list[bool] = []
    with using_attention(model), torch.inference_mode(), _feeding_new(model, cache, prompt, begun):
        try:
            return model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                past_key_values=cache,
                **passed,
            )
        except (TypeError, ValueError, NotImplementedError) as error:
            if begun or isinstance(error, SqueezedError):
                raise
            raise SqueezedError(f"generate: {' '.join(str(error).split())}") from error


@contextmanager
def _feeding_new(model, cache: SqueezedCache, prompt: Tensor, begun: list[bool]) -> Iterator[None]:
    """Let the first pass, noted in `begun`, read only ids that the cache does not hold.

    Transformers cuts the held ids off by itself, except in assisted generation.
    """

    def cut(module, args, kwargs):
        if kwargs.get("past_key_values") is not cache:
            return None
        begun.append(True)
        handle.remove()
        if kwargs["input_ids"].shape[1] < prompt.shape[1]:
            return None
        held = int(cache.get_seq_length())
        for name in {"input_ids", "position_ids"} & kwargs.keys():
            kwargs[name] = kwargs[name][..., held:]
        return args, kwargs

    inner = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    handle = inner.register_forward_pre_hook(cut, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class _Clock:
    """A stopping criterion that never stops: it notes when tokens came, and how many there were."""

    def __init__(self) -> None:
        self.times, self.lengths = [time.perf_counter()], [0]

    def __call__(self, input_ids, scores, **kwargs):
        self.times.append(time.perf_counter())
        self.lengths.append(input_ids.shape[1])
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def seconds(self) -> dict[str, float]:
        if len(self.times) == 1:
            return {"first_token": 0.0, "per_token": 0.0}
        further = self.lengths[-1] - self.lengths[1]
        decoding = (self.times[-1] - self.times[1]) / further if further > 0 else 0.0
        return {"first_token": self.times[1] - self.times[0], "per_token": decoding}
