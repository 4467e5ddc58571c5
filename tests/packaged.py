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

WITHOUT_TRITON = ("squeezed.attention.triton", "squeezed.indexing.triton")
"""A CPU build of torch brings no Triton, and only these need it."""
FILES = ("py.typed", "demo/sqlite_wal.txt", "demo/README.md")


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
    for name in found:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as missing:
            if missing.name != "triton" or not name.startswith(WITHOUT_TRITON):
                raise
    return len(found)


def stop(name: str) -> None:
    """A package that does not import hides its modules; those without Triton may."""
    if not name.startswith(WITHOUT_TRITON):
        raise


if __name__ == "__main__":
    main()
