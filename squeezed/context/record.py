"""The fixed context: what a document becomes for one model, ready to be asked any time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from squeezed.config import IndexConfig, RowsName
from squeezed.context.calibration import Calibration
from squeezed.context.growth import Change, Tree
from squeezed.context.layers import ClusteredLayer, WindowLayer
from squeezed.context.prompt import PromptTemplate
from squeezed.context.storage.outline import Outline, OutlinedLayers
from squeezed.errors import SqueezedError, expect

Layer = ClusteredLayer | WindowLayer


@dataclass(frozen=True)
class ContextRecord:
    """A document, prefilled, clustered and calibrated.

    Attributes:
        tokens: `[P]` int64, ids of the document with the template before it.
        layers: one per model layer; loaded from disk when first used.
        windows: sliding window of every layer in tokens, `None` for full attention.
        calibrations: thresholds by preset name.
        config: the settings used.
        template: text around document and question.
        model: what `squeezed.hf.identity.fingerprint.model_fingerprint` says of its model: a
            record that JSON can hold, with sketches of weights and the keys of a few tokens.
        tokenizer: hash of the tokenizer's vocabulary and rules.
        seconds: how long prefill, clustering and calibration took.
        observed: `[Hq, W, D]` per full-attention layer, the queries of the probe that calibrated
            it, for methods that vote with them; empty if nobody kept them.
        assumed: parts of `config` that its file did not say, for an older release wrote it; they
            are what that release took.
        pieces, trees, history: how the context grew (`squeezed.context.growth`); empty if it was
            indexed at once.
        rows_loss: per full-attention layer and KV head, how far encoded rows move the output of
            dense attention to the probe's queries, relative to it; empty if nobody measured it.
    """

    tokens: Tensor
    layers: Sequence[Layer]
    windows: tuple[int | None, ...]
    calibrations: dict[str, Calibration]
    config: IndexConfig
    template: PromptTemplate
    model: dict
    tokenizer: str
    seconds: dict[str, float]
    observed: Sequence[Tensor] = ()
    assumed: tuple[str, ...] = ()
    pieces: tuple[int, ...] = ()
    trees: tuple[Tree, ...] = ()
    history: tuple[Change, ...] = ()
    rows_loss: tuple[tuple[float, ...], ...] = ()

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

    @property
    def rows(self) -> RowsName:
        """How keys and values are written (`squeezed.config.ROWS`)."""
        written = {outline.encoding for outline in self.outlines}
        return next(iter(written - {"plain"}), "plain")

    def check_plain(self, who: str) -> None:
        """Raise `SqueezedError` for encoded rows, which `who` does not read."""
        if self.rows != "plain":
            raise SqueezedError(
                f"rows: {who} needs plain keys and values, this context has {self.rows!r}; index "
                "the document again with rows='plain'"
            )

    def calibration(self, preset: str) -> Calibration:
        """Thresholds of a preset; raises `SqueezedError` for a name the context does not hold."""
        if expect("preset", preset, str, "a preset's name (str)") not in self.calibrations:
            known = ", ".join(self.calibrations)
            raise SqueezedError(
                f"preset: this context was calibrated for {known}, got {preset!r}; index the "
                "document again with that preset"
            )
        return self.calibrations[preset]

    def kv_bytes(self) -> int:
        return sum(layer.kv_bytes() for layer in self.layers)

    def window_bytes(self) -> int:
        """Bytes of the layers that see a window: every token reads all of them."""
        return sum(x.kv_bytes() for x in self.layers if isinstance(x, WindowLayer))

    def index_bytes(self) -> int:
        """Bytes held on top of the keys and values."""
        return sum(layer.index_bytes() for layer in self.layers)
