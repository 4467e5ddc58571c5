"""What libraries raise, wrong types and senseless settings: one line with cause and remedy."""

import errno
import pickle

import pytest
import torch
import transformers
from safetensors import SafetensorError
from tiny import document, tiny_model, tiny_tokenizer

import squeezed
from squeezed.config import BEST, ClusteringConfig, IndexConfig, Preset
from squeezed.costs.inspection import check_picture
from squeezed.costs.plan import plan
from squeezed.costs.shape import model_shape
from squeezed.errors import SqueezedError
from squeezed.system.failures import explained


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), "memory: "),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9"), "memory: "),
        (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), "memory: "),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory: "),
        (FileNotFoundError(errno.ENOENT, "No such file", "layer_000"), "layer_000: .* moved"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x"), "shorter name"),
        (SafetensorError("header too large"), "damaged or cut"),
        (EOFError("Ran out of input"), "damaged or cut"),
        (pickle.UnpicklingError("truncated"), "damaged or cut"),
    ],
)
def test_known_failures_are_one_line_with_a_remedy(error, says):
    line = str(explained(error))
    assert "\n" not in line and ";" in line
    with pytest.raises(SqueezedError, match=says):
        raise explained(error)


def test_unknown_failures_are_nobodys():
    assert explained(ZeroDivisionError("division by zero")) is None
    assert explained(RuntimeError("shapes do not match")) is None


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ClusteringConfig(levels=0.1), "levels: expected a tuple"),
        (lambda: ClusteringConfig(levels=("a",)), "levels: "),
        (lambda: ClusteringConfig(iterations=2.5), "iterations: expected a whole number"),
        (lambda: ClusteringConfig(pinned_first=True), "pinned_first: "),
        (lambda: ClusteringConfig(query_space="no"), "query_space: "),
        (lambda: IndexConfig(presets=("best",)), "presets: .*'best'"),
        (lambda: IndexConfig(presets=BEST), "presets: "),
        (lambda: IndexConfig(presets=()), "presets: "),
        (lambda: IndexConfig(budgets=0.1), "budgets: "),
        (lambda: IndexConfig(clustering=(0.01, 0.05)), "clustering: "),
        (lambda: IndexConfig(prefill_chunk=None), "prefill_chunk: .*None"),
        (lambda: Preset("p", True, "none", "1"), "coarse_share: "),
    ],
)
def test_configurations_of_wrong_types_are_refused(make, says):
    with pytest.raises(SqueezedError, match=says):
        make()


def test_a_list_of_levels_is_a_tuple_of_levels():
    assert ClusteringConfig(levels=[0.01, 0.05]) == ClusteringConfig(levels=(0.01, 0.05))


def test_calls_with_wrong_types_are_refused(tmp_path):
    model, tokenizer, text = tiny_model("llama"), tiny_tokenizer(), document(300)
    context = squeezed.index(model, tokenizer, text)
    for call, says in (
        (lambda: squeezed.index(model, tokenizer, None), "text: .*None"),
        (lambda: squeezed.index(model, tokenizer, text.encode()), "text: .*bytes"),
        (lambda: squeezed.index(tokenizer, model, text), "model: "),
        (lambda: squeezed.index(model, None, text), "tokenizer: "),
        (lambda: squeezed.index(model, tokenizer, text, {}), "config: "),
        (lambda: squeezed.index(model, tokenizer, text, template="x"), "template: "),
        (lambda: squeezed.generate(model, tokenizer, context, None), "question: .*None"),
        (lambda: squeezed.generate(model, tokenizer, "a.sqz", "q"), "context: "),
        (lambda: squeezed.generate(model, tokenizer, context, "q", budget="1"), "budget: "),
        (lambda: squeezed.generate(model, tokenizer, context, "q", preset=None), "preset: "),
        (lambda: squeezed.generate(model, tokenizer, context, "q", method=[]), "method: "),
        (lambda: context.cache(suffix_tokens=-1), "suffix_tokens: "),
        (lambda: context.cache(implementation=[]), "implementation: "),
        (lambda: squeezed.load(None), "path: "),
        (lambda: context.save(7), "path: "),
    ):
        with pytest.raises(SqueezedError, match=says):
            call()


@pytest.mark.parametrize("bandwidth", [float("nan"), float("inf"), 1e300, 1e-300, -1.0, "fast"])
def test_plan_refuses_bandwidths_that_no_memory_has(bandwidth):
    shape = model_shape(tiny_model("llama").config)
    with pytest.raises(SqueezedError, match="bandwidth: "):
        plan(shape, 1000, 0.1, bandwidth, ClusteringConfig(), BEST)


def test_plan_refuses_heads_that_cannot_share():
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=3,
        intermediate_size=8,
        vocab_size=8,
    )
    with pytest.raises(SqueezedError, match="4 heads cannot share 3"):
        model_shape(config)


def test_picture_is_refused_before_the_work(tmp_path):
    (tmp_path / "pictures.png").mkdir()
    for name in ("pictures", "a.txt", "pictures.png", "none/a.png", "x" * 300 + ".png"):
        with pytest.raises(SqueezedError):
            check_picture(tmp_path / name)
    check_picture(tmp_path / "a.png")
