"""What must hold of the installed wheel: run by an interpreter that has it, outside the sources.

python -I tests/packaged.py
"""

import importlib
import pkgutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import squeezed

SERVER = ("fastapi", "pydantic", "pydantic_settings", "prometheus_client", "uvicorn")
OPTIONAL = {
    "squeezed.attention.triton": ("triton",),
    "squeezed.indexing.triton": ("triton",),
    "squeezed.measure.speed": ("triton",),
    "squeezed.server": SERVER,
    "squeezed.cli.serve": SERVER,
    "squeezed.vllm": ("vllm", "triton", "fastapi", "prometheus_client", "psutil"),
}
"""What only these need: a CPU build of torch brings no Triton, and vLLM, with what it brings, is an
extra."""
PAGE = ("index.html", "page.css", "main.js", "icon.svg")
FILES = (
    "py.typed", "demo/sqlite_wal.txt", "demo/README.md", *(f"server/page/{name}" for name in PAGE)
)  # fmt: skip


def main() -> None:
    home = Path(squeezed.__file__).parent
    assert home.is_relative_to(sys.prefix), f"imported {home}, not the wheel in {sys.prefix}"
    for name in FILES:
        assert (home / name).is_file(), f"the wheel lacks {name}"
    print(f"{imported()} modules imported", flush=True)
    command = str(Path(sys.executable).with_name("squeezed"))
    said = subprocess.run([command, "--version"], check=True, capture_output=True, text=True)
    assert said.stdout.split()[-1] == metadata.version("squeezed-attention"), said.stdout
    subprocess.run([command, "demo", "--quick"], check=True)


def imported() -> int:
    """Import every module, and return how many there are."""
    found = [found.name for found in pkgutil.walk_packages(squeezed.__path__, "squeezed.", stop)]
    found = [name for name in found if not name.endswith("__main__")]  # that would run it
    for name in found:
        try:
            importlib.import_module(name)
        except SystemExit as ended:
            raise AssertionError(f"importing {name} ends the process") from ended
        except ModuleNotFoundError as missing:
            if str(missing.name).split(".")[0] not in needed_by(name):
                raise
    return len(found)


def needed_by(name: str) -> set[str]:
    return {need for room, needs in OPTIONAL.items() if name.startswith(room) for need in needs}


def stop(name: str) -> None:
    """A package that does not import hides its modules; one that needs more may."""
    if not needed_by(name):
        raise


if __name__ == "__main__":
    main()
