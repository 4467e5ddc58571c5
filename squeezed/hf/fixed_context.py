"""The fixed context: a document, indexed for one model, ready to be asked any time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from squeezed.config import BEST, DEFAULT_BUDGET, GrowthConfig, RowsName
from squeezed.context.record import ContextRecord
from squeezed.context.storage import saving
from squeezed.errors import expect, whole
from squeezed.hf import editing
from squeezed.hf.asking import Asking
from squeezed.hf.build import build_cache
from squeezed.hf.cache import SqueezedCache
from squeezed.hf.growing import Growing, Progress, silent
from squeezed.hf.identity.fingerprint import check_attention
from squeezed.hf.identity.maker import check_maker, check_pair
from squeezed.hf.identity.stored import check_stored
from squeezed.indexing.encode import with_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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

    def append(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        text: str,
        budget: float = 1.0,
        method: str = "squeezed",
        config: GrowthConfig | None = None,
        progress: Progress = silent,
    ) -> FixedContext:
        """The context of this document with `text` behind it; this one stays as it is.

        The model reads the new text alone, and all of the document through its keys. The text is
        tokenised by itself: no token crosses the border.

        Args:
            budget: share of the document's keys that the model reads meanwhile; 1.0 is exact.
            method: how it reads them, a name of `squeezed.methods.METHODS`.
            config: when thresholds are fitted anew, and which trees are joined.
            progress: called with `("prefill" | "cluster" | "calibrate", done, total)`.

        Returns:
            A new version, whose `history` says what was read and what it cost.

        Raises:
            ContextFileError: another model or tokenizer made this context.
            SqueezedError: no text, or more than the model's positions hold.
        """
        growing = _growing(model, tokenizer, self, budget, method, config, progress)
        return editing.append(growing, self, text)

    def update(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        text: str,
        budget: float = 1.0,
        method: str = "squeezed",
        config: GrowthConfig | None = None,
        progress: Progress = silent,
    ) -> FixedContext:
        """The context of another text: what stands before the first change is kept, the rest read.

        Arguments and errors are those of `append`. This context itself if nothing changed.

        Raises:
            SqueezedError: nothing of the beginning is left, or sliding windows, whose keys before
                the end are gone.
        """
        growing = _growing(model, tokenizer, self, budget, method, config, progress)
        return editing.update(growing, self, text)

    def replace(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        old: str,
        new: str,
        budget: float = 1.0,
        method: str = "squeezed",
        config: GrowthConfig | None = None,
        progress: Progress = silent,
    ) -> FixedContext:
        """The context in whose text `new` stands where `old` did; see `update`.

        Raises:
            SqueezedError: `old` stands there not once, or never, or as `update` does.
        """
        growing = _growing(model, tokenizer, self, budget, method, config, progress)
        return editing.replace(growing, self, old, new)

    def crop(
        self, tokens: int, config: GrowthConfig | None = None, progress: Progress = silent
    ) -> FixedContext:
        """The context of the first `tokens` tokens, what stands before the document included; `-n`
        takes the last `n` away. Nothing is read; thresholds are fitted again on the old question.

        Raises:
            SqueezedError: none left, or sliding windows, whose keys before the end are gone.
        """
        self.check_plain("a context that is cut")
        return editing.crop(self, tokens, _checked(config), progress)

    def encoded(
        self, rows: RowsName, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> FixedContext:
        """This context with its keys and values written as `int8` or `int4`; as it is if they are.

        Args:
            progress: called with the layers done, and with all there are.

        Raises:
            SqueezedError: an unknown encoding, rows in another one, or a dimension or numbers that
                it cannot hold.
        """
        return with_rows(self, rows, progress)

    def save(self, path: str | Path) -> Path:
        """Write the context as a directory; complete under `path`, or not there at all."""
        return saving.save(self, Path(expect("path", path, (str, PathLike), "a path")))


def _growing(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    context: FixedContext,
    budget: float,
    method: str,
    config: GrowthConfig | None,
    progress: Progress,
) -> Growing:
    """All that a growing context needs, looked at before anything is read."""
    check_pair(model, tokenizer)
    check_maker(model, tokenizer, context)
    context.check_plain("a context that grows")
    return Growing(model, tokenizer, Asking(budget, method=method), _checked(config), progress)


def _checked(config: GrowthConfig | None) -> GrowthConfig:
    config = GrowthConfig() if config is None else config
    return expect("config", config, GrowthConfig, "a GrowthConfig")
