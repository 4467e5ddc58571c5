"""Loading a model and its tokenizer by directory, GGUF file, hub name, or the demo's name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from squeezed.errors import SqueezedError
from squeezed.system.failures import cause_of, explained, is_out_of_memory, readable_failures

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DEMO_MODEL = "demo"
"""Stands for SmolLM2-135M-Instruct, which is fetched when first used."""

DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass(frozen=True)
class ModelSource:
    """Where a model lies: a directory or hub name for `from_pretrained`, and a GGUF file in it."""

    location: str
    gguf_file: str | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}


def locate(name: str, report: Callable[[str], None] = lambda line: None) -> ModelSource:
    """Find a model.

    Args:
        name: `demo`, a directory, a `.gguf` file, or a hub name such as `Qwen/Qwen3-0.6B`.
        report: called with a line for every step that takes more than a moment.

    Raises:
        SqueezedError: nothing lies at a path that `name` can only mean.
    """
    if not name.strip() or "\0" in name:
        raise SqueezedError(f"model: expected a directory, .gguf file or hub name, got {name!r}")
    if name == DEMO_MODEL:
        from squeezed.hf.demo_model import demo_model_directory

        return ModelSource(str(demo_model_directory(report)))
    path = _path(name)
    with readable_failures():  # a name that is too long, or a directory that nobody may read
        if path.is_file() and path.suffix == ".gguf":
            return ModelSource(str(path.parent), path.name)
        if path.is_dir():
            return _in_directory(path)
        exists = path.exists()
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_like_path or exists or path.suffix == ".gguf":
        raise SqueezedError(
            f"model: expected a model directory, a .gguf file or a hub name, found none at {name}; "
            "check the path"
        )
    return ModelSource(name)


def _path(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError as error:  # no home directory
        raise SqueezedError(f"model: {cause_of(error)} for {name}; give a whole path") from error


def _in_directory(path: Path) -> ModelSource:
    if (path / "config.json").is_file():
        return ModelSource(str(path))
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return ModelSource(str(path), ggufs[0].name)
    found = f"{len(ggufs)} .gguf files" if ggufs else "neither config.json nor a .gguf file"
    raise SqueezedError(
        f"model: {path} holds {found}; name the model's directory or one .gguf file"
    )


def load_model(
    name: str,
    dtype: str = "auto",
    device: str = "auto",
    report: Callable[[str], None] = lambda line: None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, ready for `squeezed.index`.

    Args:
        name: see `locate`.
        dtype: `auto` (the checkpoint's, bfloat16 for GGUF, float32 on a CPU without fast
            bfloat16), `bfloat16`, `float16` or `float32`.
        device: `auto` (the first GPU, else the CPU), or a torch device.

    Returns:
        `(model, tokenizer)`, the model in evaluation mode.

    Raises:
        SqueezedError: no such model, no network, or files that do not load.
    """
    _check_python()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = _device(device)
    source = locate(name, report)
    report(f"loading {name}")
    with readable_errors(name, source):
        tokenizer = AutoTokenizer.from_pretrained(source.location, **source.arguments)
        model = AutoModelForCausalLM.from_pretrained(
            source.location, dtype=_dtype(dtype, source, target), **source.arguments
        )
        return model.to(target).eval(), tokenizer


def _check_python() -> None:
    if sys.flags.optimize > 1:
        raise SqueezedError(
            "python: -OO (PYTHONOPTIMIZE=2) removes docstrings, which Transformers reads; use -O "
            "(PYTHONOPTIMIZE=1) or none"
        )


def load_config(name: str, report: Callable[[str], None] = lambda line: None) -> PreTrainedConfig:
    """Only the configuration of a model; raises as `load_model` does."""
    _check_python()
    from transformers import AutoConfig

    path = _path(name)
    location = ModelSource(str(path)) if path.suffix == ".json" else locate(name, report)
    with readable_errors(name, location):
        return AutoConfig.from_pretrained(location.location, **location.arguments)


@contextmanager
def readable_errors(name: str, source: ModelSource) -> Iterator[None]:
    """Turn what is raised while `name` is loaded from `source` into one line with a remedy.

    Transformers and the readers of its files raise all kinds for a file that holds nonsense.
    """
    try:
        yield
    except SqueezedError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise explained(error) or error from error
        remedy = "check the name and the network, or give a local directory or .gguf file"
        if type(error).__name__ == "SafetensorError" or isinstance(error, EOFError):
            remedy = f"the weights at {source.location} are cut or damaged: download them again"
        if name == DEMO_MODEL:
            remedy = f"remove {source.location} and try again: it is fetched anew"
        raise SqueezedError(
            f"model: could not load {name!r} ({cause_of(error)}); {remedy}"
        ) from error


def _dtype(name: str, source: ModelSource, target: torch.device) -> torch.dtype | str:
    """What `from_pretrained` takes for a name; `auto` is float32 where bfloat16 would crawl."""
    import torch

    if name not in DTYPES:
        raise SqueezedError(f"dtype: expected one of {', '.join(DTYPES)}, got {name!r}")
    if name != "auto":
        return getattr(torch, name)
    if target.type == "cpu" and not has_fast_bfloat16():
        return torch.float32
    return torch.bfloat16 if source.gguf_file else "auto"


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware.

    One that does not took four times as long in bfloat16 as in float32.
    """
    import torch

    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).tolist()  # "meta" makes tensors, but holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise SqueezedError(
            f"device: cannot use {name!r} here ({str(error).splitlines()[0][:120]}); use 'cpu' or "
            "'auto'"
        ) from error
    return device
