"""What an operator may set: `kv_connector_extra_config` of vLLM as one dataclass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any

from squeezed.config import BEST, DEFAULT_BUDGET, check_budget
from squeezed.errors import SqueezedError, expect, whole, within
from squeezed.vllm.plugin import CONNECTOR

GIB = 1 << 30


@dataclass(frozen=True)
class Settings:
    """Settings of the connector.

    Attributes:
        contexts: directories of saved contexts, or saved contexts themselves.
        budget: share of a context's clustered keys that is read, unless a request asks otherwise.
        preset: how they are chosen, unless a request asks otherwise.
        context_memory: GiB for contexts on every rank; `None` is a quarter of the device's memory.
        own_tokens: most tokens that vLLM itself must hold for one request; 0 for as many as the
            model takes. vLLM does not start unless its pool holds that many.
        scan_seconds: time between two looks into the directories.
        implementation: `auto`, `reference`, `cpu` or `triton`.
        graphs: capture a decoding step on a GPU, and replay it while a batch stays the same.
        index_pause_ms: milliseconds that a document that is indexed may add to a step of others; 0
            for any time.
        index_threads: of the process that clusters it.
    """

    contexts: tuple[Path, ...] = ()
    budget: float = DEFAULT_BUDGET
    preset: str = BEST.name
    context_memory: float | None = None
    own_tokens: int = 0
    scan_seconds: float = 2.0
    implementation: str = "auto"
    graphs: bool = True
    index_pause_ms: float = 100.0
    index_threads: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "contexts", _paths(self.contexts))
        object.__setattr__(self, "budget", check_budget(self.budget))
        expect("preset", self.preset, str, "a preset's name (str)")
        expect("implementation", self.implementation, str, "an implementation's name (str)")
        expect("graphs", self.graphs, bool, "True or False")
        whole("own_tokens", self.own_tokens, 0)
        whole("index_threads", self.index_threads, 1)
        within("index_pause_ms", self.index_pause_ms, 0, 1e6)
        _positive("scan_seconds", self.scan_seconds)
        if self.context_memory is not None:
            _positive("context_memory", self.context_memory)

    @classmethod
    def of(cls, extra: Mapping[str, Any]) -> Settings:
        """The settings in `kv_connector_extra_config`; an unknown name is refused."""
        known = [field.name for field in fields(cls)]
        for name in extra:
            if name not in known:
                raise SqueezedError(
                    f"kv_connector_extra_config: expected {', '.join(known)}, got {name!r}"
                )
        return cls(**extra)

    @classmethod
    def of_engine(cls, config: Any) -> Settings | None:
        """Those in a `VllmConfig`; `None` where contexts are not asked for."""
        transfer = getattr(config, "kv_transfer_config", None)
        if transfer is None or transfer.kv_connector != CONNECTOR:
            return None
        return cls.of(transfer.kv_connector_extra_config)

    def extra(self) -> dict[str, Any]:
        """The same as JSON can hold it."""
        return asdict(self) | {"contexts": [str(path) for path in self.contexts]}

    def memory_bytes(self, device_bytes: int) -> int:
        """Bytes for contexts on a device that has `device_bytes`."""
        if self.context_memory is None:
            return device_bytes // 4
        return int(self.context_memory * GIB)


def _paths(value: Any) -> tuple[Path, ...]:
    wanted = "a directory of saved contexts, or a list of them"
    given = (value,) if isinstance(value, (str, PathLike)) else value
    expect("contexts", given, (tuple, list), wanted)
    return tuple(Path(expect("contexts", path, (str, PathLike), wanted)) for path in given)


def _positive(name: str, value: Any) -> None:
    if not expect(name, value, Real, "a number above 0") > 0:
        raise SqueezedError(f"{name}: expected a number above 0, got {value}")
