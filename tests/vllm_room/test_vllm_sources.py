from pathlib import Path

import pytest

from squeezed.errors import SqueezedError
from squeezed.vllm import contract, sources

FILES = {
    "vllm/__init__.py": "from .version import __version__\nif T:\n    from vllm.a.deep import Late",
    "vllm/version.py": "try:\n    from x import y\nexcept ImportError:\n    __version__ = '1'",
    "vllm/a/__init__.py": "from .deep import *\nfrom vllm.a.deep import Base as Renamed, call",
    "vllm/a/deep.py": """
import enum
class Late(Struct):
    first: int = 0
class Base(Generic[T]):
    inherited: int
    def method(self, one, *rest, two=None, **more): ...
async def call(a, /, b): ...
class Kind(enum.Enum):
    CUSTOM = "x"
value: "Kind"
""",
    "vllm/b.py": """
from vllm.a import Renamed
class Own(Renamed["T"]):
    own: int
    @property
    def told(self): ...
class Made:
    def __init__(self, x, y): ...
""",
}
THERE = {
    "vllm": {"__version__": "", "Late": "first", "a": ""},
    "vllm.a": {"Renamed": "inherited", "call": "a b", "deep": "", "Kind.CUSTOM": ""},
    "vllm.a.deep": {"Kind.CUSTOM": "", "value": "", "Base.method": "one rest two more"},
    "vllm.b": {"Own": "own inherited", "Own.method": "one", "Own.told": "", "Made": "x y"},
}


@pytest.fixture
def root(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def lines(root, monkeypatch, symbols):
    monkeypatch.setattr(contract, "SYMBOLS", symbols)
    return list(sources.Sources(root).broken())


def test_names_are_found_through_imports_bases_and_conditions(root, monkeypatch):
    assert lines(root, monkeypatch, THERE) == []


@pytest.mark.parametrize(
    "module, name, wanted, said",
    [
        ("vllm.b", "Own.other", "", "not there"),
        ("vllm.b", "Nothing", "", "not there"),
        ("vllm.c", "Own", "", "not there"),
        ("vllm.b", "Own", "own lost", "has no lost"),
        ("vllm.b", "Own.method", "one three four", "has no three, four"),
        ("vllm.a.deep", "Kind.OTHER", "", "not there"),
        ("vllm.a", "call", "c", "has no c"),
    ],
)
def test_what_is_missing_is_one_line(root, monkeypatch, module, name, wanted, said):
    found = lines(root, monkeypatch, {module: {name: wanted}})
    assert found == [f"{module}.{name}: {said}"]


def test_the_command_says_how_many_names_are_there(root, monkeypatch, capsys):
    monkeypatch.setattr(contract, "SYMBOLS", THERE)
    assert sources.main([str(root)]) == 0
    assert capsys.readouterr().out == "all of 14 names are there\n"
    monkeypatch.setattr(contract, "SYMBOLS", THERE | {"vllm.c": {"x": ""}})
    assert sources.main([str(root)]) == 1
    for words in ([], [str(Path(root) / "vllm")], ["a", "b"]):
        with pytest.raises(SqueezedError, match="DIRECTORY"):
            sources.main(words)
