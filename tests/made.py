"""Fixed contexts without a model, and saved ones altered under checksums made anew."""

import hashlib
import json
from dataclasses import replace

import torch
from safetensors.torch import load_file, save_file
from trees import random_layer

from squeezed.config import BEST, PAPER, ClusteringConfig, IndexConfig
from squeezed.context.captured import ObservedLayer
from squeezed.context.layers import WindowLayer
from squeezed.context.prompt import PromptTemplate
from squeezed.context.storage.manifest import _checksum
from squeezed.context.storage.structure import tensors_of
from squeezed.hf.fixed_context import FixedContext
from squeezed.indexing.calibrate import calibrate
from squeezed.indexing.forest import Forest

TOKENS, HEADS, DIM, PINNED, SCALE = 90, 2, 16, 10, 0.3
WINDOW_FILE, LAYER_FILE = "layer_001.safetensors", "layer_002.safetensors"


def made_context(seed=0, dtype=torch.float32):
    """Two clustered layers with a window between them."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.arange(TOKENS - PINNED, TOKENS), torch.arange(TOKENS - PINNED)
    positions = torch.cat(order).repeat(HEADS, 1).to(torch.int16)
    trees = [
        replace(
            random_layer(HEADS, TOKENS, DIM, (3, 9), PINNED, dtype, i + seed, scale=SCALE),
            positions=positions,
        )
        for i in range(2)
    ]
    queries = [torch.randn(2 * HEADS, 8, DIM, generator=generator).to(dtype) for _ in trees]
    seen = Forest.of([ObservedLayer(*pair) for pair in zip(trees, queries, strict=True)])
    config = IndexConfig(ClusteringConfig(levels=(0.04, 0.1)), budgets=(0.1, 0.3))
    recent = torch.randn(2, HEADS, 12, DIM, generator=generator).to(dtype)
    return FixedContext(
        tokens=torch.randint(0, 250, (TOKENS,), generator=generator),
        layers=(trees[0], WindowLayer(*recent, TOKENS), trees[1]),
        windows=(None, 13, None),
        calibrations={p.name: calibrate(seen, p, config.budgets) for p in (PAPER, BEST)},
        config=config,
        template=PromptTemplate("<s>", "\n", "?"),
        model="of no model",
        tokenizer="of no tokenizer",
        seconds={"prefill": 1.0},
        observed=tuple(queries),
    )


def same_context(one, other):
    """Whether two contexts hold the same tokens, layers and observed queries; reads all of them."""
    read = [*map(tensors_of, one.layers), {"tokens": one.tokens}, dict(enumerate(one.observed))]
    wanted = [*map(tensors_of, other.layers), {"tokens": other.tokens}]
    wanted.append(dict(enumerate(other.observed)))
    return all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(read, wanted, strict=True)
    )


def with_manifest(path, change):
    """Alter the description of a saved context in place; its checksum is right again."""
    manifest = json.loads((path / "context.json").read_text())
    del manifest["checksum"]
    change(manifest)
    manifest["checksum"] = _checksum(manifest)
    (path / "context.json").write_text(json.dumps(manifest))


def with_content(path, name, content):
    """Put other bytes into a file of a saved context; all checksums are right again."""
    (path / name).write_bytes(content)
    record = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    with_manifest(path, lambda manifest: manifest["files"].update({name: record}))


def with_tensors(path, name, change):
    """Alter the tensors of a file of a saved context; all checksums are right again."""
    tensors = {key: tensor.clone() for key, tensor in load_file(path / name).items()}
    change(tensors)
    save_file(tensors, path / name)
    with_content(path, name, (path / name).read_bytes())
