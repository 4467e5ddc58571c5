import importlib
import subprocess
import sys
import warnings

import pytest

from squeezed.moved import MOVED


@pytest.mark.parametrize("old", [name for name in MOVED if "triton" not in name])
def test_a_module_is_found_by_its_old_name_with_a_warning(old):
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=MOVED[old]):
        module = importlib.import_module(old)
    home = importlib.import_module(MOVED[old])
    public = [name for name in vars(home) if not name.startswith("_")]
    assert public and all(getattr(module, name) is getattr(home, name) for name in public)


def test_what_a_moved_module_held_can_be_imported_from_it():
    code = "from squeezed.chat import Chat; from squeezed.ops import cpu; print(Chat, cpu.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "squeezed.answers.chat.Chat" in done.stdout and "squeezed" in done.stdout


def test_a_name_that_never_was_is_not_found():
    with warnings.catch_warnings(), pytest.raises(ModuleNotFoundError):
        importlib.import_module("squeezed.nothing")
