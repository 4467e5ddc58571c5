"""The README keeps its word: snippets run, commands parse, paths exist, the table is stored."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
from tiny import document, tiny_model, tiny_tokenizer

from squeezed.cli.app import group

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith("squeezed ")]


def test_readme_snippets_run(tmp_path, monkeypatch, capsys):
    import transformers

    model, before = tiny_model("llama"), tiny_model("llama").config._attn_implementation
    for name, value in (
        ("AutoModelForCausalLM", model),
        ("AutoTokenizer", tiny_tokenizer()),
    ):
        loader = getattr(transformers, name)
        monkeypatch.setattr(loader, "from_pretrained", lambda *a, value=value, **k: value)
    monkeypatch.chdir(tmp_path)
    Path("manual.txt").write_text(document(700), encoding="utf-8")
    scope = {}
    try:
        for snippet in blocks("python"):
            exec(compile(snippet, "README.md", "exec"), scope)
    finally:
        model.set_attn_implementation(before)
    assert (tmp_path / "manual.sqz" / "context.json").is_file()
    assert scope["output"].shape[1] == scope["ids"].shape[1] + 32
    assert 0 < scope["answer"].spending.budget < 1


@pytest.mark.parametrize("line", commands())
def test_readme_commands_parse(line):
    name, *words = shlex.split(line)[1:]
    command = group().get_command(None, name)
    assert command is not None
    if "--help" not in words:
        command.make_context(name, words)


def test_readme_names_the_make_targets_that_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"^make (\w+)", "\n".join(blocks("sh")), re.MULTILINE))
    assert {"demo", "test"} <= named
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in named)
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_readme_tree_names_what_exists():
    folder = ROOT
    for line in blocks("text")[0].splitlines():
        if line.strip():
            name = line.split()[0]
            folder = ROOT if not line.startswith(" ") else ROOT / "squeezed"
            assert (folder / name).exists(), name


def test_readme_figures_are_the_stored_runs():
    script = runpy.run_path(str(ROOT / "benchmarks" / "readme.py"))
    assert script["filled"](README) == README
