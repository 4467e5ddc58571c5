import ast
from pathlib import Path

import squeezed
from squeezed.vllm.contract import SYMBOLS, broken

ROOM = Path(squeezed.__file__).parent / "vllm"


def imported():
    """`(module, name)` of vLLM, wherever the room imports it."""
    found = set()
    for file in ROOM.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                found |= {(node.module, alias.name) for alias in node.names}
    return found


def test_every_name_of_vllm_that_is_imported_is_in_the_contract():
    known = {(module, name.split(".")[0]) for module, names in SYMBOLS.items() for name in names}
    assert len(imported()) > 20
    assert not imported() - known


def test_a_name_that_is_not_there_is_one_readable_line(monkeypatch):
    monkeypatch.setattr(
        "squeezed.vllm.contract.SYMBOLS",
        {
            "json": {"dumps": "obj skipkeys", "nothing": ""},
            "dataclasses": {"replace": "obj other"},
            "no_such_module": {"name": ""},
        },
    )
    lines = list(broken())
    assert len(lines) == 3
    assert lines[0].startswith("json.nothing: not there")
    assert lines[1] == "dataclasses.replace: has no other"
    assert lines[2].startswith("no_such_module.name: not there")
