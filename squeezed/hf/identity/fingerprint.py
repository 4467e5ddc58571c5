"""Fingerprint of a model: does this context belong to it?

Two parts. Sketches of every weight, buffer and adapter of the decoder (`entries.py`), which tell
any edit from a change of type; and the keys and values of a few tokens (`behaviour.py`), which tell
what sketches cannot see. Neither is a hash of files, of a configuration or of names: the same
weights saved again, in another place, on other devices, with another id for padding, are the same.
"""

from __future__ import annotations

import hashlib
import json
import re
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

from squeezed.context.record import ContextRecord
from squeezed.errors import ContextFileError
from squeezed.hf.identity.behaviour import PROJECTIONS as PROJECTED
from squeezed.hf.identity.behaviour import Behaviour, observe, spread_ids
from squeezed.hf.identity.entries import EXACT, entry_of, numbers_of, sameness, text_of
from squeezed.hf.identity.state import model_state
from squeezed.hf.identity.stored import check_stored
from squeezed.hf.identity.weights import (
    BUFFER,
    PACKED,
    decoder_of,
    follows_length,
    modules_in_use,
    parts,
)
from squeezed.hf.support import layer_kinds
from squeezed.system.forks import Turns

LARGE = 1 << 22
"""Weights from which a model is run again only if something says that it changed."""

_behaved: WeakKeyDictionary = WeakKeyDictionary()
_agreed: WeakKeyDictionary = WeakKeyDictionary()
_ONE_CHECK = Turns()
"""Held while a model is looked at: what it remembers of the last look is one for all threads."""


def model_fingerprint(model: PreTrainedModel, like: dict | None = None) -> dict:
    """What tells `model` from others, as a record that JSON can hold.

    Args:
        like: a fingerprint to compare with: what it does not have is not computed, the tokens
            tried are the same, and rows that were appended to an embedding are left out.

    Returns:
        `weights`: sketches by name; `numbers`: digests of what modules hold besides tensors, such
        as a norm's epsilon; `partial`: whether some weights could not be read; `packed`: whether
        some are stored in fewer bits; `behaviour`: keys and values of a few tokens, `None` where
        weights lie elsewhere.

    Raises:
        UnsupportedModelError: an adapter puts virtual tokens before the prompt.
    """
    with _ONE_CHECK:
        return _fingerprint(model, decoder_of(model), like)


def _fingerprint(model: PreTrainedModel, decoder: PreTrainedModel, like: dict | None) -> dict:
    behaviour = _behaviour(model, decoder, like)  # first: adapters settle what they merge
    found = list(parts(decoder))
    known = (like or {}).get("weights", {})
    return {
        "weights": {
            part.name: entry_of(part, known.get(part.name) if like else None)
            for part in found
            if part.tensor is not None
        },
        "numbers": _numbers(decoder),
        "partial": any(part.tensor is None or part.kind == PACKED for part in found),
        "packed": any(part.kind == PACKED for part in found),
        "behaviour": behaviour,
    }


def same_model(one: dict, other: dict) -> bool:
    """Whether two fingerprints are of one model."""
    return difference(one, other) is None


def difference(one: dict, other: dict) -> str | None:
    """What differs between two fingerprints, in a few words; `None` if nothing does."""
    mine, its = one["weights"], other["weights"]
    lone = mine.keys() ^ its.keys()
    if not (one["partial"] or other["partial"]):
        for name in sorted(lone):
            if (mine.get(name) or its[name])[0] != BUFFER:  # those come and go with releases
                return f"only one of the two has {name}"
    exact = True
    for name in sorted(mine.keys() & its.keys()):
        same = sameness(mine[name], its[name])
        if not same:
            return f"{name} differs"
        exact &= same == EXACT
    return _other_number(one["numbers"], other["numbers"]) or _other_behaviour(
        one["behaviour"], other["behaviour"], exact, one["packed"] or other["packed"]
    )


def _other_number(mine: dict, its: dict) -> str | None:
    differ = [name for name in sorted(mine.keys() & its.keys()) if mine[name] != its[name]]
    return f"{differ[0]} differs" if differ else None


def _other_behaviour(one: dict | None, other: dict | None, exact: bool, packed: bool) -> str | None:
    if not one or not other:
        return None
    mine, its = _behaviour_of(one), _behaviour_of(other)
    if len(mine.projected) != len(its.projected):
        return f"{len(mine.projected)} layers, not {len(its.projected)}"
    return None if mine.is_near(its, exact, packed) else "keys and values differ"


def check_model(model: PreTrainedModel, context: ContextRecord) -> None:
    """Raise `ContextFileError` unless `model`, as it is now, made this context.

    Weights, adapters and frequencies are looked at again at every call, but for large ones only
    where something says that they changed.
    """
    windows = tuple(kind.sliding_window for kind in layer_kinds(model))
    if len(windows) != len(context.windows):
        raise another_model(f"{len(context.windows)} layers, not {len(windows)}")
    if windows != tuple(context.windows):
        raise another_model("its sliding windows differ")
    _check_vocabulary(model, context)
    with _ONE_CHECK:
        _check_weights(model, decoder_of(model), context.model)


