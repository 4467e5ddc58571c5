"""A context whose text was cut or changed answers as the new text does; what stands is kept."""

import pytest
import torch
from made import same_context
from test_appending import APART, TEXT, grown
from test_shapes import CONFIG, divergence, indexed
from tiny import document, tiny_model, tiny_tokenizer

import squeezed
from squeezed.config import GrowthConfig
from squeezed.context.storage.outline import Outline
from squeezed.context.storage.structure import check_layer, tensors_of

PAIR = tiny_model("llama"), tiny_tokenizer()
HOW = {"method": "dense", "config": APART}


def sound(context):
    """Whether every layer is one that a file may hold."""
    for layer in context.layers:
        check_layer(tensors_of(layer), Outline.of(layer), len(context.tokens))
    return True


@pytest.mark.parametrize("lengths", [(640,), (300, 200, 140)])
@pytest.mark.parametrize("tokens", [639, 621, 501, 500, 460, 300, 120, 60, 25, 10, 1])
def test_a_cut_context_equals_dense_attention_over_what_is_left(lengths, tokens):
    context = grown(PAIR[0], *lengths).crop(tokens)
    assert context.tokens.equal(indexed(PAIR[0], TEXT).tokens[:tokens]) and sound(context)
    assert divergence(PAIR[0], context) < 1e-7
    assert context.pieces and sum(context.pieces) == tokens
    assert sum(tree.tokens for tree in context.trees) == max(0, context.layers[0].clustered)


def test_nodes_that_lost_rows_are_described_anew_and_the_others_stay():
    old = indexed(PAIR[0], TEXT)
    new = old.crop(560)
    for before, after in zip(old.layers, new.layers, strict=True):
        for level, cut in zip(before.levels, after.levels, strict=True):
            same = cut.sizes == level.sizes[:, : cut.nodes]
            assert 0.05 < same.float().mean() < 1
            for name in ("centroids", "mean_values", "variance"):
                held = getattr(level, name)[:, : cut.nodes]
                assert held[same].equal(getattr(cut, name)[same])
            for head in range(2):
                for node in range(cut.nodes):
                    start, end = cut.key_offsets[head, node : node + 2].tolist()
                    if start < end:
                        mean = after.values[head, start:end].mean(0)
                        torch.testing.assert_close(cut.mean_values[head, node], mean)


def test_variances_of_a_cut_node_are_those_of_its_rows():
    """Measured where the tree was: nodes whose rows all stay have the same variance again."""
    from squeezed.indexing.cropping import _space
    from squeezed.indexing.statistics import describe_level

    context = indexed(PAIR[0], TEXT)
    layer, queries = context.layers[0], context.observed[0]
    space, level = _space(layer, queries, CONFIG.clustering), layer.levels[-1]
    again = describe_level(layer.keys, layer.values, level.key_offsets.long(), None, space)
    torch.testing.assert_close(again.variance, level.variance, rtol=1e-3, atol=1e-5)


def test_a_cut_that_leaves_little_of_a_tree_clusters_it_anew():
    context = indexed(PAIR[0], TEXT).crop(150)
    assert context.trees[0].nodes == CONFIG.clustering.counts(150)
    assert context.history[-1].clustered == 126
    assert indexed(PAIR[0], TEXT).crop(600).history[-1].clustered == 0


def test_a_cut_says_what_went_and_fits_thresholds_when_a_tenth_did():
    context = indexed(PAIR[0], TEXT)
    little, much = context.crop(-30), context.crop(-100)
    assert [x.history[-1].calibrated for x in (little, much)] == [False, True]
    last = much.history[-1]
    assert (last.kind, last.tokens, last.kept, last.dropped, last.read) == (
        "crop", 540, 540, 100, 0,
    )  # fmt: skip
    assert [x.history[-1].calibrated for x in (little.crop(-20), little.crop(-50))] == [False, True]
    assert context.crop(640) is context and len(context.tokens) == 640


@pytest.mark.parametrize("tokens", [0, 641, -640, -641, 1.5, "3", True])
def test_a_cut_to_nothing_is_refused(tokens):
    with pytest.raises(squeezed.SqueezedError, match="tokens: expected"):
        indexed(PAIR[0], TEXT).crop(tokens)


def test_sliding_windows_cannot_be_cut_and_may_grow_by_an_update():
    model = tiny_model("gemma3")
    context = indexed(model, TEXT[:400])
    with pytest.raises(squeezed.SqueezedError, match="sliding windows"):
        context.crop(300)
    with pytest.raises(squeezed.SqueezedError, match="sliding windows"):
        context.update(model, PAIR[1], TEXT[:300] + "x" + TEXT[301:], **HOW)
    assert divergence(model, context.update(model, PAIR[1], TEXT, **HOW)) < 1e-7


