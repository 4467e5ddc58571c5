"""Every method against its defining formula, written as loops."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from methods.contexts import DIM, GROUP, KV_HEADS, PINNED, SCALE, random_call, random_context
from squeezed.attention.scores import grouped
from squeezed.config import BEST
from squeezed.methods import create
from squeezed.methods.lazyllm import shares
from squeezed.methods.masked import Queries, fill
from squeezed.methods.snapkv import votes


def queries_of(query, per_token=True):
    q = grouped(query, KV_HEADS)
    valid = torch.ones(q.shape[0], q.shape[3], dtype=torch.bool)
    return Queries(q, valid, q.shape[3] if per_token else 0, SCALE, BEST.query_block)


def kept(name, budget, call, context=None, **settings):
    """What every layer keeps, `[B, Hkv, N, R]`."""
    layers = create(name, **settings).prepare(context or random_context(), budget)
    return layers, [layer._keep_all_blocks(queries_of(call.query)) for layer in layers]


def test_quest_bound_is_the_largest_score_in_the_page_box():
    call = random_call(batch=1, rows=1)
    layer = create("quest").prepare(random_context(), 0.1)[0]
    bounds = layer.bound_logits(queries_of(call.query))
    keys, positions = layer.layer.keys[:, PINNED:], layer.layer.positions[:, PINNED:]
    for head in range(KV_HEADS):
        in_document = keys[head, positions[head].argsort()]
        for page, inside in enumerate(in_document.split(16)):
            low, high = inside.amin(0), inside.amax(0)
            for g in range(GROUP):
                q = call.query[0, head * GROUP + g, 0]
                expected = SCALE * torch.maximum(q * low, q * high).sum()
                torch.testing.assert_close(bounds[0, head, g, 0, page], expected)
                assert (SCALE * inside @ q).max() <= expected + 1e-5


def test_quest_keeps_whole_pages_with_the_highest_bounds():
    call = random_call(batch=1, rows=1)
    layers, masks = kept("quest", 0.2, call)
    layer, mask = layers[0], masks[0][0, :, 0]
    scores = layer.bound_logits(queries_of(call.query)).log_softmax(-1)[0, :, :, 0].amax(1)
    for head in range(KV_HEADS):
        pages = layer.page[head]
        read = {int(p) for p in pages[mask[head]]}
        assert all(mask[head, pages == p].all() for p in read)
        left = [float(scores[head, p]) for p in set(pages.tolist()) - read]
        assert min(float(scores[head, p]) for p in read) > max(left)


def test_snapkv_votes_are_the_pooled_mass_of_the_window():
    context = random_context(layers=1)
    layer, observed = context.clustered_layers[0], context.observed[0]
    found = votes(layer, observed, 3)
    window, positions = observed.shape[1], layer.positions
    for head in range(KV_HEADS):
        mass = torch.zeros(layer.tokens)
        for g in range(GROUP):
            for w in range(window):
                logits = SCALE * layer.keys[head] @ observed[head * GROUP + g, w]
                weights = logits.softmax(-1)
                mass[positions[head].long()] += weights / GROUP
        rows = positions[head, PINNED:].long()
        in_document = mass[rows.sort().values]
        for row, place in enumerate(rows.argsort().argsort().tolist()):
            near = in_document[max(0, place - 1) : place + 2]
            torch.testing.assert_close(found[head, row], near.max(), rtol=1e-4, atol=1e-6)


def test_streaming_keeps_the_most_recent_positions():
    layers, masks = kept("streaming", 0.1, random_call())
    for layer, mask in zip(layers, masks, strict=True):
        positions = layer.layer.positions[:, PINNED:]
        for head in range(KV_HEADS):
            inside = positions[head][mask[0, head, 0]]
            outside = positions[head][~mask[0, head, 0]]
            assert len(inside) == 28 and inside.min() > outside.max()


def test_oracle_keeps_the_largest_weights_of_the_layer():
    call = random_call(batch=1, rows=1)
    layers, masks = kept("oracle", 0.1, call)
    tree, mask = layers[0].layer, masks[0][0, :, 0]
    weights = []
    for head in range(KV_HEADS):
        q = call.query[0, head * GROUP : (head + 1) * GROUP, 0]
        weights.append((SCALE * q @ tree.keys[head].T).softmax(-1)[:, PINNED:].amax(0))
    weights = torch.stack(weights)
    assert mask.sum() == 28 * KV_HEADS
    assert weights[mask].min() >= weights[~mask].max()


def test_random_reads_the_same_rows_again_and_each_head_its_own():
    _, first = kept("random", 0.1, random_call(seed=1))
    _, again = kept("random", 0.1, random_call(seed=2))
    assert torch.equal(first[0], again[0]) and first[0][0, 0, 0].sum() == 28
    assert not torch.equal(first[0][0, 0], first[0][0, 1])


def test_routing_reads_the_clusters_with_the_nearest_centroids():
    call = random_call(batch=1, rows=1)
    layers, masks = kept("routing", 0.2, call)
    leaves, mask = layers[0].layer.levels[-1], masks[0][0, :, 0]
    for head in range(KV_HEADS):
        q = call.query[0, head * GROUP : (head + 1) * GROUP, 0]
        near = torch.cosine_similarity(q[:, None], leaves.centroids[head], dim=-1).amax(0)
        inside, outside = [], []
        for node in range(leaves.nodes):
            start, end = (int(x) - PINNED for x in leaves.key_offsets[head, node : node + 2])
            if end > start:
                rows = mask[head, start:end]
                assert rows.all() or not rows.any()
                (inside if rows.any() else outside).append(float(near[node]))
        assert min(inside) > max(outside)


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_retrieval_finds_the_exact_top_keys(kind):
    pytest.importorskip("faiss")
    call = random_call(batch=1, rows=1)
    layers, masks = kept("retrieval", 0.1, call, index=kind)
    tree, mask = layers[0].layer, masks[0][0, :, 0]
    for head in range(KV_HEADS):
        q = call.query[0, head * GROUP : (head + 1) * GROUP, 0]
        logits = SCALE * q @ tree.keys[head, PINNED:].T
        best = logits.topk(28, -1)
        shared = (logits - best.values.logsumexp(-1, keepdim=True)).amax(0)
        expected = torch.zeros_like(shared, dtype=torch.bool)
        expected[shared.topk(28).indices] = True
        assert (mask[head] & expected).sum() >= (28 if kind == "flat" else 27)


def test_retrieval_indexes_a_context_once_for_all_budgets(monkeypatch):
    pytest.importorskip("faiss")
    from squeezed.methods import retrieval

    built = []
    build = retrieval.build
    monkeypatch.setattr(retrieval, "build", lambda *a: built.append(1) or build(*a))
    method, context = create("retrieval"), random_context()
    for budget in (0.05, 0.1, 0.2):
        method.prepare(context, budget)
    assert len(built) == 2 * KV_HEADS


def test_multipole_adds_dropped_nodes_by_size_centroid_and_mean_value():
    call = random_call(batch=1, rows=1)
    layers, masks = kept("multipole", 0.1, call)
    layer, mask = layers[0], masks[0][0, :, 0]
    output, log_mass, _ = call.attend(layer)
    found = layer.descend(queries_of(call.query))
    tree = layer.layer
    for head in range(KV_HEADS):
        q = call.query[0, head * GROUP, 0]
        read = torch.cat([torch.ones(PINNED, dtype=torch.bool), mask[head]])
        logits = [SCALE * tree.keys[head][read] @ q, SCALE * call.keys[0, head] @ q]
        values = [tree.values[head][read], call.values[0, head]]
        represented = int(read.sum()) - PINNED
        node = 0
        for level in tree.levels:
            for i in range(level.nodes):
                if found.far_logits[0, head, 0, 0, node] > -math.inf:
                    size = int(level.sizes[head, i])
                    logits.append(SCALE * level.centroids[head, i : i + 1] @ q + math.log(size))
                    values.append(level.mean_values[head, i : i + 1])
                    represented += size
                node += 1
        assert represented == tree.clustered  # every key is near or stands in one far node
        expected = torch.cat(logits).softmax(0) @ torch.cat(values)
        torch.testing.assert_close(output[0, head * GROUP, 0], expected, rtol=1e-4, atol=1e-5)
        total = torch.cat(logits).logsumexp(0)
        torch.testing.assert_close(log_mass[0, head * GROUP, 0], total, rtol=1e-5, atol=1e-5)


def test_lazyllm_reads_fewer_tokens_in_every_layer_and_only_survivors():
    context, call = random_context(layers=4), random_call(batch=2, rows=1)
    layers, masks = kept("lazyllm", 0.5, call, context)
    read = []
    for layer, mask in zip(layers, masks, strict=True):
        positions = layer.layer.positions[:, PINNED:].long()
        ranks = [positions[h].argsort().argsort()[mask[0, h, 0]] for h in range(KV_HEADS)]
        assert torch.equal(ranks[0].sort().values, ranks[1].sort().values)
        read.append(mask[:, :, 0].sum(-1))
    assert (read[0] == 280).all()
    assert all((later <= earlier).all() for earlier, later in itertools.pairwise(read))
    assert abs(float(torch.stack(read).double().mean()) / 280 - 0.5) < 0.01


def test_lazyllm_keeps_the_tokens_with_the_most_attention_of_the_last_token():
    context, call = random_context(layers=2), random_call(batch=1, rows=3)
    for layer in context.clustered_layers:  # the same place in the document for every head
        layer.positions[:] = layer.positions[:1]
    layers = create("lazyllm").prepare(context, 0.6)
    block = queries_of(call.query, per_token=False)
    layers[0].keep(block)
    tree, weights = layers[0].layer, []
    for head in range(KV_HEADS):
        for g in range(GROUP):
            q = call.query[0, head * GROUP + g, -1]
            weights.append((SCALE * tree.keys[head] @ q).softmax(-1)[PINNED:])
    mean = torch.stack(weights).mean(0)
    count = layers[0].next_keys
    alive = layers[0].survivors.alive[0, 0][layers[0].place[0]]
    assert alive.sum() == count and mean[alive].min() >= mean[~alive].max()


@pytest.mark.parametrize("budget", [0.05, 0.3, 1.0])
def test_lazyllm_shares_start_at_one_and_average_the_budget(budget):
    plan = shares(budget, 24)
    assert plan[0] == 1.0 and sorted(plan, reverse=True) == plan
    assert abs(sum(plan) / 24 - budget) < 1e-6


def test_fill_stops_where_the_keys_come_nearest_to_the_budget():
    scores = torch.tensor([4.0, 3.0, -math.inf, 2.0])[None, None, None]
    sizes = torch.tensor([[10, 6, 5, 1]])
    taken = [fill(scores, sizes, keys)[0, 0, 0].tolist() for keys in (4, 6, 14, 100)]
    assert taken == [
        [False, False, False, False],
        [True, False, False, False],
        [True, True, False, False],
        [True, True, False, True],
    ]


def test_early_tokens_of_a_long_question_select_by_the_mean_of_their_block():
    query = random_call(batch=1, rows=170).query
    valid = torch.ones(1, 170, dtype=torch.bool)
    queries = Queries(grouped(query, KV_HEADS), valid, 64, SCALE, BEST.query_block)
    weights = torch.randn(1, KV_HEADS, GROUP, 170, 9).log_softmax(-1)
    blocks = [weights[:, :, :, rows] for rows in (slice(0, 42), slice(42, 106))]
    means = [block.exp().mean(3, keepdim=True).log() for block in blocks]
    expected = torch.cat([*means, weights[:, :, :, 106:]], 3).amax(2)
    torch.testing.assert_close(queries.shared(weights), expected)
    assert queries.blocks.tolist() == [0] * 42 + [1] * 64 + list(range(2, 66))


def test_group_heads_share_every_key_that_one_of_them_wants():
    context, call = random_context(layers=1), random_call(batch=1, rows=1)
    layer = create("oracle").prepare(context, 0.1)[0]
    tree = layer.layer
    wanted = tree.keys[0, PINNED + 5] * 50 / DIM
    call.query[0, 0, 0], call.query[0, 1, 0] = wanted, -wanted
    assert layer.keep(queries_of(call.query))[0, 0, 0, 5]


@pytest.mark.parametrize("method", ["oracle", "quest", "multipole", "routing"])
def test_methods_select_in_the_blocks_of_the_contexts_own_preset(method):
    context, call = random_context(layers=1), random_call(rows=12)
    best = context.calibrations[BEST.name]
    outputs = []
    for block, single in ((64, 64), (4, 2)):
        preset = replace(best.preset, query_block=block, single_tokens=single)
        own = replace(context, calibrations={preset.name: replace(best, preset=preset)})
        [layer] = create(method).prepare(own, 0.1)
        outputs.append(call.attend(layer, per_token=False)[0])
        alone = call.attend(layer, per_token=True)[0]
        torch.testing.assert_close(outputs[-1][:, :, -2:], alone[:, :, -2:])
    assert not torch.allclose(outputs[0][:, :, :10], outputs[1][:, :, :10], atol=1e-4)
