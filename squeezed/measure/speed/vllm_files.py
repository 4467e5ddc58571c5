"""A model's configuration without weights, and saved contexts that an engine of it takes."""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace
from pathlib import Path

import torch

from squeezed.context.captured import CapturedLayer
from squeezed.context.storage.manifest import manifest_text
from squeezed.context.storage.names import MANIFEST, common_token, layer_file, observed_file
from squeezed.context.storage.saving import save
from squeezed.hf.fixed_context import FixedContext
from squeezed.measure.speed.fabricated import context_of

SEED_TOKENS, PROBE_TOKENS = 4096, 64


def model_directory(place: Path, shape: dict) -> Path:
    """A configuration without weights, for `load_format="dummy"`."""
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "max_position_embeddings": 1 << 20,
        "rope_parameters": rope,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **shape,
    }
    place.mkdir()
    (place / "config.json").write_text(json.dumps(config))
    return place


def document(tokens: int, vocabulary: int) -> list[int]:
    """Ids of a document of that length; always the same."""
    draw = random.Random(tokens)
    return [draw.randrange(3, vocabulary) for _ in range(tokens)]


def context_directory(
    place: Path, shape: dict, tokens: int, budget: float, device: str, dtype: torch.dtype
) -> Path:
    """A saved context whose layers are one layer, written once and linked."""
    generator = torch.Generator(device).manual_seed(tokens)

    def drawn(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator, device=device).to(dtype)

    heads, dim = shape["num_key_value_heads"], shape["head_dim"]
    count = min(SEED_TOKENS, tokens)
    keys, values = drawn(heads, count, dim), drawn(heads, count, dim)
    queries = drawn(shape["num_attention_heads"], PROBE_TOKENS, dim)
    seed = CapturedLayer(keys, values, queries, dim**-0.5)
    one = context_of(None, [seed], tokens, budget)
    one = replace(one, tokens=torch.tensor(document(tokens, shape["vocab_size"])))
    path = place / f"{tokens}.sqz"
    save(one, path)
    return repeated(one, path, shape["num_hidden_layers"])


def repeated(one: FixedContext, path: Path, layers: int) -> Path:
    """Let a saved context of one layer be one of `layers` alike, by links to its file."""
    files = json.loads((path / MANIFEST).read_text())["files"]
    token = common_token(files) or ""
    record = files[layer_file(0, token)]
    (path / observed_file(token)).unlink(missing_ok=True)
    for number in range(1, layers):
        os.link(path / layer_file(0, token), path / layer_file(number, token))
    tensors = ("per_token", "per_block", "alpha", "far_alpha")
    many = replace(
        one,
        layers=tuple(one.layers) * layers,
        windows=one.windows * layers,
        observed=(),
        calibrations={
            name: replace(found, **{field: getattr(found, field) * layers for field in tensors})
            for name, found in one.calibrations.items()
        },
    )
    records = {layer_file(number, token): record for number in range(layers)}
    (path / MANIFEST).write_bytes(manifest_text(many, records))
    return path
