"""What a caller may pass on to `model.generate`: defaults for what nobody chose, and refusals."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from squeezed.config import DEFAULT_NEW_TOKENS
from squeezed.errors import SqueezedError, expect, got, whole

MADE_HERE = (
    "inputs",
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "cache_position",
    "token_type_ids",
    "past_key_values",
    "cache",
    "tokenizer",
)
"""Arguments of `generate` that context, question and cache decide."""

UNSUPPORTED = {
    "cache_implementation": "the context brings its own cache",
    "token_healing": "it rewrites the prompt, which is fixed",
    "output_attentions": "no attention weights are kept; squeezed.answers.sources has their place",
    "penalty_alpha": "contrastive search copies and splits the cache",
    "dola_layers": "it contrasts layers by code outside of Transformers",
    "num_beam_groups": "group beam search is code outside of Transformers",
    "diversity_penalty": "group beam search is code outside of Transformers",
    "constraints": "constrained beam search is code outside of Transformers",
    "force_words_ids": "constrained beam search is code outside of Transformers",
    "use_mtp": "multi-token prediction needs a cache of its own",
    "speculation_type": "such assistants read the cache of the model",
}
"""Arguments that change nothing while they are off, and cannot be honoured otherwise."""

SAMPLING = (
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)

NUMBERS = {
    "max_new_tokens": (Integral, "a whole number"),
    "min_new_tokens": (Integral, "a whole number"),
    "max_length": (Integral, "a whole number"),
    "min_length": (Integral, "a whole number"),
    "num_beams": (Integral, "a whole number"),
    "num_return_sequences": (Integral, "a whole number"),
    "no_repeat_ngram_size": (Integral, "a whole number"),
    "prompt_lookup_num_tokens": (Integral, "a whole number"),
    "assistant_early_exit": (Integral, "a whole number"),
    "top_k": (Integral, "a whole number"),
    "max_time": (Real, "seconds"),
    "temperature": (Real, "a number"),
    "top_p": (Real, "a number"),
    "min_p": (Real, "a number"),
    "repetition_penalty": (Real, "a number"),
    "length_penalty": (Real, "a number"),
    "guidance_scale": (Real, "a number"),
}
AT_LEAST_ONE = ("num_beams", "num_return_sequences")

METHODS = {
    "streamer": (("put",), "a streamer, with put(tokens), and end() if it is to know the end"),
    "assistant_model": (("config", "generate"), "a Transformers model"),
}

FUNCTIONS = ("stopping_criteria", "logits_processor", "prefix_allowed_tokens_fn")
"""One function, or several; Transformers calls them at every token."""

ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")


class Wishes:
    """Arguments of one call: its own, then its `generation_config`'s, then the checkpoint's."""

    def __init__(self, model: PreTrainedModel, arguments: Mapping[str, Any]) -> None:
        self.arguments = {name: x for name, x in arguments.items() if x is not None}
        self.config = self.arguments.pop("generation_config", None)
        self.checkpoint = model.generation_config
        if self.config is not None and not isinstance(self.config, GenerationConfig):
            raise SqueezedError(
                "generation_config: expected a transformers.GenerationConfig, got "
                f"{type(self.config).__name__}"
            )

    def own(self, name: str) -> Any:
        """What the caller chose, or `None`."""
        return self.arguments.get(name, getattr(self.config, name, None))

    def chosen(self, name: str) -> Any:
        """What the caller or the checkpoint chose, or `None`."""
        own = self.own(name)
        return getattr(self.checkpoint, name, None) if own is None else own

    @property
    def rows(self) -> int:
        """Rows of the batch that one prompt becomes."""
        return max(self.chosen("num_beams") or 1, self.chosen("num_return_sequences") or 1)

    def new_tokens(self, prompt_tokens: int) -> int:
        """Tokens that may be written at most."""
        if (new := self.chosen("max_new_tokens")) is not None:
            return new
        if (longest := self.own("max_length")) is not None:
            return longest - prompt_tokens
        longest = self.checkpoint.max_length or 0
        return longest - prompt_tokens if longest > prompt_tokens else DEFAULT_NEW_TOKENS

    @property
    def end_tokens(self) -> set[int]:
        """Ids that end an answer."""
        ends = self.chosen("eos_token_id")
        if isinstance(ends, Tensor):
            ends = ends.flatten().tolist()
        return set(ends) if isinstance(ends, Iterable) else {ends} - {None}

    def refuse_unsupported(self) -> None:
        """Raise `SqueezedError` with the first argument that cannot be honoured."""
        for name in self.arguments:
            if name in MADE_HERE or name.startswith(("encoder_outputs", "decoder_input")):
                raise SqueezedError(
                    f"{name}: context, question and tokenizer decide it here; leave it out, or "
                    "call model.generate with context.cache() yourself"
                )
        check_kinds(self.arguments)
        if self.arguments.get("use_cache") is False:
            raise SqueezedError("use_cache: the context is a cache; leave it out or pass True")
        if isinstance(self.arguments.get("custom_generate"), str):
            raise SqueezedError("custom_generate: expected a function, got a name")
        for name, reason in UNSUPPORTED.items():
            value = self.arguments.get(name)
            if value is None and name != "cache_implementation":
                value = getattr(self.config, name, None)
            if not is_off(name, value):
                raise SqueezedError(f"{name}: {reason}; leave it out, got {short(value)}")


def check_kinds(arguments: Mapping[str, Any]) -> None:
    """Raise `SqueezedError` for an argument that Transformers would trip over while it works."""
    for name in NUMBERS.keys() & arguments.keys():
        kind, wanted = NUMBERS[name]
        value = expect(name, arguments[name], kind, wanted)
        if name in AT_LEAST_ONE:
            whole(name, value, 1)
    for name in METHODS.keys() & arguments.keys():
        parts, wanted = METHODS[name]
        if not all(hasattr(arguments[name], part) for part in parts):
            raise SqueezedError(f"{name}: expected {wanted}, got {got(arguments[name])}")
    for name in FUNCTIONS:
        given = arguments.get(name, [])
        for function in given if isinstance(given, Iterable) else [given]:
            if not callable(function):
                raise SqueezedError(f"{name}: expected functions, got {got(function)}")
    if arguments.get("synced_gpus") and not torch.distributed.is_initialized():
        raise SqueezedError("synced_gpus: no process group is initialised; leave it out")


def is_off(name: str, value: Any) -> bool:
    if name == "num_beam_groups" and value == 1:
        return True
    return value is None or (isinstance(value, (bool, int, float)) and not value)


def short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


class Endless:
    """A streamer that need not know the end: Transformers asks for `end()` when all is done."""

    def __init__(self, streamer: Any) -> None:
        self.put = streamer.put

    def end(self) -> None:
        pass


def passed_on(
    wishes: Wishes, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int, clock: Any
) -> dict[str, Any]:
    """Arguments for `model.generate` besides ids, mask and cache.

    Greedy, and `DEFAULT_NEW_TOKENS` long, unless chosen otherwise. A checkpoint's wish to sample
    is followed only if the call asks for sampling in any way; its `max_length` if it leaves room.
    """
    defaults: dict[str, Any] = {"use_cache": True}
    if all(wishes.own(name) is None for name in SAMPLING):
        defaults["do_sample"] = False
    if wishes.own("max_length") is None and wishes.chosen("max_new_tokens") is None:
        defaults["max_new_tokens"] = wishes.new_tokens(prompt_tokens)
    found = dict(wishes.arguments)
    if wishes.config is None:
        found |= defaults
    else:
        found["generation_config"] = copy.deepcopy(wishes.config)
        found["generation_config"].update(**defaults)
    if wishes.chosen("cache_implementation") is not None:
        found["cache_implementation"] = None
    if wishes.chosen("stop_strings") is not None or "assistant_tokenizer" in found:
        found["tokenizer"] = tokenizer
    if (streamer := found.get("streamer")) is not None and not hasattr(streamer, "end"):
        found["streamer"] = Endless(streamer)
    for name, extra in (("stopping_criteria", [clock]), ("logits_processor", [])):
        given = found.get(name, [])
        found[name] = [*(given if isinstance(given, Iterable) else [given]), *extra]
    return found
