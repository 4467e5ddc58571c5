"""A context that grew answers as the whole text does; what was there before stays as it was."""

from itertools import pairwise

import pytest
import torch
from test_shapes import QUESTION, build, divergence, indexed, sharing
from tiny import FAMILIES, document, tiny_model, tiny_tokenizer

import squeezed
from squeezed.config import GrowthConfig
from squeezed.context.growth import Tree
from squeezed.context.prompt import PromptTemplate
from squeezed.hf.asking import Asking
from squeezed.hf.editing import append
from squeezed.hf.growing import Growing, silent

TEXT = document(640)
APART = GrowthConfig(whole_tree=0, tail_share=1)
"""Every append plants a tree of its own."""


def grown(model, *lengths, config=APART, **settings):
    """The first of these pieces of `TEXT` indexed, the others appended."""
    context, done = indexed(model, TEXT[: lengths[0]]), lengths[0]
    for length in lengths[1:]:
        more = TEXT[done : done + length]
        context = context.append(
            model, tiny_tokenizer(), more, method="dense", config=config, **settings
        )
        done += length
    return context


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [(400, 240), (300, 7, 133, 1, 199)])
def test_a_grown_context_equals_dense_attention_over_the_whole_text(family, lengths):
    model = tiny_model(family)
    context = grown(model, *lengths)
    assert context.tokens.equal(indexed(model, TEXT).tokens)
    assert divergence(model, context) < 1e-7
    assert divergence(model, context, budget=0.05) > 1e-6


def test_one_that_grew_by_squeezed_attention_at_a_budget_of_one_equals_dense_too():
    model = tiny_model()
    context = indexed(model, TEXT[:400])
    context = context.append(model, tiny_tokenizer(), TEXT[400:], 1.0)
    assert divergence(model, context, implementation="cpu") < 1e-7
    rough = indexed(model, TEXT[:400]).append(model, tiny_tokenizer(), TEXT[400:], 0.05)
    assert divergence(model, rough) > 1e-6


def test_keys_and_values_of_every_token_are_those_of_the_whole_text():
    model = tiny_model("qwen2")
    whole, context = indexed(model, TEXT), grown(model, 350, 200, 90)
    for one, other in zip(whole.layers, context.layers, strict=True):
        for name in ("keys", "values"):
            a, b = (in_order(layer, getattr(layer, name)) for layer in (one, other))
            shift = (other.centre - one.centre)[:, None] if name == "keys" else 0
            torch.testing.assert_close(a, b + shift, rtol=1e-4, atol=1e-4)


def in_order(layer, rows):
    place = layer.positions.long().argsort(1)[..., None].expand_as(rows)
    return rows.gather(1, place)


def test_old_rows_and_nodes_stay_bit_by_bit():
    model = tiny_model()
    old, new = indexed(model, TEXT[:400]), grown(model, 400, 240)
    for before, after in zip(old.layers, new.layers, strict=True):
        own = slice(before.pinned, before.tokens)
        assert before.keys[:, own].equal(after.keys[:, own])
        assert before.values[:, own].equal(after.values[:, own])
        assert before.positions[:, own].equal(after.positions[:, own])
        assert before.centre.equal(after.centre)
        for level, grew in zip(before.levels, after.levels, strict=True):
            for name in ("centroids", "mean_values", "variance", "key_offsets"):
                held = getattr(level, name)
                assert held.equal(getattr(grew, name)[:, : held.shape[1]]), name


def test_pinned_rows_are_the_first_and_the_new_last_tokens():
    context = grown(tiny_model(), 400, 5, 235)
    for layer in context.layers:
        wanted = [*range(4), *range(len(context.tokens) - 20, len(context.tokens))]
        assert layer.positions[:, : layer.pinned].tolist() == [wanted] * 2


def test_every_node_has_the_mean_of_its_rows_and_holds_those_of_its_children():
    for layer in grown(tiny_model(), 300, 100, 240).layers:
        for depth, level in enumerate(layer.levels):
            assert int(level.sizes.sum(1).unique()) == layer.clustered
            for head in range(2):
                ends = level.key_offsets[head].tolist()
                for node, (start, end) in enumerate(pairwise(ends)):
                    if start == end:
                        continue
                    mean = layer.keys[head, start:end].mean(0)
                    torch.testing.assert_close(level.centroids[head, node], mean)
            if depth + 1 < len(layer.levels):
                finer = layer.levels[depth + 1].key_offsets
                assert finer.gather(1, level.child_offsets.long()).equal(level.key_offsets)


