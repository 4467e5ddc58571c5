"""Result files become tables and plots; the command line reports bad input in one line."""

import json
import re

import pytest
from typer.testing import CliRunner

from measure.examples import made_document, runner
from squeezed.cli.eval import app
from squeezed.measure.accuracy import report


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "r.jsonl"
    runner(path, ("best", "quest"), (0.1, 0.3), measure_errors=True).run([made_document()])
    return path


def test_interval_holds_the_mean_and_narrows_with_more_values():
    few, many = report.interval([0.0, 1.0] * 5), report.interval([0.0, 1.0] * 500)
    assert few[0] == many[0] == 0.5
    assert few[1] < many[1] < 0.5 < many[2] < few[2]


def test_report_has_a_row_for_every_method_and_budget(results):
    tables = report.collect([results])
    text = report.markdown(tables)
    rows = [
        line.split(" | ") for line in text.splitlines() if line.startswith(("| best", "| quest"))
    ]
    assert len(rows) == 4
    shares = [float(row[3].rstrip("%")) for row in rows]
    assert shares == sorted(shares)
    assert "error, p99 of the worst layer" in text and "tiny, 600 tokens" in text


def test_report_counts_an_answer_in_two_files_once(results, tmp_path):
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(results.read_bytes())
    (once,), (both,) = (report.collect(files).values() for files in ([results], [results, copy]))
    assert {key: cell.scores for key, cell in once.items()} == {
        key: cell.scores for key, cell in both.items()
    }


def test_report_merges_files_of_several_tasks(results, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(results.read_text().replace('"task": "made"', '"task": "second"'))
    tables = report.with_averages(report.collect([results, other]))
    (whole,) = (table for (_, task), table in tables.items() if task == "all")
    assert len(whole["best", 0.1].keys_share) == 6


def test_report_command_writes_table_and_plots(results, tmp_path):
    found = CliRunner().invoke(app, ["report", str(results), "--output", str(tmp_path)])
    assert found.exit_code == 0, found.output
    assert (tmp_path / "table.md").read_text().startswith("### made up")
    plots = sorted(path.name for path in tmp_path.glob("*.png"))
    assert any(name.endswith("_kl.png") for name in plots)
    assert all((tmp_path / name).stat().st_size > 5000 for name in plots)


def test_report_command_gives_json(results):
    found = CliRunner().invoke(app, ["report", str(results), "--json"])
    record = json.loads(found.stdout)
    assert record["runs"][0]["model"] == "tiny"
    assert {row["method"] for row in record["results"]} == {"dense", "best", "quest"}
    errors = next(row for row in record["results"] if row["method"] == "quest")
    assert len(errors["error_mean"]) == len(errors["error_p99"]) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "rules"], r"suite: expected one of"),
        (["--suite", "niah", "--budgets", "ten"], r"budgets: expected numbers"),
        (["--suite", "niah", "--budgets", "0"], r"budget: expected a share"),
        (["--suite", "niah"], r"model: expected a directory"),
        (["report", "nowhere.jsonl"], r"results: expected a result file"),
    ],
)
def test_command_reports_bad_input_in_one_line(arguments, message):
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 2
    errors = [line for line in found.stderr.splitlines() if line]
    assert len(errors) == 1 and re.match(rf"error: {message}", errors[0])
