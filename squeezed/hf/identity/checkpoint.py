"""Did the files of a checkpoint make this context? For engines that hold weights in a form of
their own: fused, quantised, cut for several devices.

The files hold each weight once, under the name that Transformers gives it. So what is compared are
the sketches that a context has of its model's weights: of all small ones, and of the projections to
keys and values in three layers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from squeezed.context.record import ContextRecord
from squeezed.errors import ContextFileError, shown
from squeezed.hf.identity.entries import sameness, text_of
from squeezed.hf.identity.fingerprint import another_model
from squeezed.hf.identity.sketch import ROUNDINGS, sketch
from squeezed.hf.identity.stored import check_stored
from squeezed.hf.identity.weights import BUFFER, PLAIN

SMALL = 1 << 16
"""Elements of a weight that is compared wherever it stands."""

PREFIXES = ("model.language_model.", "language_model.model.", "model.", "transformer.")
IN_LAYER = re.compile(r"layers\.(\d+)\.self_attn\.[kv]_proj\.weight")
ENGINE = "engine"
"""Where the record of a context that an engine made says how that computed: quantised, and how."""


class Checkpoint:
    """The files of a model.

    Args:
        directory: with `*.safetensors`; anything else can only be compared by shape.
        config: of the text model, as the engine runs it.
        quantization: how the engine stores weights, `None` for as they are.
    """

    def __init__(self, directory: Path, config: Any, quantization: str | None = None) -> None:
        self.directory, self.config, self.quantization = directory, config, quantization
        self._entries: dict[str, list] | None = None

    def check(self, record: ContextRecord) -> None:
        """Raise `ContextFileError` unless this checkpoint, so run, made the context.

        One that says nothing of its model, as random layers of a bench, is compared by shape.
        """
        if record.model:
            check_stored(record.model)
        what = self._shape(record) or self._engine(record.model) or self._weights(record.model)
        if what:
            raise another_model(what)

    def fingerprint(self) -> dict[str, Any]:
        """What a context that the engine makes says of its model; Transformers can check it too."""
        return {
            "weights": self.entries(),
            "numbers": {},
            "partial": True,
            "packed": self.quantization is not None,
            "behaviour": None,
            ENGINE: {"quantization": self.quantization},
        }

    def entries(self) -> dict[str, list]:
        """Sketches by the decoder's names, as `model_fingerprint` has them."""
        if self._entries is None:
            self._entries = {name: _entry(tensor) for name, tensor in self._tensors()}
            frequencies = self._frequencies()
            if frequencies is not None:
                entry = _entry(frequencies, logarithm=True)
                self._entries["rotary_emb.inv_freq"] = [BUFFER, *entry[1:]]
        return self._entries

    def _shape(self, record: ContextRecord) -> str | None:
        layers = getattr(self.config, "num_hidden_layers", None)
        if layers is not None and layers != len(record.windows):
            return f"{len(record.windows)} layers, not {layers}"
        heads = getattr(self.config, "num_key_value_heads", None)
        found = {outline.heads for outline in record.outlines}
        if heads is not None and found != {heads}:
            return f"{sorted(found)} KV heads, not {heads}"
        return None

    def _engine(self, model: Any) -> str | None:
        """Keys of quantised weights are not those of the weights before."""
        engine = model.get(ENGINE) if isinstance(model, dict) else None
        made = engine.get("quantization") if isinstance(engine, dict) else None
        if made == self.quantization:
            return None
        return (
            f"its weights were stored as {shown(made) if made else 'they are'}, the engine's as "
            f"{self.quantization or 'they are'}"
        )

    def _weights(self, model: Any) -> str | None:
        known = model.get("weights", {}) if isinstance(model, dict) else {}
        own = self.entries()
        for name in sorted(known.keys() & own.keys()):
            if not sameness(own[name], known[name]):
                return f"{name} differs"
        return None

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for file in sorted(self.directory.glob("*.safetensors")):
            try:
                with safe_open(file, "pt") as opened:
                    names = opened.keys()
                    for name in names:
                        short = decoder_name(name)
                        if self._compared(short, opened.get_slice(name).get_shape()):
                            yield short, opened.get_tensor(name)
            except (OSError, SafetensorError) as error:
                raise ContextFileError(f"{shown(file)}: cannot be read ({error})") from error

    def _compared(self, name: str, shape: list[int]) -> bool:
        last = getattr(self.config, "num_hidden_layers", 1) - 1
        layer = IN_LAYER.fullmatch(name)
        chosen = layer is not None and int(layer[1]) in (0, last // 2, last)
        return chosen or int(np.prod(shape)) < SMALL

    def _frequencies(self) -> Tensor | None:
        """Rotary frequencies `[D / 2]` where no scaling changes them."""
        rope = getattr(self.config, "rope_parameters", None) or {}
        if rope.get("rope_type", "default") != "default" or "rope_theta" not in rope:
            return None
        heads = self.config.num_attention_heads
        dim = getattr(self.config, "head_dim", None) or self.config.hidden_size // heads
        dim = int(dim * rope.get("partial_rotary_factor", 1.0))
        return 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2).float() / dim)


def decoder_name(name: str) -> str:
    """The name in the decoder alone of a weight in a checkpoint's file."""
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def quantization_of(directory: Path) -> str | None:
    """How a checkpoint's own files are quantised, from its `config.json`."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return (config.get("quantization_config") or {}).get("quant_method")


def _entry(tensor: Tensor, logarithm: bool = False) -> list:
    """As `fingerprint._entry` makes it of a model's weight."""
    known = tensor.dtype in ROUNDINGS
    made = sketch(
        tensor if known else tensor.float(), ROUNDINGS.get(tensor.dtype, ()), logarithm=logarithm
    )
    rows = len(tensor) if tensor.dim() else 1
    own = np.append(made.buckets.ravel(), made.norm)
    return [PLAIN, made.dtype, rows, text_of(own), text_of(*made.rounded.values())]