def test_the_version_before_answers_on_as_it_did():
    model = tiny_model()
    old = indexed(model, TEXT[:400])
    before = divergence(model, old, 0.1)
    old.append(model, tiny_tokenizer(), TEXT[400:], method="dense")
    assert divergence(model, old, 0.1) == before and len(old.tokens) == 400


def test_small_trees_at_the_end_are_joined_as_if_indexed_at_once():
    model = tiny_model()
    whole, context = indexed(model, TEXT), grown(model, 100, 240, 300, config=GrowthConfig())
    assert context.trees == (Tree(616, (31, 123)),)
    for one, other in zip(whole.layers, context.layers, strict=True):
        assert one.positions.equal(other.positions)


def test_a_large_tree_stays_and_the_small_ones_behind_it_are_joined():
    config = GrowthConfig(whole_tree=300, tail_share=1)
    context = grown(tiny_model(), 400, 100, 140, config=config)
    assert [tree.tokens for tree in context.trees] == [376, 240]


@pytest.mark.parametrize(
    ("lengths", "trees"),
    [
        ((400, 60, 60), [376, 120]),
        ((400, 60, 60, 20), [376, 120, 20]),
        ((400, 60, 60, 100), [596]),
        ((300, 10, 10, 3, 60), [276, 83]),
    ],
)
def test_no_more_than_a_quarter_stands_behind_a_tree(lengths, trees):
    context = grown(tiny_model(), *lengths, config=GrowthConfig(whole_tree=0))
    assert [tree.tokens for tree in context.trees] == trees


def test_a_context_too_short_to_cluster_grows_into_a_clustered_one():
    model = tiny_model()
    context = grown(model, 20, 10)
    assert context.is_dense and context.trees == () and divergence(model, context) < 1e-7
    context = grown(model, 20, 10, 600)
    assert [tree.tokens for tree in context.trees] == [606]
    assert divergence(model, context) < 1e-7


@pytest.mark.parametrize("rows", [2, 3])
def test_batches_over_a_grown_context_equal_single_requests(rows):
    model, context = tiny_model(), grown(tiny_model(), 300, 340)
    model.set_attn_implementation("squeezed")
    ids = torch.tensor([tiny_tokenizer()(QUESTION)["input_ids"]])
    mask = torch.ones(rows, len(context.tokens) + ids.shape[1], dtype=torch.long)
    settings = {"max_new_tokens": 4, "do_sample": False}
    many = model.generate(
        ids.repeat(rows, 1),
        attention_mask=mask,
        past_key_values=context.cache(0.2, implementation="reference"),
        **settings,
    )
    one = model.generate(
        ids,
        attention_mask=mask[:1],
        past_key_values=context.cache(0.2, implementation="reference"),
        **settings,
    )
    assert many.tolist() == one.tolist() * rows


@pytest.mark.transformers("5.23")
def test_layers_that_share_keys_and_windows_beside_them_grow_too():
    types = ["sliding_attention", "full_attention"] * 3
    model = sharing("Gemma4Text", types, 2)
    context = grown(model, 300, 10, 330)
    assert divergence(model, context) < 1e-7
    assert [len(q) for q in context.observed] == [len(q) for q in indexed(model).observed]


def test_windows_hold_the_last_tokens_of_the_grown_text():
    model = tiny_model("gemma3")
    whole, context = indexed(model, TEXT), grown(model, 300, 9, 331)
    for one, other in zip(whole.layers, context.layers, strict=True):
        if not hasattr(one, "levels"):
            assert (one.keys.shape, one.tokens) == (other.keys.shape, other.tokens)
            torch.testing.assert_close(one.keys, other.keys, rtol=1e-4, atol=1e-4)


def test_thresholds_are_fitted_anew_when_a_tenth_is_new_and_not_before():
    context = grown(tiny_model(), 500, 30, 20, 60, 30)
    calibrated = [change.calibrated for change in context.history]
    assert calibrated == [True, False, False, True, False]
    assert [change.read > change.added for change in context.history[1:]] == calibrated[1:]
    kept = grown(tiny_model(), 500, 30)
    grid = indexed(tiny_model(), TEXT[:500]).calibrations["best"].per_token
    assert all(map(torch.equal, kept.calibrations["best"].per_token, grid))


def test_a_grown_context_spends_what_is_asked():
    context = grown(tiny_model(), 300, 340)
    answer = squeezed.generate(
        tiny_model(), tiny_tokenizer(), context, QUESTION, 0.2, implementation="reference",
        max_new_tokens=8,
    )  # fmt: skip
    asked = squeezed.generate(
        tiny_model(), tiny_tokenizer(), indexed(tiny_model(), TEXT), QUESTION, 0.2,
        implementation="reference", max_new_tokens=8,
    )  # fmt: skip
    assert answer.spending.budget == pytest.approx(asked.spending.budget, abs=0.06)