def _check_vocabulary(model: PreTrainedModel, context: ContextRecord) -> None:
    """Raise for a token that the model does not know: some ways of sampling look it up."""
    known = len(model.get_input_embeddings().weight)
    highest = int(context.tokens.max()) if len(context.tokens) else 0
    if highest >= known:
        raise another_model(f"token {highest} in a vocabulary of {known}")


def _check_weights(model: PreTrainedModel, decoder: PreTrainedModel, made: dict) -> None:
    """Raise unless `made` is the model's fingerprint; large models remember which ones are."""
    looked_at = model_state(decoder) if _is_large(decoder) else None
    state, agreed = _agreed.get(decoder, (None, []))
    if looked_at is None or state != looked_at:
        agreed = []
    if any(each is made or each == made for each in agreed):
        return
    check_stored(made)
    what = difference(model_fingerprint(model, like=made), made)
    if what:
        raise another_model(what)
    if looked_at:
        _agreed[decoder] = (looked_at, [*agreed, made])


def check_attention(fingerprint: dict, layer: int, module: nn.Module) -> None:
    """Raise `ContextFileError` unless the attention module of a layer is the one that made it.

    The fingerprint is one that `check_stored` accepts. This is for the place where nothing but the
    module is at hand, `model.generate()` over a cache. It says nothing about other modules than
    attention, which `check_model` looks at.
    """
    named = ((_IN_LAYER.fullmatch(name), made) for name, made in fingerprint["weights"].items())
    layers = [(int(match[1]), match[2], made) for match, made in named if match]
    known: dict[str, list] = {}  # attention and MLP may have a part of one name
    for place, name, made in layers:
        if place == layer:
            known.setdefault(name, []).append(made)
    count = getattr(getattr(module, "config", None), "num_hidden_layers", None)
    made_of = 1 + max((place for place, _, _ in layers), default=-1)
    what = None
    if layers and count is not None and count != made_of:
        what = f"{made_of} layers, not {count}"
    for part in parts(module):
        made = known.get(part.name) if part.tensor is not None else None
        if made and not any(sameness(entry_of(part, one), one) for one in made):
            what = what or f"{part.name} of layer {layer} differs"
    if what:
        raise another_model(what)


_IN_LAYER = re.compile(r"(?:.*?\.)?(\d{1,6})\.[a-z_]+\.(.+)")
"""A weight's name: the number of its layer, a module of the layer, the name in that module."""


def another_model(what: str) -> ContextFileError:
    """The error for a context of another model, of which `what` says how it differs."""
    return ContextFileError(
        f"model: this context was made by another model ({what}); use that model, with the "
        "adapters it had, or index the document again with this one"
    )


def _behaviour(model: PreTrainedModel, decoder: PreTrainedModel, like: dict | None) -> dict | None:
    """Keys and values of a few tokens; kept for a large model while nothing about it changes."""
    if (like and not like["behaviour"]) or any(p.is_meta for p in decoder.parameters()):
        return None
    vocabulary = len(decoder.get_input_embeddings().weight)
    ids = tuple(like["behaviour"]["ids"]) if like else spread_ids(vocabulary)
    wanted = (ids, model_state(decoder)) if _is_large(decoder) else None
    kept = _behaved.get(decoder)
    if not wanted or not kept or kept[0] != wanted:
        if max(ids) >= vocabulary:
            return None  # an embedding that was cut: its sketch tells
        kept = wanted, observe(model, decoder, ids)
        _behaved[decoder] = kept
    seen = kept[1]
    return {"ids": list(ids), "dtype": seen.dtype, "projected": text_of(seen.projected)}


def _is_large(decoder: nn.Module) -> bool:
    return sum(weight.numel() for weight in decoder.parameters()) >= LARGE


def _behaviour_of(record: dict) -> Behaviour:
    projected = numbers_of(record["projected"]).reshape(-1, 2, len(record["ids"]), PROJECTED)
    return Behaviour(tuple(record["ids"]), record["dtype"], projected)


def _numbers(decoder: nn.Module) -> dict[str, str]:
    """Digests of what modules hold besides tensors, by its name: a norm's epsilon, a scale."""
    found: dict[str, list] = {}
    for module in modules_in_use(decoder):
        for name, value in vars(module).items():
            if isinstance(value, float) and "drop" not in name and name != "p":
                found.setdefault(name, []).append(value)
        if follows_length(module):
            rope = getattr(module.config, "rope_parameters", None) or {}
            for name in ("short_factor", "long_factor", "original_max_position_embeddings"):
                found.setdefault(name, []).append(rope.get(name))
    return {name: _digest(values) for name, values in found.items()}


def _digest(values: list) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]
