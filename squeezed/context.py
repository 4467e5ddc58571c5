"""The fixed context: what a document becomes for one model, ready to be asked any time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path

from torch import Tensor

from squeezed.calibration import Calibration
from squeezed.config import BEST, DEFAULT_BUDGET, IndexConfig, check_budget
from squeezed.errors import SqueezedError, expect, whole
from squeezed.prompt import PromptTemplate
from squeezed.structure import Outline, OutlinedLayers
from squeezed.tree import ClusteredLayer, WindowLayer

Layer = ClusteredLayer | WindowLayer


@dataclass(frozen=True)
class FixedContext:
    """A document, prefilled, clustered and calibrated.

    Attributes:
        tokens: `[P]` int64, ids of the document with the template before it.
        layers: one per model layer; loaded from disk when first used.
        windows: sliding window of every layer in tokens, `None` for full attention.
        scales: softmax scale of every full-attention layer.
        calibrations: thresholds by preset name.
        config: the settings used.
        template: text around document and question.
        model: what `squeezed.fingerprint.model_fingerprint` says of the model that made it: a
            record that JSON can hold, with sketches of weights and the keys of a few tokens.
        tokenizer: hash of the tokenizer's vocabulary and rules.
        seconds: how long prefill, clustering and calibration took.
        observed: `[Hq, W, D]` per full-attention layer, the queries of the probe that calibrated
            it, for methods that vote with them; empty if nobody kept them.
    """

    tokens: Tensor
    layers: Sequence[Layer]
    windows: tuple[int | None, ...]
    scales: tuple[float, ...]
    calibrations: dict[str, Calibration]
    config: IndexConfig
    template: PromptTemplate
    model: dict
    tokenizer: str
    seconds: dict[str, float]
    observed: Sequence[Tensor] = ()

    @property
    def clustered_layers(self) -> list[ClusteredLayer]:
        return [layer for layer in self.layers if isinstance(layer, ClusteredLayer)]

    @property
    def is_dense(self) -> bool:
        """Whether the document was too short to cluster, so that all of it is always read."""
        return not any(outline.nodes for outline in self.outlines)

    @property
    def outlines(self) -> Sequence[Outline]:
        """Kind and shapes of every layer; of a saved context without opening any."""
        if isinstance(self.layers, OutlinedLayers):
            return self.layers.outlines
        return tuple(Outline.of(layer) for layer in self.layers)

    def calibration(self, preset: str) -> Calibration:
        """Thresholds of a preset; raises `SqueezedError` for a name the context does not hold."""
        if expect("preset", preset, str, "a preset's name (str)") not in self.calibrations:
            known = ", ".join(self.calibrations)
            raise SqueezedError(
                f"preset: this context was calibrated for {known}, got {preset!r}; index the "
                "document again with that preset"
            )
        return self.calibrations[preset]

    def cache(
        self,
        budget: float = DEFAULT_BUDGET,
        preset: str = BEST.name,
        implementation: str = "auto",
        method: str = "squeezed",
        suffix_tokens: int | None = None,
    ):
        """A new cache over this context for `model.generate(..., past_key_values=...)`.

        Args:
            budget: share of the clustered keys read exactly, on average, in (0, 1]; 1.0 is dense.
            preset: `best` or `paper`; other methods ignore it.
            implementation: `auto`, `reference`, `cpu` or `triton`; other methods ignore it.
            method: `squeezed`, or another name of `squeezed.methods.METHODS`.
            suffix_tokens: room for question and answer in a buffer of fixed size, so that
                `generate()` compiles the decode step on a GPU; `None` grows as needed.

        Returns:
            `squeezed.hf.cache.SqueezedCache`; one per request or batch of requests.
        """
        from squeezed.fingerprint import check_attention
        from squeezed.hf.build import build_cache
        from squeezed.methods import create

        for name, value in (("preset", preset), ("implementation", implementation)):
            expect(name, value, str, "a name (str)")
        if suffix_tokens is not None:
            whole("suffix_tokens", suffix_tokens, 1)
        chosen = create(method, preset=preset, implementation=implementation)
        attentions = iter(chosen.prepare(self, check_budget(budget)))
        contexts = [
            layer if isinstance(layer, WindowLayer) else next(attentions) for layer in self.layers
        ]
        cache = build_cache(contexts, budget, self.tokens, suffix_tokens)
        for place, layer in enumerate(cache.layers):
            layer.recognise = partial(check_attention, self.model, place)
        return cache

    def kv_bytes(self) -> int:
        return sum(layer.kv_bytes() for layer in self.layers)

    def index_bytes(self) -> int:
        """Bytes held on top of the keys and values."""
        return sum(layer.index_bytes() for layer in self.layers)

    def save(self, path: str | Path) -> Path:
        """Write the context as a directory; complete under `path`, or not there at all."""
        from squeezed.storage import save

        return save(self, Path(expect("path", path, (str, PathLike), "a path")))
