"""Fingerprint of a model: does this context belong to it?

Two parts. Sketches of every weight, buffer and adapter of the decoder (`weights.py`), which tell
any edit from a change of type; and the keys and values of a few tokens (`behaviour.py`), which tell
what sketches cannot see. Neither is a hash of files, of a configuration or of names: the same
weights saved again, in another place, on other devices, with another id for padding, are the same.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from threading import RLock
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from squeezed.context.record import ContextRecord
from squeezed.errors import ContextFileError
from squeezed.hf.identity.behaviour import PROJECTIONS as PROJECTED
from squeezed.hf.identity.behaviour import Behaviour, observe, spread_ids
from squeezed.hf.identity.sketch import BASE, PROJECTIONS, ROUNDINGS, Sketch, type_name
from squeezed.hf.identity.weights import (
    ADAPTED,
    BUFFER,
    MEASURED,
    PACKED,
    Part,
    decoder_of,
    follows_length,
    model_state,
    modules_in_use,
    parts,
    sketched,
)
from squeezed.hf.support import layer_kinds

LARGE = 1 << 22
"""Weights from which a model is run again only if something says that it changed."""

_behaved: WeakKeyDictionary = WeakKeyDictionary()
_agreed: WeakKeyDictionary = WeakKeyDictionary()
_ONE_CHECK = RLock()
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
            part.name: _entry(part, known.get(part.name) if like else None)
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
        same = _sameness(mine[name], its[name])
        if not same:
            return f"{name} differs"
        exact &= same == EXACT
    return _other_number(one["numbers"], other["numbers"]) or _other_behaviour(
        one["behaviour"], other["behaviour"], exact, one["packed"] or other["packed"]
    )


EXACT, ROUNDED = "exact", "rounded"


def _sameness(one: list, other: list) -> str | None:
    """`EXACT` for equal weights, `ROUNDED` for equal ones stored otherwise, else `None`."""
    kinds, types = {one[0], other[0]}, {one[1], other[1]}
    if PACKED in kinds and len(kinds) > 1:
        return ROUNDED  # only one side is quantised: behaviour decides
    mine, its = _sketch(one), _sketch(other)
    if mine.equals(its):
        return EXACT
    if mine.rounds_to(its):
        return ROUNDED
    # where rounding to 16 bits may part equal weights in a way that no sketch foresaw
    unforeseen = len(kinds) > 1 or MEASURED in kinds or (ADAPTED in kinds and len(types) > 1)
    if not unforeseen or types.isdisjoint(("bfloat16", "float16")):
        return None
    if mine.adds_to(its) or its.adds_to(mine):
        return None
    slack = 3 if MEASURED in kinds else 1  # products were rounded too, twice
    return ROUNDED if mine.is_near(its, slack) else None


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
        raise _another_model(f"{len(context.windows)} layers, not {len(windows)}")
    if windows != tuple(context.windows):
        raise _another_model("its sliding windows differ")
    with _ONE_CHECK:
        _check_weights(model, decoder_of(model), context.model)


def _check_weights(model: PreTrainedModel, decoder: PreTrainedModel, made: dict) -> None:
    """Raise unless `made` is the model's fingerprint; large models remember which ones are."""
    looked_at = model_state(decoder) if _is_large(decoder) else None
    state, agreed = _agreed.get(decoder, (None, []))
    if looked_at is None or state != looked_at:
        agreed = []
    if any(each is made or each == made for each in agreed):
        return
    what = difference(model_fingerprint(model, like=made), made)
    if what:
        raise _another_model(what)
    if looked_at:
        _agreed[decoder] = (looked_at, [*agreed, made])


def check_attention(fingerprint: dict, layer: int, module: nn.Module) -> None:
    """Raise `ContextFileError` unless the attention module of a layer is the one that made it.

    For the place where nothing but the module is at hand: `model.generate()` over a cache. It says
    nothing about other modules than attention, which `check_model` looks at.
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
        if made and not any(_sameness(_entry(part, one), one) for one in made):
            what = what or f"{part.name} of layer {layer} differs"
    if what:
        raise _another_model(what)


_IN_LAYER = re.compile(r"(?:.*?\.)?(\d+)\.[a-z_]+\.(.+)")
"""A weight's name: the number of its layer, a module of the layer, the name in that module."""


def _another_model(what: str) -> ContextFileError:
    return ContextFileError(
        f"model: this context was made by another model ({what}); use that model, with the "
        "adapters it had, or index the document again with this one"
    )


def _entry(part: Part, known: list | None) -> list:
    """`[kind, dtype, rows, own, rounded]`; roundings only where `known` is met by nothing else."""
    assert part.tensor is not None
    rows = len(part.tensor) if part.tensor.dim() else 1
    if known is None:
        return _written(part, rows, True)
    longer = isinstance(part.owner, nn.Embedding) and rows > known[2]
    entry = _written(part, rows, False, known[2] if longer else None)
    if _sameness(entry, known):
        return entry
    return _written(part, rows, True, known[2] if longer else None)


def _written(part: Part, rows: int, rounded: bool, first_rows: int | None = None) -> list:
    made = sketched(part, rounded, first_rows)
    own = np.append(made.buckets.ravel(), made.norm)
    return [part.kind, made.dtype, rows, _text(own), _text(*made.rounded.values())]


def _sketch(entry: list) -> Sketch:
    kind, dtype, _, own, rounded = entry
    roundings = map(type_name, ROUNDINGS.get(getattr(torch, dtype), ()))
    names = [BASE] if kind in (ADAPTED, MEASURED) else roundings
    *buckets, norm = _numbers_of(own)
    return Sketch(
        dtype=dtype,
        buckets=np.reshape(buckets, (PROJECTIONS, -1)),
        rounded=dict(zip(names, _numbers_of(rounded).reshape(-1, PROJECTIONS), strict=False)),
        norm=float(norm),
    )


def _text(*arrays: np.ndarray) -> str:
    """Numbers as text, in float32."""
    joined = np.concatenate([array.ravel() for array in arrays] or [np.empty(0)])
    return base64.b64encode(joined.astype("<f4").tobytes()).decode()


def _numbers_of(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4")


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
    return {"ids": list(ids), "dtype": seen.dtype, "projected": _text(seen.projected)}


def _is_large(decoder: nn.Module) -> bool:
    return sum(weight.numel() for weight in decoder.parameters()) >= LARGE


def _behaviour_of(record: dict) -> Behaviour:
    projected = _numbers_of(record["projected"]).reshape(-1, 2, len(record["ids"]), PROJECTED)
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
