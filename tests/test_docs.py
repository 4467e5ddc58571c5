"""Documents and examples keep their word: links lead somewhere, code compiles, examples run."""

import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
from methods.contexts import random_call, random_context
from mkdocs.exceptions import PluginError
from tiny import document, tiny_model, tiny_tokenizer

import squeezed
from squeezed.cli.app import group

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]
)
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LINK = re.compile(r"\]\(([^)\s]+)\)")


def named(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.name)


def prose(path):
    """A page without its blocks of code."""
    return re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchor(heading):
    """What a heading is called in links, as GitHub and MkDocs make it."""
    plain = re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower())
    return plain.strip().replace(" ", "-")


def anchors(path):
    return {anchor(line.lstrip("# ")) for line in prose(path).splitlines() if line.startswith("#")}


@named(PAGES)
def test_links_lead_to_files_and_headings_that_exist(path):
    for target in LINK.findall(prose(path)):
        if "://" in target:
            continue
        file, _, heading = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), target
        assert found.is_relative_to(ROOT), target
        assert not heading or heading in anchors(found), target


@named(PAGES)
def test_python_in_pages_compiles(path):
    for block in re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
        compile(block, path.name, "exec")


def test_the_method_that_a_page_shows_reads_its_budget():
    page = (ROOT / "docs" / "write-a-method.md").read_text(encoding="utf-8")
    scope = {"__name__": "page"}
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], scope)
    layers, call = scope["MeanQuery"]().prepare(random_context(), 0.1), random_call(rows=1)
    for layer in layers:
        read = call.attend(layer).keys_read
        assert read.tolist() == [layer.budget_keys * layer.layer.keys.shape[0]] * 2


def test_the_append_that_a_page_shows_reads_the_chapter_only(tmp_path):
    page = (ROOT / "docs" / "growing.md").read_text(encoding="utf-8")
    scope, model, tokenizer = {"__name__": "page"}, tiny_model("llama"), tiny_tokenizer()
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], scope)
    path = squeezed.index(model, tokenizer, document(700)).save(tmp_path / "manual.sqz")
    change = scope["with_chapter"](model, tokenizer, path, document(60, seed=1))
    assert (change.kept, change.read) == (701, 60)
    assert len(squeezed.load(path).tokens) == 761


@named(PAGES)
def test_files_named_in_pages_exist(path):
    """`room/file.py` is one of ours, seen from the root, the package or the tests."""
    for name in re.findall(r"`((?:[\w.]+/)+(?:[\w.]+\.(?:py|md|json|toml))?)`", prose(path)):
        places = (
            ROOT / folder / name for folder in ("", "squeezed", "benchmarks", "benchmarks/h200")
        )
        assert any(place.exists() for place in places), name


@named(PAGES)
def test_commands_in_pages_exist(path):
    for name in re.findall(r"^squeezed (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE):
        assert group().get_command(None, name) is not None, name


def test_every_page_is_in_the_sites_menu():
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"(\S+\.md)", menu.split("\nnav:")[1]))
    assert listed >= {path.name for path in (ROOT / "docs").glob("*.md")}
    assert all(listed & {path.name, str(path.relative_to(ROOT)), "project.md"} for path in PAGES)


@named(EXAMPLES)
def test_example_is_short_and_compiles(path):
    text = path.read_text(encoding="utf-8")
    compile(text, path.name, "exec")
    assert len(text.splitlines()) < 60


def run_of(name):
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="example")["run"]


@pytest.fixture(scope="module")
def asked():
    return tiny_model("llama"), tiny_tokenizer(), document(700)


def test_example_ask_answers_from_a_saved_context(asked, tmp_path):
    answer = run_of("ask")(*asked, "beta?", tmp_path, new_tokens=4)
    assert (tmp_path / "document.sqz" / "context.json").is_file()
    assert len(answer.tokens) == 4
    assert 0 < answer.spending.budget < 0.6


def test_example_conversation_answers_every_turn(asked):
    answers = run_of("conversation")(*asked, ["beta?", "gamma?"], new_tokens=4)
    assert [len(answer.tokens) for answer in answers] == [4, 4]


def test_example_session_answers_from_every_document_and_in_pieces(asked):
    model, tokenizer, text = asked
    texts = {"one": text, "two": document(500, seed=1)}
    with squeezed.Session(model, tokenizer) as session:
        answers, pieces = run_of("session")(session, texts, "beta?", new_tokens=4)
    assert answers.keys() == texts.keys()
    assert "".join(pieces) == answers["two"].text != answers["one"].text


def test_example_own_method_spends_the_budget_and_dense_all(asked):
    answers = run_of("own_method")(*asked, "beta?", budget=0.1, new_tokens=4)
    spent = {name: answer.spending.budget for name, answer in answers.items()}
    assert spent["dense"] == 1
    assert spent["mean-query"] == pytest.approx(0.1, abs=0.01)


def test_example_attention_alone_is_dense_at_a_budget_of_one_and_errs_less_the_more_it_reads():
    errors = run_of("attention_alone")(tokens=2048)
    assert errors[1.0] < 1e-5
    assert errors[0.05] > errors[0.1] > errors[0.3] > 1e-4


def test_a_page_that_loads_something_from_the_network_stops_the_site():
    hook = runpy.run_path(str(ROOT / "docs" / "site_hooks.py"))["on_post_page"]
    page = SimpleNamespace(file=SimpleNamespace(src_uri="page.md"))
    alone = '<img src="plot.png"><a href="https://arxiv.org/abs/2411.09688">paper</a>'
    assert hook(alone, page, None) == alone
    for fetched in (
        '<img alt="x" src="https://example.org/x.png">',
        '<link rel="stylesheet" href="//example.org/font.css">',
    ):
        with pytest.raises(PluginError, match=r"example\.org"):
            hook(alone + fetched, page, None)
