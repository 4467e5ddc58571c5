"""The contract compared with source files: of a vLLM that cannot be installed here.

    python -m squeezed.vllm.sources DIRECTORY

`DIRECTORY` holds `vllm/`, as the Python files of a wheel do. Nothing of it is run.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from squeezed.errors import SqueezedError
from squeezed.vllm import contract

Definition = tuple[str, ast.AST]
"""The module in which a name is defined, and how."""


class Sources:
    """Names of modules, found by reading."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.statements = cache(self._statements)

    def broken(self) -> Iterator[str]:
        """One line for each name of the contract that is not there as it is used."""
        for module, names in contract.SYMBOLS.items():
            for name, parameters in names.items():
                complaint = self._complaint(module, name, parameters.split())
                if complaint:
                    yield f"{module}.{name}: {complaint}"

    def find(self, module: str, name: str) -> Definition | None:
        """What stands behind `name` in `module`, through imports."""
        for node in self.statements(module):
            if isinstance(node, ast.ImportFrom):
                found = self._imported(module, node, name)
                if found is not None:
                    return found
            elif name in _names(node):
                return module, node
        file = self._file(f"{module}.{name}")
        return (f"{module}.{name}", ast.parse("")) if file else None

    def _imported(self, module: str, node: ast.ImportFrom, name: str) -> Definition | None:
        for alias in node.names:
            if alias.name == "*":
                return self.find(self._origin(module, node), name)
            if name == (alias.asname or alias.name):
                return self.find(self._origin(module, node), alias.name)
        return None

    def member(self, found: Definition, name: str) -> Definition | None:
        """An attribute of a class, its bases' too."""
        for module, one in self._lineage(found):
            for node in one.body:
                if name in _names(node):
                    return module, node
        return None

    def parameters(self, found: Definition) -> set[str]:
        """Of a function; of a class, those of its `__init__` and its fields."""
        _, node = found
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            given = node.args
            every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
            return {one.arg for one in every if one is not None}
        if not isinstance(node, ast.ClassDef):
            return set()
        made = self.member(found, "__init__")
        fields = {
            each.target.id
            for _, one in self._lineage(found)
            for each in one.body
            if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
        }
        return fields | (self.parameters(made) if made else set())

    def _complaint(self, module: str, name: str, parameters: list[str]) -> str | None:
        first, *rest = name.split(".")
        found = self.find(module, first)
        for part in rest:
            found = found and self.member(found, part)
        if found is None:
            return "not there"
        known = self.parameters(found)
        missing = [one for one in parameters if one not in known]
        return f"has no {', '.join(missing)}" if missing else None

    def _lineage(self, found: Definition) -> Iterator[tuple[str, ast.ClassDef]]:
        module, node = found
        if not isinstance(node, ast.ClassDef):
            return
        yield module, node
        for base in node.bases:
            name = base.value if isinstance(base, ast.Subscript) else base
            above = self.find(module, name.id) if isinstance(name, ast.Name) else None
            if above is not None:
                yield from self._lineage(above)

    def _statements(self, module: str) -> list[ast.stmt]:
        """Of a module, those under its conditions too."""
        file = self._file(module)
        tree = ast.parse(file.read_text(encoding="utf-8")) if file else ast.parse("")
        return list(_flat(tree.body))

    def _file(self, module: str) -> Path | None:
        path = self.root.joinpath(*module.split("."))
        tried = (path.with_suffix(".py"), path / "__init__.py")
        return next((file for file in tried if file.is_file()), None)

    def _origin(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        file, parts = self._file(module), module.split(".")
        inside = file is not None and file.name == "__init__.py"
        kept = parts[: len(parts) - node.level + inside]
        return ".".join([*kept, *([node.module] if node.module else [])])


def _flat(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        for part in ("body", "orelse", "handlers", "finalbody"):
            if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from _flat(getattr(node, part, []))


def _names(node: ast.AST) -> set[str]:
    if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {one.id for one in targets if isinstance(one, ast.Name)}


def main(words: list[str]) -> int:
    """Print what is missing; the status is 1 if anything is."""
    root = Path(words[0]) if len(words) == 1 else Path()
    if not (root / "vllm" / "__init__.py").is_file():
        raise SqueezedError(f"DIRECTORY: expected one that holds vllm/, got {' '.join(words)!r}")
    lines = list(Sources(root).broken())
    print("\n".join(lines) or f"all of {sum(map(len, contract.SYMBOLS.values()))} names are there")
    return 1 if lines else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except SqueezedError as error:
        sys.exit(f"error: {error}")
