"""Schemathesis against the server's own description: whatever is sent, nothing is a 500."""

import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode
from served import serving
from tiny import document, tiny_model, tiny_tokenizer

import squeezed

EXAMPLES = 12


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    root = tmp_path_factory.mktemp("contexts")
    for name in ("one", "string"):
        context = squeezed.index(tiny_model(), tiny_tokenizer(), document(300))
        context.save(root / f"{name}.sqz")
    with serving(root, served_name="tiny", answer_tokens=2, max_answer_tokens=4) as served:
        yield served


@pytest.fixture(scope="module")
def described(served):
    return schemathesis.openapi.from_url(f"{served.base}/openapi.json")


def sent(served, case):
    """Send one case; whatever it is, the answer is no fault, and an error one line."""
    if case.path.endswith("/events"):
        case.path_parameters = {"id": "job-none"}
    answer = case.call(base_url=served.base, timeout=60)
    assert answer.status_code < 500, (case.as_curl_command(), answer.text)
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert error["message"] and "\n" not in error["message"]


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.name)
def test_nothing_that_is_sent_makes_the_server_fail(served, described, mode):
    tried = 0
    for found in described.get_all_operations():
        operation = found.ok()
        try:
            strategy = operation.as_strategy(generation_mode=mode)
            run = hypothesis.given(case=strategy)(lambda case: sent(served, case))
            hypothesis.settings(
                max_examples=EXAMPLES,
                deadline=None,
                derandomize=True,
                database=None,
                suppress_health_check=list(hypothesis.HealthCheck),
            )(run)()
        except hypothesis.errors.Unsatisfiable:  # nothing about it could be wrong
            assert mode is GenerationMode.NEGATIVE
            continue
        tried += 1
    assert tried >= 4


def test_server_goes_on_after_all_that(served):
    with served.http() as http:
        assert http.get("/ready").status_code == 200
