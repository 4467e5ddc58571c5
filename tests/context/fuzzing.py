"""Contexts from a stranger: seeded alterations, most under renewed checksums, loaded and asked.

`python tests/fuzzing.py CONTEXT CASES SEED` prints one JSON object of counts. It runs as a process
of its own, so that a kernel that leaves its arrays is seen; the case in work is named on stderr.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
import resource
import shutil
import struct
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from squeezed import methods
from squeezed.attention import Suffix
from squeezed.context.storage import directory
from squeezed.context.storage.manifest import _checksum
from squeezed.context.storage.structure import tensors_of
from squeezed.errors import SqueezedError

MEMORY_BYTES = 16 << 30
NASTY = [
    None, True, False, 0, 1, -1, 2, 3, 7, 255, 65536, 2**31 - 1, 2**31, -(2**31), 2**53, 2**63 - 1,
    2**63, 10**30, 0.5, -0.5, 1e-320, 1e308, "", "x", "\ud800", "x\n" * 50, "é" * 300, [], {}, [[]],
    [None], [0], [-1], ["x"], {"x": 1}, {"": []}, [[[[0]]]], [1] * 1000, "float64", "WindowLayer",
    "ClusteredLayer", "../../etc/passwd", "layer_000.safetensors", float("nan"), float("inf"),
]  # fmt: skip
NUMBERS = [0, 1, -1, 2, 5, 127, -128, 32767, -32768, 2**31 - 1, -(2**31), 2**62]
FLOATS = [0.0, -0.0, 1.0, -1.0, 1e4, -1e30, 1e38, float("inf"), -float("inf"), float("nan")]


def altered_json(value, rng: random.Random):
    """A JSON value with one place of it replaced, taken out, doubled, moved or nested."""
    parent, key, here = None, None, value
    while isinstance(here, (dict, list)) and here and (parent is None or rng.random() < 0.85):
        parent = here
        key = rng.choice(list(here) if isinstance(here, dict) else range(len(here)))
        here = here[key]
    if parent is None:
        return rng.choice(NASTY)
    kind = rng.randrange(6)
    if kind == 0:
        del parent[key]
    elif kind == 1:
        parent[key] = [here]
    elif kind == 2 and isinstance(parent, list):
        parent.insert(key, copy.deepcopy(here))
    elif kind == 2:
        parent[f"{key}x"] = here
    elif kind == 3 and isinstance(here, (int, float)) and not isinstance(here, bool):
        parent[key] = here + rng.choice([-1, 1, 0.5, 1000, -1000, 2**31])
    elif kind == 4 and isinstance(here, (list, str)) and here:
        parent[key] = here[: rng.randrange(len(here))]
    else:
        parent[key] = copy.deepcopy(rng.choice(NASTY))
    return value


def altered_bytes(content: bytes, rng: random.Random, upto: int | None = None) -> bytes:
    """Bytes with a few of them changed, cut, or put in, among the first `upto`."""
    changed, last = bytearray(content), max(1, upto or len(content))
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(min(last, len(changed)) or 1)
        kind = rng.randrange(4)
        if kind == 0:
            changed[place : place + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del changed[place : place + rng.randint(1, 40)]
        elif kind == 2:
            changed[place:place] = rng.choice([b"[", b"{", b'"', b"9" * 30, b"\0", b"[" * 5000])
        else:
            changed[place : place + 1] = bytes([changed[place] ^ 1 << rng.randrange(8)])
    return bytes(changed)


def altered_tensors(tensors: dict, rng: random.Random) -> dict:
    """Tensors of a file with one of them changed in numbers, shape, type, name, or not there."""
    found = {name: tensor.clone() for name, tensor in tensors.items()}
    name = rng.choice(sorted(found))
    tensor, kind = found[name], rng.randrange(10)
    nasty = FLOATS if tensor.is_floating_point() else NUMBERS
    if kind < 4 and tensor.numel():
        flat = tensor.view(-1)
        for _ in range(rng.choice([1, 1, 3, 20])):
            place = rng.choice([0, -1, rng.randrange(len(flat))])
            flat[place] = torch.tensor(rng.choice(nasty), dtype=torch.float64).to(tensor.dtype)
    elif kind == 4 and tensor.numel():
        tensor.fill_(torch.tensor(rng.choice(nasty), dtype=torch.float64).to(tensor.dtype))
    elif kind == 5 and tensor.dim():
        axis = rng.randrange(tensor.dim())
        size = rng.choice([0, 1, tensor.shape[axis] // 2, tensor.shape[axis] - 1])
        found[name] = tensor.narrow(axis, 0, max(0, size)).contiguous()
    elif kind == 6:
        axis = rng.randrange(max(1, tensor.dim()))
        found[name] = torch.cat([tensor, tensor], axis) if tensor.dim() else tensor.repeat(2)
    elif kind == 7:
        dtypes = [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int16]
        found[name] = tensor.to(rng.choice(dtypes))
    elif kind == 8 and tensor.dim():
        found[name] = tensor.flip(-1).roll(rng.randrange(3), 0).contiguous()
    else:
        moved = found.pop(name)
        if rng.random() < 0.7:
            other = rng.choice([*sorted(tensors), "extra", "level9.centroids"])
            found[other] = moved
    return found


class Fuzzer:
    """A context, copied once per case with one file of it altered."""

    def __init__(self, source: Path, place: Path) -> None:
        self.source, self.place = source, place
        self.text = (source / "context.json").read_bytes()
        self.files = sorted(file.name for file in source.glob("*.safetensors"))
        torch.manual_seed(0)
        self.query = torch.randn(1, 4, 3, 16)
        self.suffix = Suffix(*torch.randn(2, 1, 2, 3, 16))
        self.expected = self.answer(source)

    def answer(self, path: Path) -> list[torch.Tensor]:
        """What the kernels make of a context, for a token each and for a block."""
        context = directory.load(path)
        layers = list(context.layers)
        outputs = [x.float().sum() for layer in layers for x in tensors_of(layer).values()]
        outputs += [queries.float().sum() for queries in context.observed]
        for preset in sorted(context.calibrations):
            chosen = methods.create("squeezed", preset=preset, implementation="cpu")
            attentions = chosen.prepare(context, 0.2)
            for attention in attentions:
                for single in (True, False):
                    found = attention.attend(self.query, self.suffix, per_token=single)
                    outputs += [found.output, found.log_mass]
        return outputs

    def write(self, rng: random.Random) -> bool:
        """Lay out one case; whether its checksums were renewed."""
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.source, self.place)
        kind = rng.choice(["json", "json", "json", "text", "tensors", "tensors", "header", "bytes"])
        if kind == "text":
            (self.place / "context.json").write_bytes(altered_bytes(self.text, rng))
            return False
        manifest = json.loads(self.text)
        del manifest["checksum"]
        if kind == "json":
            manifest = altered_json(manifest, rng)
        else:
            self._alter_file(manifest, kind, rng)
        if isinstance(manifest, dict):
            manifest["checksum"] = _checksum(manifest)
        (self.place / "context.json").write_text(json.dumps(manifest))
        return True

    def _alter_file(self, manifest: dict, kind: str, rng: random.Random) -> None:
        name = rng.choice(self.files)
        content = (self.place / name).read_bytes()
        size = struct.unpack("<Q", content[:8])[0]
        if kind == "tensors":
            content = save(altered_tensors(load_file(self.place / name), rng))
        elif kind == "header":
            header = json.dumps(altered_json(json.loads(content[8 : 8 + size]), rng)).encode()
            content = struct.pack("<Q", len(header)) + header + content[8 + size :]
        else:
            content = altered_bytes(content, rng, 8 + size)
        (self.place / name).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        manifest["files"][name] = {"bytes": len(content), "sha256": digest}

    def outcome(self, renewed: bool) -> str:
        try:
            found = self.answer(self.place)
        except SqueezedError as error:
            return "refused" if "\n" not in str(error) and len(str(error)) < 1000 else "long line"
        same = len(found) == len(self.expected) and all(
            torch.equal(a, b) for a, b in zip(found, self.expected, strict=True)
        )
        return "same" if same else "other" if renewed else "other in silence"


def main(source: str, cases: str, seed: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as place:
        fuzzer = Fuzzer(Path(source), Path(place) / "case.sqz")
        for case in range(int(cases)):
            print("case", case, file=sys.stderr, flush=True)
            counts[fuzzer.outcome(fuzzer.write(random.Random(f"{seed} {case}")))] += 1
    print(json.dumps(counts))


if __name__ == "__main__":
    main(*sys.argv[1:])
