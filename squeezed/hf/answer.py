"""Ids and a cache -> an answer, by Transformers' own `generate`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from squeezed.errors import SqueezedError
from squeezed.hf.arguments import ASSISTED, Wishes, passed_on
from squeezed.hf.asking import Asking
from squeezed.hf.cache import Spending, SqueezedCache
from squeezed.hf.clock import Clock
from squeezed.hf.positions import check_room
from squeezed.hf.support import input_device
from squeezed.hf.switch import using_attention
from squeezed.hf.watched import Watched

if TYPE_CHECKING:
    from squeezed.hf.fixed_context import FixedContext

CACHE_NAMES = ("past_key_values", "cache")
"""What Transformers calls a cache; the second from 5.24 on."""


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
        budget: share of the clustered keys that was asked for.
        watched: what `squeezed.answers` needs to say where the answer came from, if it was kept.
    """

    text: str
    tokens: Tensor
    spending: Spending
    seconds: dict[str, float]
    sequences: Tensor
    output: Any = None
    budget: float = 1.0
    watched: Watched | None = field(default=None, repr=False, compare=False)


def respond(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache: SqueezedCache,
    ids: Tensor,
    **arguments: Any,
) -> Answer:
    """Generate what follows the document and then `ids` `[S]`; the cache grows by what is new.

    Args:
        ids: all that follows the document. What the cache holds of it is not read again, what it
            holds beyond is dropped: an interrupted answer leaves no trace.
        arguments: as for `squeezed.generate`.

    Raises:
        SqueezedError: as `squeezed.generate` does.
    """
    return Request.of(model, tokenizer, cache, ids, arguments).run()


@dataclass(frozen=True)
class Request:
    """A question that can be answered: all that can be refused before the model runs was looked at.

    Attributes:
        ids: `[S]` int64, all that follows the document.
        prompt: `[1, P + S]` int64, where the model takes it.
        passed: arguments of `model.generate` besides prompt, mask and cache.
        watched_as: context and settings to note in the answer, with its queries.
    """

    model: Any
    tokenizer: Any
    cache: SqueezedCache
    ids: Tensor
    prompt: Tensor
    wishes: Wishes
    clock: Clock
    passed: dict[str, Any]
    watched_as: tuple[FixedContext, Asking] | None = None

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        cache: SqueezedCache,
        ids: Tensor,
        arguments: Mapping[str, Any],
    ) -> Request:
        """Raises `SqueezedError` as `squeezed.generate` does."""
        wishes, clock, ids = Wishes(model, arguments), Clock(), ids.cpu()
        wishes.refuse_unsupported()
        prompt = torch.cat([cache.document, ids])[None].to(input_device(model))
        passed = passed_on(wishes, tokenizer, prompt.shape[1], clock)
        new_tokens = wishes.new_tokens(prompt.shape[1])
        _check_suffix(cache, ids, new_tokens, wishes)
        check_room(model, len(cache.document), prompt.shape[1], new_tokens)
        return cls(model, tokenizer, cache, ids, prompt, wishes, clock, passed)

    def watching(self, record: FixedContext, asking: Asking) -> Request:
        """The same, whose answer says what it read; `record.cache()` made the cache so."""
        self.cache.watch_queries()
        return replace(self, watched_as=(record, asking))

    def run(self) -> Answer:
        """Answer it, once."""
        cache, wishes = self.cache, self.wishes
        self.clock.start()
        document = len(cache.document)
        cache.rewind(self.ids)
        if wishes.rows > 1:
            cache.batch_repeat_interleave(wishes.rows)
        output = self._generate()
        whole = output if isinstance(output, Tensor) else output.sequences
        new = whole[:, self.prompt.shape[1] :].cpu()
        certain = wishes.rows == 1 and "custom_generate" not in wishes.arguments
        said = torch.cat([self.ids, new[0]]) if certain else self.ids
        cache.remember(said[len(cache.document) - document :])  # some may have become part of it
        return Answer(
            text=self.tokenizer.decode(new[0], skip_special_tokens=True).strip(),
            tokens=new[0] if len(new) == 1 else new,
            spending=cache.spending(),
            seconds=self.clock.seconds(),
            sequences=new,
            output=None if isinstance(output, Tensor) else output,
            budget=cache.budget,
            watched=None if self.watched_as is None else Watched.of(*self.watched_as, cache),
        )

    def _generate(self) -> Any:
        """`model.generate`, whose refusals of arguments become one line each."""
        with using_attention(self.model), torch.inference_mode(), self._feeding_new():
            try:
                return self.model.generate(
                    input_ids=self.prompt,
                    attention_mask=torch.ones_like(self.prompt),
                    past_key_values=self.cache,
                    **self.passed,
                )
            except (TypeError, ValueError, NotImplementedError) as error:
                if self._begun or isinstance(error, SqueezedError):
                    raise
                raise SqueezedError(f"generate: {' '.join(str(error).split())}") from error

    @property
    def _begun(self) -> bool:
        """Whether the model has read something of what is new."""
        return int(self.cache.layers[0].suffix_length) > len(self.cache.known)

    @contextmanager
    def _feeding_new(self) -> Iterator[None]:
        """Let the first pass read only ids that the cache does not hold.

        Transformers cuts the held ids off by itself, except in assisted generation.
        """
        if all(self.wishes.chosen(name) is None for name in ASSISTED):
            yield
            return
        modules = self.model.modules()
        inner = next(module for module in modules if isinstance(module, PreTrainedModel))
        handle = inner.register_forward_pre_hook(self._cut, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _cut(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]] | None:
        """Other threads' passes come by here too, without `kwargs` while the hook is removed."""
        kwargs = kwargs or {}
        ids = kwargs.get("input_ids")
        held_by = (kwargs.get(name) for name in CACHE_NAMES)
        if ids is None or not any(cache is self.cache for cache in held_by) or self._begun:
            return None
        if ids.shape[1] >= self.prompt.shape[1]:
            held = int(self.cache.get_seq_length())
            for name in {"input_ids", "position_ids"} & kwargs.keys():
                kwargs[name] = kwargs[name][..., held:]
        return args, kwargs


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