def test_saved_and_loaded_it_is_the_same_and_grows_on(tmp_path):
    model = tiny_model()
    context = grown(model, 300, 100)
    loaded = squeezed.load(context.save(tmp_path / "grown.sqz"), model)
    names = ("pieces", "trees", "history")
    assert [getattr(loaded, x) for x in names] == [getattr(context, x) for x in names]
    assert divergence(model, loaded, 0.1) == divergence(model, context, 0.1)
    further = loaded.append(model, tiny_tokenizer(), TEXT[400:], method="dense", config=APART)
    assert [tree.tokens for tree in further.trees] == [276, 100, 240]
    assert further.pieces == (300, 100, 240) and divergence(model, further) < 1e-7


def test_history_says_what_was_kept_and_read():
    context = grown(tiny_model(), 500, 30)
    first, last = context.history
    assert (first.kind, first.tokens, first.kept, first.read) == ("index", 500, 0, 500)
    assert (last.kind, last.tokens, last.kept, last.dropped) == ("append", 530, 500, 0)
    assert (last.read, last.clustered, last.centre_fits) == (30, 30, True)


def test_the_appended_text_is_tokenised_by_itself():
    template = PromptTemplate.plain()
    tokenizer = tiny_tokenizer()
    context = indexed(tiny_model(), "alpha beta " * 20)
    more = context.append(tiny_model(), tokenizer, "gamma <s> é", method="dense")
    ids = more.tokens[len(context.tokens) :]
    assert tokenizer.decode(ids) == "gamma <s> é"
    assert tokenizer.bos_token_id not in ids.tolist()  # a control token is text
    assert ids.equal(template.further_ids(tokenizer, "gamma <s> é"))


@pytest.mark.parametrize(
    ("text", "message"), [("", "nothing to append"), (3, "text"), ("\ud800", "surrogate")]
)
def test_what_is_no_text_is_refused(text, message):
    context = indexed(tiny_model(), TEXT[:200])
    with pytest.raises(squeezed.SqueezedError, match=message):
        context.append(tiny_model(), tiny_tokenizer(), text, method="dense")


def test_another_model_is_refused_before_it_reads():
    context = indexed(tiny_model(), TEXT[:200])
    with pytest.raises(squeezed.SqueezedError, match="another"):
        context.append(tiny_model(seed=1), tiny_tokenizer(), "more", method="dense")


def test_positions_that_end_are_refused_before_the_model_reads():
    model = build("Llama", max_position_embeddings=512)
    context = indexed(model, TEXT[:400])
    with pytest.raises(squeezed.SqueezedError, match="positions end"):
        context.append(model, tiny_tokenizer(), TEXT[400:], method="dense")


def test_nothing_but_numbers_is_clustered():
    model = build("Llama")
    context = indexed(model, TEXT[:400])
    layer = model.model.layers[2].self_attn

    def spoil(module, args, output):
        return output.index_fill(1, torch.tensor([3]), float("nan"))

    hook = layer.v_proj.register_forward_hook(spoil)
    try:
        with pytest.raises(squeezed.SqueezedError, match="layer 2 hold NaN at token 403"):
            append_unchecked(model, context)
    finally:
        hook.remove()


def append_unchecked(model, context):
    """Past the look at the model, which would see the hook."""
    growing = Growing(model, tiny_tokenizer(), Asking(1.0, method="dense"), APART, silent)
    return append(growing, context, "some more text")


def test_a_saved_document_that_is_read_in_full_answers_and_grows(tmp_path):
    """Shorter than what is always kept, it has no cluster, and its files no row of query heads."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    squeezed.index(model, tokenizer, document(60)).save(tmp_path / "short.sqz")
    short = squeezed.load(tmp_path / "short.sqz", model)
    assert not short.clustered_layers[0].levels
    asked = {"question": "which?", "max_new_tokens": 6}
    made = squeezed.generate(
        model, tokenizer, squeezed.index(model, tokenizer, document(60)), **asked
    )
    assert (
        squeezed.generate(model, tokenizer, short, **asked).tokens.tolist() == made.tokens.tolist()
    )
    grown = short.append(model, tokenizer, document(300, 1))
    assert grown.clustered_layers[0].levels
    whole = squeezed.generate(model, tokenizer, grown, budget=1.0, **asked)
    grown.save(tmp_path / "grown.sqz")
    again = squeezed.load(tmp_path / "grown.sqz", model)
    found = squeezed.generate(model, tokenizer, again, budget=1.0, **asked)
    assert found.tokens.tolist() == whole.tokens.tolist()
