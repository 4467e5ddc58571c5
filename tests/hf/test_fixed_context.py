"""What a context's caches may be asked for."""

import pytest
from tiny import document, tiny_model, tiny_tokenizer

import squeezed


@pytest.fixture(scope="module")
def context():
    return squeezed.index(tiny_model(), tiny_tokenizer(), document())


def test_budget_one_keeps_everything(context):
    rule = context.calibration("best").rule(0, 1.0, block=False)
    assert rule.log_thresholds.numel() and (rule.log_thresholds == float("-inf")).all()


@pytest.mark.parametrize("budget", [0, -1, 1.5, float("nan"), "0.1", True])
def test_bad_budget_is_refused(context, budget):
    with pytest.raises(squeezed.SqueezedError, match="budget"):
        context.cache(budget)


def test_unknown_preset_and_implementation_are_refused(context):
    with pytest.raises(squeezed.SqueezedError, match="preset"):
        context.cache(preset="fast")
    with pytest.raises(squeezed.SqueezedError, match="implementation"):
        squeezed.generate(tiny_model(), tiny_tokenizer(), context, "x", implementation="warp")


def test_triton_is_not_replaced_in_silence(context):
    with pytest.raises(squeezed.SqueezedError, match="needs a context on a GPU"):
        squeezed.generate(tiny_model(), tiny_tokenizer(), context, "x", implementation="triton")