@pytest.mark.parametrize("place", [6, 30, 300, 399, 500, 635])
@pytest.mark.parametrize("lengths", [(640,), (300, 200, 140)])
def test_an_update_keeps_what_stands_before_the_change_and_reads_the_rest(lengths, place):
    text = TEXT[:place] + "OMEGA" + TEXT[place:]
    context = grown(PAIR[0], *lengths).update(*PAIR, text, **HOW)
    assert context.tokens.equal(indexed(PAIR[0], text).tokens) and sound(context)
    assert divergence(PAIR[0], context) < 1e-7
    last = context.history[-1]
    assert (last.kind, last.kept, last.dropped) == ("replace", place, 640 - place)
    assert last.added == 645 - place and last.read >= last.added


def test_an_update_that_adds_at_the_end_drops_nothing():
    context = indexed(PAIR[0], TEXT[:400]).update(*PAIR, TEXT, **HOW)
    last = context.history[-1]
    assert (last.kept, last.dropped, last.added) == (400, 0, 240)
    assert context.pieces == (400, 240)


def test_an_update_to_a_beginning_cuts_and_to_the_same_text_does_nothing():
    context = grown(PAIR[0], 400, 240)
    shorter = context.update(*PAIR, TEXT[:430], **HOW)
    assert shorter.pieces == (400, 30) and shorter.history[-1].kind == "crop"
    assert shorter.history[-1].read == 0 and divergence(PAIR[0], shorter) < 1e-7
    same = context.update(*PAIR, TEXT, **HOW)
    assert same_context(same, context) and len(same.history) == 2


def test_an_update_keeps_the_pieces_that_it_begins_with():
    context = grown(PAIR[0], 300, 200, 140)
    text = TEXT[:520] + "x" + TEXT[521:]
    assert context.update(*PAIR, text, **HOW).pieces == (300, 200, 140)


def test_replace_puts_one_passage_in_the_place_of_another():
    text = document(300) + " OMEGA " + document(200, seed=1)
    context = indexed(PAIR[0], text)
    changed = context.replace(*PAIR, "OMEGA", "psi", **HOW)
    assert PAIR[1].decode(changed.tokens) == text.replace("OMEGA", "psi")
    assert changed.history[-1].kept == 301 and divergence(PAIR[0], changed) < 1e-7
    gone = changed.replace(*PAIR, " psi", "", **HOW)
    assert PAIR[1].decode(gone.tokens) == text.replace(" OMEGA", "")


@pytest.mark.parametrize(
    ("old", "message"), [("absent", "0 times"), ("alpha", "times; give more"), ("", "got no text")]
)
def test_a_passage_that_does_not_stand_once_is_refused(old, message):
    with pytest.raises(squeezed.SqueezedError, match=message):
        indexed(PAIR[0], TEXT).replace(*PAIR, old, "x", **HOW)


def test_a_text_that_begins_otherwise_is_refused():
    with pytest.raises(squeezed.SqueezedError, match="nothing can be kept"):
        indexed(PAIR[0], TEXT).update(*PAIR, "Z" + TEXT, **HOW)
    with pytest.raises(squeezed.SqueezedError, match="empty"):
        indexed(PAIR[0], TEXT).update(*PAIR, " ", **HOW)


def test_changes_of_every_kind_follow_each_other_and_are_saved(tmp_path):
    model, tokenizer = PAIR
    context = indexed(model, TEXT[:300])
    context = context.append(model, tokenizer, TEXT[300:400], **HOW).crop(380)
    context = context.append(model, tokenizer, TEXT[380:], method="dense", config=GrowthConfig())
    context = context.update(model, tokenizer, TEXT + " and more", **HOW).crop(-4)
    context = squeezed.load(context.save(tmp_path / "c.sqz"), model)
    kinds = [change.kind for change in context.history]
    assert kinds == ["index", "append", "crop", "append", "replace", "crop"]
    assert tokenizer.decode(context.tokens) == TEXT + " and "
    assert sound(context) and divergence(model, context) < 1e-7


def test_with_a_chat_template_the_beginning_stays():
    model, tokenizer = PAIR
    context = squeezed.index(model, tokenizer, TEXT)  # begins with <s>
    changed = context.update(model, tokenizer, TEXT[:500], **HOW)
    assert len(changed.tokens) == 501 and changed.pieces == (501,)
    changed = changed.update(model, tokenizer, TEXT[:200] + "é" + TEXT[300:], **HOW)
    assert changed.history[-1].kept == 201
    assert tokenizer.decode(changed.tokens) == "<s>" + TEXT[:200] + "é" + TEXT[300:]
