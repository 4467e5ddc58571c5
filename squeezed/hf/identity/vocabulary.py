"""Fingerprint of a tokenizer: of all that turns a text into ids, and of nothing else."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from squeezed.context.control_tokens import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE = (
    "The quick brown fox: 0123456789 3.14e-5 \t\n\r\n  жизнь Ελλάδα 言語 언어 日本語 हिन्दी العربية "
    "עברית ไทย {}[]() ~ café cafe\u0301 ﬁ Ⅷ ½ straße İ \u200b\u00a0 🙂👩\u200d💻 "
    "don't I'LL https://a.b/c?d=e_f snake_case CamelCase <s></s><|im_end|>[MASK]"
)

CACHED = 1 << 14
"""Entries from which a vocabulary is read again only if something says that it changed."""

_known: WeakKeyDictionary = WeakKeyDictionary()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of vocabulary, merges, normalizer, pre-tokenizer and added tokens, as hexadecimal.

    Padding, truncation, decoding, roles of special tokens, and how a release of `tokenizers` writes
    the same thing, do not count.
    """
    large = len(tokenizer) >= CACHED
    if large and _known.get(tokenizer, (None,))[0] == (state := _state(tokenizer)):
        return _known[tokenizer][1]
    described = {"splits": _ids(tokenizer), **_described(tokenizer)}
    text = json.dumps(described, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:32]
    if large:
        _known[tokenizer] = (state, digest)
    return digest


def _ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return encode(tokenizer, SAMPLE)


def _described(tokenizer: PreTrainedTokenizerBase) -> dict:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return _fast(json.loads(backend.to_str()), _splits_special(tokenizer))
    return {
        "vocabulary": tokenizer.get_vocab(),
        "added": [
            _added(json.loads(json.dumps(token.__getstate__())) | {"id": index}, True)
            for index, token in sorted(tokenizer.added_tokens_decoder.items())
        ],
        "merges": [[*pair] for pair in getattr(tokenizer, "bpe_ranks", {})],
        "pieces": _pieces(tokenizer),
    }


def _pieces(tokenizer: PreTrainedTokenizerBase) -> str:
    model: Any = getattr(tokenizer, "sp_model", None)
    if not hasattr(model, "serialized_model_proto"):
        return ""
    return hashlib.sha256(model.serialized_model_proto()).hexdigest()


def _fast(whole: dict, splits_special: bool) -> dict:
    """What decides ids, of the file that a fast tokenizer is saved as."""
    model = dict(whole.get("model") or {})
    vocabulary, merges = model.pop("vocab", None), model.pop("merges", None) or []
    return {
        "vocabulary": vocabulary,
        "merges": [pair if isinstance(pair, str) else _written(pair) for pair in merges],
        "model": _without_defaults(model),
        "normalizer": _without_defaults(whole.get("normalizer")),
        "pre_tokenizer": _without_defaults(whole.get("pre_tokenizer")),
        "added": [_added(token, splits_special) for token in whole.get("added_tokens") or []],
        "splits_special": splits_special,
    }


def _written(pair: list[str]) -> str:
    """A merge as older releases write it, unless a token with a space in it forbids that."""
    return " ".join(pair) if not any(" " in token for token in pair) else json.dumps(pair)


def _added(token: dict, splits_special: bool) -> dict:
    """Whether a token is special matters only where special tokens may be split."""
    kept = _without_defaults(token)
    if not splits_special:
        kept.pop("special", None)
    return kept


def _without_defaults(value: Any) -> Any:
    """The same without what is false, empty, or says how things were: releases add such fields."""
    if isinstance(value, list):
        return [_without_defaults(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {key: _without_defaults(item) for key, item in value.items() if key != "trim_offsets"}
    if kept.get("type") == "ByteLevel" and kept.get("use_regex") is True:
        del kept["use_regex"]
    return {key: item for key, item in kept.items() if item not in (None, False, "", [], {})}


def _splits_special(tokenizer: PreTrainedTokenizerBase) -> bool:
    return bool(getattr(tokenizer, "split_special_tokens", False))


def _state(tokenizer: PreTrainedTokenizerBase) -> tuple:
    """Changes whenever a part of a tokenizer is replaced, or its splits of the sample change."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    steps = [getattr(backend, name, None) for name in ("normalizer", "pre_tokenizer")]
    return (
        len(tokenizer),
        _splits_special(tokenizer),
        tuple(_ids(tokenizer)),
        tuple(repr(token) for token in tokenizer.added_tokens_decoder.values()),
        *(step.__getstate__() if step is not None else None for step in steps),
    )
