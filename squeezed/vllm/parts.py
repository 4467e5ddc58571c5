"""What the ranks of an engine captured of a document, in files, until its context is saved.

Any process can make the context of them (`making`): beside the engine, in its stead, or after it.
Each rank writes the heads that it holds; a file has its name when it is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from uuid import uuid4

import torch

from squeezed.context.captured import CapturedLayer
from squeezed.context.storage import tensorfile
from squeezed.context.storage.strict import Malformed
from squeezed.errors import ContextFileError, SqueezedError, shown
from squeezed.indexing.build import observed
from squeezed.system import files
from squeezed.vllm.cutting import Share
from squeezed.vllm.news import Order

PREFIX = ".indexing-"
ORDER, LOCK = "order.json", "lock"


class Parts:
    """A directory beside the context that is to be; hidden, so that no server looks into it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of(cls, order: Order) -> Parts:
        """Those of an order: of the same document, model and ranks, whoever asks."""
        return cls(order.path.with_name(f"{PREFIX}{order.path.name}-{order.key}"))

    def begin(self, order: Order) -> None:
        """Say what is to be made. Ranks may call it at once."""
        self.path.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(order) | {"path": str(order.path)})
        self._put(ORDER, text.encode())

    @property
    def order(self) -> Order:
        try:
            said = json.loads((self.path / ORDER).read_bytes())
            return Order(**said | {"path": Path(said["path"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ContextFileError(
                f"{shown(self.path)}: holds no captured document ({error}); index it again"
            ) from error

    def put(self, rank: int, number: int, layer: CapturedLayer) -> None:
        """A rank's heads of a layer."""
        assert layer.queries is not None
        tensors = {
            "keys": layer.keys,
            "values": layer.values,
            "queries": layer.queries,
            "scale": torch.tensor([layer.scale], dtype=torch.float64),
        }
        path = self.path / _layer(rank, number)
        temporary = _temporary(path)
        with open(temporary, "xb", buffering=0) as stream:
            tensorfile.write(stream.fileno(), tensors)
        temporary.replace(path)

    def end(self, rank: int, layers: int, seconds: float) -> None:
        """A rank has put all of its layers, after `seconds` of reading."""
        self._put(_rank(rank), json.dumps({"layers": layers, "seconds": seconds}).encode())

    def fail(self, rank: int, why: str) -> None:
        """A rank cannot: the others need not wait."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._put(_failure(rank), why.encode())

    def failure(self, ranks: int) -> str | None:
        """Why a rank could not, if one could not."""
        for rank in range(ranks):
            path = self.path / _failure(rank)
            if path.exists():
                return path.read_text(encoding="utf-8")
        return None

    def forget_failure(self, rank: int) -> None:
        (self.path / _failure(rank)).unlink(missing_ok=True)

    def is_complete(self, ranks: int) -> bool:
        """Whether every rank has put all of its layers."""
        return all((self.path / _rank(rank)).exists() for rank in range(ranks))

    def seconds(self, ranks: int) -> float:
        """How long the slowest rank read."""
        return max(self._ended(rank)["seconds"] for rank in range(ranks))

    def layers(self, ranks: int, kv_heads: int, device: torch.device) -> Iterator[CapturedLayer]:
        """Every layer with the heads of all ranks, one after the other."""
        for number in range(self._ended(0)["layers"]):
            yield joined([self._read(rank, number, device) for rank in range(ranks)], kv_heads)

    @contextmanager
    def held(self) -> Iterator[None]:
        """While one process makes the context, no other does; raises `SqueezedError` in others."""
        descriptor = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if files.lock(descriptor) is False:
                raise SqueezedError(f"{shown(self.path)}: another process is making this context")
            yield
        finally:
            os.close(descriptor)

    def clear(self) -> None:
        """Remove these, and what earlier attempts at the same context left."""
        name = self.path.name.rpartition("-")[0]
        for path in self.path.parent.glob(f"{name}-*"):
            if len(path.name) == len(self.path.name):
                shutil.rmtree(path, ignore_errors=True)

    def _put(self, name: str, content: bytes) -> None:
        temporary = _temporary(self.path / name)
        temporary.write_bytes(content)
        temporary.replace(self.path / name)

    def _ended(self, rank: int) -> dict:
        return json.loads((self.path / _rank(rank)).read_bytes())

    def _read(self, rank: int, number: int, device: torch.device) -> CapturedLayer:
        path = self.path / _layer(rank, number)
        try:
            content = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
            found = tensorfile.tensors_in(content)
            keys, values, queries = (found[n].to(device) for n in ("keys", "values", "queries"))
            return CapturedLayer(keys, values, queries, float(found["scale"]))
        except (OSError, Malformed, KeyError) as error:
            raise ContextFileError(
                f"{shown(path)}: cannot be read ({error}); index the document again"
            ) from error


def joined(parts: list[CapturedLayer], kv_heads: int) -> CapturedLayer:
    """The heads of all ranks; of those that hold the same KV head, one gives it."""
    if len(parts) == 1:
        return parts[0]
    ranks = len(parts)
    holders = {Share(rank, ranks).heads(kv_heads).start: parts[rank] for rank in range(ranks)}
    own = [holders[head] for head in sorted(holders)]
    return CapturedLayer(
        torch.cat([part.keys for part in own]),
        torch.cat([part.values for part in own]),
        torch.cat([observed(part) for part in parts]),
        parts[0].scale,
    )


def _layer(rank: int, number: int) -> str:
    return f"rank-{rank}.layer-{number:03}.safetensors"


def _rank(rank: int) -> str:
    return f"rank-{rank}.json"


def _failure(rank: int) -> str:
    return f"rank-{rank}.failed"


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}-{uuid4().hex}")
