"""The fixed context: a document, indexed for one model, ready to be asked any time."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from os import PathLike
from pathlib import Path

from squeezed.config import BEST, DEFAULT_BUDGET
from squeezed.context.record import ContextRecord
from squeezed.context.storage import saving
from squeezed.errors import expect, whole
from squeezed.hf.asking import Asking
from squeezed.hf.build import build_cache
from squeezed.hf.cache import SqueezedCache
from squeezed.hf.identity.fingerprint import check_attention
from squeezed.hf.identity.stored import check_stored


@dataclass(frozen=True)
class FixedContext(ContextRecord):
    """What `squeezed.index` makes and `squeezed.load` opens: a record that makes caches."""

    @classmethod
    def of(cls, record: ContextRecord) -> FixedContext:
        """The face of a record that was loaded."""
        return cls(**{field.name: getattr(record, field.name) for field in fields(record)})

    def cache(
        self,
        budget: float = DEFAULT_BUDGET,
        preset: str = BEST.name,
        implementation: str = "auto",
        method: str = "squeezed",
        suffix_tokens: int | None = None,
    ) -> SqueezedCache:
        """A new cache over this context for `model.generate(..., past_key_values=...)`.

        Args:
            budget: share of the clustered keys read exactly, on average, in (0, 1]; 1.0 is dense.
            preset: `best` or `paper`; other methods ignore it.
            implementation: `auto`, `reference`, `cpu` or `triton`; other methods ignore it.
            method: `squeezed`, or another name of `squeezed.methods.METHODS`.
            suffix_tokens: room for question and answer in a buffer of fixed size, so that
                `generate()` compiles the decode step on a GPU; `None` grows as needed.

        Returns:
            One per request or batch of requests.
        """
        return self.cache_for(Asking(budget, preset, implementation, method), suffix_tokens)

    def cache_for(
        self, asking: Asking, suffix_tokens: int | None = None, recognised: bool = False
    ) -> SqueezedCache:
        """The same, of settings that stand together.

        Args:
            recognised: the whole model was just compared with the one that made the context;
                otherwise each attention module is, when it first reads the cache.
        """
        if suffix_tokens is not None:
            whole("suffix_tokens", suffix_tokens, 1)
        cache = build_cache(self, asking.attentions(self), asking.budget, suffix_tokens)
        if not recognised:
            check_stored(self.model)
            for place, layer in enumerate(cache.layers):
                layer.recognise = partial(check_attention, self.model, place)
        return cache

    def save(self, path: str | Path) -> Path:
        """Write the context as a directory; complete under `path`, or not there at all."""
        return saving.save(self, Path(expect("path", path, (str, PathLike), "a path")))
