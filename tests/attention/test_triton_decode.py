"""The decode kernels against the reference: on a GPU, or tiny in Triton's interpreter."""

from dataclasses import replace

import interpreter  # before any kernel
import poison
import pytest
import torch
from devices import gpu
from trees import far_alpha_for, random_layer

from squeezed.attention import Suffix, reference, triton
from squeezed.attention.reference.lookup import lookup
from squeezed.attention.triton.decode import launch as decode
from squeezed.attention.triton.decode import operator
from squeezed.attention.triton.decode.workspace import Tuning
from squeezed.context.layers import ClusteredLayer, Level
from squeezed.context.rows import Rows
from squeezed.context.rule import SelectionRule
from squeezed.errors import SqueezedError
from squeezed.testing.compared import assert_matches_reference

# The interpreter multiplies no bfloat16.
DTYPES = (torch.float16, gpu(torch.bfloat16))
SMALL = dict(tokens=300, nodes=(5, 10, 24))
LARGE = dict(tokens=9000, nodes=(20, 80, 400), pinned=116)
SIZES = pytest.mark.parametrize("size", [SMALL, gpu(LARGE)], ids=["small", "large"])
INTERPRETED = Tuning(
    score_tile=16, chunk=32, nodes=16, write=2, tile=16, node_tile=16, stages=3, merge_slots=8,
    overlap=False,
)  # fmt: skip
TUNING = INTERPRETED if interpreter.DEVICE == "cpu" else None
BASE = TUNING or Tuning()
PATHS = {
    "one round": replace(BASE, walk_programs=64),
    "several rounds": replace(BASE, walk_programs=1, node_tile=64),
}
LEVEL_TENSORS = ("centroids", "mean_values", "variance", "key_offsets", "child_offsets")
KEEP_ALL, KEEP_NONE = -float("inf"), 1e9


def layer_of(**changes):
    return random_layer(**{"dtype": torch.float16, "dim": 32, **SMALL, "nodes": (6, 24), **changes})


def inputs(layer, batch=1, group=1, recent=5, seed=0, scale_query=1.0):
    generator = torch.Generator().manual_seed(seed)
    heads, _, dim = layer.keys.shape

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(layer.keys.dtype).to(interpreter.DEVICE)

    query = draw(batch, heads * group, 1, dim) * scale_query
    return query, draw(batch, heads, recent, dim), draw(batch, heads, recent, dim)


def rule_of(layer, group=1, threshold=None, far_field="none", second_order=False):
    """Thresholds in the middle of the scores, and far from any single one for these seeds."""
    levels = len(layer.levels)
    alpha = torch.rand(levels, layer.keys.shape[0] * group, device=interpreter.DEVICE)
    middle = -torch.tensor(float(layer.clustered)).log().item()
    thresholds = tuple(middle - 0.3 * (levels - 1 - i) for i in range(levels))
    if threshold is not None:
        thresholds = (threshold,) * levels
    rule = SelectionRule.for_all_heads(
        thresholds, layer, alpha if second_order else None, far_field, 1,
        far_alpha_for(layer.to(interpreter.DEVICE), far_field, group),
    )  # fmt: skip
    own = 0.1 * torch.arange(layer.keys.shape[0], device=layer.keys.device)
    shifted = (rule.log_thresholds + own).to(interpreter.DEVICE)
    return replace(rule, log_thresholds=shifted)


def run(query, layer, rule, keys, values, mask=None, scale=None, tuning=TUNING, valid=None):
    suffix = None if keys is None else Suffix(keys, values, mask)
    return decode.decode_step(query, scaled(layer, query, scale), rule, suffix, valid, tuning)


def scaled(layer, query, scale=None):
    return replace(layer.to(interpreter.DEVICE), scale=scale or query.shape[-1] ** -0.5)


def assert_equals_reference(
    query, layer, rule, keys, values, mask=None, scale=None, tuning=TUNING, valid=None
):
    found = run(query, layer, rule, keys, values, mask, scale, tuning, valid)
    suffix = None if keys is None else Suffix(keys, values, mask)
    assert_matches_reference(found, query, scaled(layer, query, scale), rule, suffix, valid)


@pytest.fixture(autouse=True)
def poisoned_buffers(request, monkeypatch):
    if "operator" not in request.node.name:  # PyTorch's tracing knows only its own functions
        poison.buffers(monkeypatch)


@SIZES
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("far_field", ["none", "first_order", "second_order"])
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_decode_equals_reference_at_any_depth_and_far_field(levels, far_field, path, size):
    layer = layer_of(**size | {"nodes": size["nodes"][-levels:]})
    rule = rule_of(layer, 2, far_field=far_field, second_order=True)
    assert_equals_reference(*_around(layer, rule, inputs(layer, group=2)), tuning=PATHS[path])


def _around(layer, rule, drawn):
    query, keys, values = drawn
    return query, layer, rule, keys, values


@SIZES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("group", "dim"), [(1, 64), (3, 96), (4, 128), (16, 32), (2, 256)])
def test_decode_equals_reference_for_head_shapes(group, dim, dtype, size):
    layer = layer_of(dim=dim, dtype=dtype, **size | {"nodes": size["nodes"][-2:]})
    rule = rule_of(layer, group, far_field="first_order")
    assert_equals_reference(*_around(layer, rule, inputs(layer, group=group)))


@pytest.mark.parametrize(("batch", "group"), [(3, 2), (5, 1), gpu(40, 2), gpu(64, 1)])
def test_requests_that_share_a_context_equal_reference(batch, group):
    layer = layer_of()
    query, keys, values = inputs(layer, batch, group)
    mask = torch.rand(batch, 1, 1, keys.shape[2], device=query.device) > 0.4
    mask[0] = False  # a request of padding
    valid = mask.any(-1)[:, 0]
    for far_field, tuning in zip(("none", "second_order"), PATHS.values(), strict=True):
        rule = rule_of(layer, group, far_field=far_field)
        assert_equals_reference(query, layer, rule, keys, values, mask, tuning=tuning, valid=valid)
        assert_equals_reference(query, layer, rule, keys, values, mask, tuning=tuning)


@SIZES
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("far_field", ["none", "first_order", "second_order"])
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_requests_that_disagree_on_a_coarsest_node_equal_reference(levels, far_field, path, size):
    nodes = size["nodes"][-levels:]
    layer = layer_of(**size | {"nodes": nodes}).to(interpreter.DEVICE)
    query, keys, values = inputs(layer, batch=4, group=2)
    torch.manual_seed(0)
    rule = rule_of(layer, 2, far_field=far_field, second_order=True)
    dropped = torch.zeros(1, dtype=torch.bool)
    while not (dropped.any(0) & ~dropped.all(0)).any():
        rule.log_thresholds[0] += 0.25
        found = lookup(query, scaled(layer, query), rule)
        dropped = (found.far_logits[..., : nodes[0]] > KEEP_ALL).any(2)[:, :, 0]  # [B, Hkv, C]
        assert not dropped.all()
    assert_equals_reference(query, layer, rule, keys, values, tuning=PATHS[path])


def test_more_rows_than_a_tile_equal_reference(monkeypatch):
    monkeypatch.setattr("squeezed.attention.triton.decode.workspace.MAX_ROWS", 4)
    layer = layer_of(kv_heads=1, pinned=21)
    for far_field in ("first_order", "second_order"):
        rule = rule_of(layer, 2, far_field=far_field)
        assert_equals_reference(*_around(layer, rule, inputs(layer, batch=5, group=2, seed=3)))


def test_neighbours_in_a_batch_do_not_matter():
    layer = layer_of()
    query, keys, values = inputs(layer, batch=3, group=2)
    rule = rule_of(layer, 2)
    together, _, read = run(query, layer, rule, keys, values)
    for request in range(3):
        one = slice(request, request + 1)
        alone, _, read_alone = run(query[one], layer, rule, keys[one], values[one])
        torch.testing.assert_close(together[one], alone, atol=2e-3, rtol=2e-3)
        assert read[one].tolist() == read_alone.tolist()


@pytest.mark.parametrize("path", PATHS)
def test_children_of_dropped_nodes_are_dropped_whatever_their_score(path):
    layer = layer_of()
    query, keys, values = inputs(layer, batch=2, group=2)
    middle = rule_of(layer).log_thresholds[0]
    everything = torch.full_like(middle, KEEP_ALL)
    rule = SelectionRule(torch.stack([middle + 0.5, everything]), None, "first_order")
    read = run(query, layer, rule, keys, values, tuning=PATHS[path]).keys_read
    assert int(read.min()) > 0 and int(read.max()) < layer.clustered * layer.keys.shape[0]
    assert_equals_reference(query, layer, rule, keys, values, tuning=PATHS[path])


def test_requests_over_different_contexts_each_read_their_own():
    layers = [layer_of(seed=seed).to(interpreter.DEVICE) for seed in (0, 1)]
    rules = [rule_of(layers[0]), rule_of(layers[1], far_field="first_order")]
    query, keys, values = inputs(layers[0], batch=3)
    mask = torch.ones(3, 1, 1, keys.shape[2], dtype=torch.bool, device=query.device)
    mask[1, ..., :2] = False
    order = [0, 1, 0]
    together, masses, read = decode.decode_many(
        query, [layers[i] for i in order], [rules[i] for i in order], Suffix(keys, values, mask)
    )
    for request, i in enumerate(order):
        one = slice(request, request + 1)
        alone, alone_mass, read_alone = run(
            query[one], layers[i], rules[i], keys[one], values[one], mask[one], 0.2
        )
        torch.testing.assert_close(together[one], alone, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(masses[one], alone_mass, atol=1e-5, rtol=1e-5)
        assert read[one].tolist() == read_alone.tolist()


def test_everything_kept_equals_dense():
    layer = layer_of()
    query, keys, values = inputs(layer)
    rule = rule_of(layer, threshold=KEEP_ALL, far_field="first_order")
    output, _, read = run(query, layer, rule, keys, values)
    context = [t.to(query.device)[None] for t in (layer.keys, layer.values)]
    dense = torch.nn.functional.scaled_dot_product_attention(
        query.float(), torch.cat([context[0], keys], 2).float(),
        torch.cat([context[1], values], 2).float(),
    )  # fmt: skip
    torch.testing.assert_close(output.float(), dense, atol=2e-3, rtol=2e-3)
    assert read.tolist() == [layer.clustered * layer.keys.shape[0]]


@pytest.mark.parametrize("far_field", ["none", "first_order", "second_order"])
def test_nothing_selected_equals_reference_and_not_dense(far_field):
    layer = layer_of()
    query, keys, values = inputs(layer)
    rule = rule_of(layer, threshold=KEEP_NONE, far_field=far_field)
    assert_equals_reference(query, layer, rule, keys, values)
    nothing, _, read = run(query, layer, rule, keys, values)
    everything, _, _ = run(query, layer, rule_of(layer, threshold=KEEP_ALL), keys, values)
    assert read.tolist() == [0]
    assert (nothing - everything).norm() > 0.02 * everything.norm()


def test_all_keys_in_one_cluster_equals_reference():
    layer = layer_of(nodes=(1, 1))
    rule = rule_of(layer, threshold=KEEP_ALL)
    assert_equals_reference(*_around(layer, rule, inputs(layer)))


def test_clusters_of_one_key_equal_reference():
    layer = layer_of(tokens=84, pinned=20, nodes=(8, 200))  # at most one key each, most are empty
    rule = rule_of(layer, far_field="first_order")
    assert_equals_reference(*_around(layer, rule, inputs(layer)))


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_huge_logits_equal_reference(shift):
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, SMALL["tokens"], 32, generator=generator)
    keys[..., 0] = shift / 40
    layer = layer_of(keys=keys)
    query, recent_keys, recent_values = inputs(layer)
    query[..., 0] = 40
    recent_keys[..., 0] = shift / 40
    rule = rule_of(layer, far_field="second_order")
    assert_equals_reference(query, layer, rule, recent_keys, recent_values, scale=1.0)


def test_sinks_of_huge_norm_equal_reference():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, SMALL["tokens"], 32, generator=generator)
    keys[:, :4] *= 60
    layer = layer_of(keys=keys)
    assert_equals_reference(*_around(layer, rule_of(layer), inputs(layer)))


def test_cluster_order_does_not_matter():
    layer = layer_of(nodes=(24,))
    query, keys, values = inputs(layer)
    rule = rule_of(layer, far_field="first_order")
    flipped = _reversed(layer)
    output, _, read = run(query, layer, rule, keys, values)
    other, _, other_read = run(query, flipped, rule, keys, values)
    torch.testing.assert_close(output, other, atol=2e-3, rtol=2e-3)
    assert read.tolist() == other_read.tolist()


def _reversed(layer):
    """The same flat clusters in the opposite order; rows inside a cluster turn around too."""

    def rows(tensor):
        return torch.cat([tensor[:, : layer.pinned], tensor[:, layer.pinned :].flip(1)], 1)

    level = layer.levels[0]
    offsets = layer.pinned + layer.tokens - level.key_offsets.flip(1)
    turned = replace(
        level,
        centroids=level.centroids.flip(1), mean_values=level.mean_values.flip(1),
        variance=level.variance.flip(1), key_offsets=offsets.contiguous(),
    )  # fmt: skip
    turned_rows = Rows(rows(layer.keys), rows(layer.values))
    return replace(layer, rows=turned_rows, levels=(turned,))


@pytest.mark.parametrize("path", PATHS)
def test_every_head_selects_by_its_own_thresholds(path):
    layer = layer_of()
    rule = rule_of(layer, far_field="first_order")
    rule.log_thresholds[:, 0], rule.log_thresholds[:, 1:] = KEEP_ALL, KEEP_NONE
    arguments = _around(layer, rule, inputs(layer, batch=2, group=2))
    assert run(*arguments, tuning=PATHS[path]).keys_read.tolist() == [layer.clustered] * 2
    assert_equals_reference(*arguments, tuning=PATHS[path])


def test_a_layer_without_levels_is_dense():
    layer = layer_of()
    layer = replace(layer, levels=(), pinned=layer.tokens)
    rule = rule_of(layer, far_field="first_order")
    assert_equals_reference(*_around(layer, rule, inputs(layer, group=2)))


def test_padding_over_no_pinned_rows_gives_zero():
    layer = layer_of(pinned=0)
    query, keys, values = inputs(layer, batch=2)
    mask = torch.ones(2, 1, 1, keys.shape[2], dtype=torch.bool, device=query.device)
    mask[1] = False
    valid = mask.any(-1)[:, 0]
    output, log_mass, read = run(query, layer, rule_of(layer), keys, values, mask, valid=valid)
    assert output[1].abs().max() == 0 and read[1] == 0
    assert (log_mass[1] == -torch.inf).all() and log_mass[0].isfinite().all()
    assert torch.isfinite(output).all() and output[0].abs().max() > 0


def test_views_of_a_static_buffer_are_read_in_place():
    layer = layer_of()
    query, keys, values = inputs(layer, batch=2, recent=7)
    size, nan = (2, keys.shape[1], 40, 32), float("nan")
    views = [
        torch.full(size, nan, dtype=rows.dtype, device=rows.device)[:, :, 3:10].copy_(rows)
        for rows in (keys, values)
    ]
    assert_equals_reference(query, layer, rule_of(layer), *views)


@pytest.mark.gpu(memory_gb=12)
def test_offsets_beyond_31_bits_equal_reference():
    tokens = (1 << 31) // 128 + 4096
    keys = torch.randn(1, tokens, 128, dtype=torch.bfloat16, device="cuda")
    ends = torch.tensor([[16, tokens - 4000, tokens - 1000, tokens]], dtype=torch.int32)
    centroids = torch.stack([keys[:, a:b].float().mean(1) for a, b in ends[0].unfold(0, 2, 1)], 1)
    level = Level(centroids.bfloat16(), centroids.bfloat16(), torch.zeros(1, 3), ends).to("cuda")
    slope = keys.new_zeros(1, keys.shape[2], keys.shape[2])
    centre = keys.new_zeros(1, 128)
    layer = ClusteredLayer(
        Rows(keys, keys), torch.zeros(1, 1).int(), 16, (level,), slope, centre, 1.0
    )
    query, recent, values = inputs(layer_of(kv_heads=1, dim=128, dtype=torch.bfloat16))
    query[0, 0, 0] = 2000 * centroids[0, 2]  # only the last cluster, far beyond 2^31 elements
    rule = SelectionRule.for_all_heads((-8.0,), layer, None, "none")
    output, _, read = run(query, layer, rule, recent, values)
    rows = torch.cat([keys[:, :16], keys[:, tokens - 1000 :]], 1)[None].float()
    dense = torch.nn.functional.scaled_dot_product_attention(
        query.float(), torch.cat([rows, recent.float()], 2), torch.cat([rows, values.float()], 2)
    )
    assert int(read) == 1000
    torch.testing.assert_close(output.float(), dense, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
def test_decode_replays_from_a_graph():
    layer = layer_of().to("cuda")
    query, keys, values = inputs(layer, batch=2, group=2)
    rule = rule_of(layer, 2, far_field="first_order")
    eager, _, _ = run(query, layer, rule, keys, values)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, _, _ = run(query, layer, rule, keys, values)
    for _ in range(3):
        captured.fill_(float("nan"))
        graph.replay()
        torch.testing.assert_close(captured, eager, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(query=lambda q: q.expand(-1, -1, 2, -1)), "1 token"),
        (dict(query=lambda q: q.float()), "bfloat16 or float16"),
        (dict(query=lambda q: q[..., :24]), "multiple of 16"),
        (dict(query=lambda q: q[:, :1]), "query heads"),
        (dict(keys=lambda k: k.transpose(2, 3).contiguous().transpose(2, 3)), "contiguous"),
    ],
)
def test_bad_input_is_refused_in_one_line(change, words):
    layer = layer_of()
    query, keys, values = inputs(layer)
    query, keys = change.get("query", lambda x: x)(query), change.get("keys", lambda x: x)(keys)
    with pytest.raises(SqueezedError, match=words) as refused:
        run(query, layer, rule_of(layer), keys, values)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("levels", [0, 2])
def test_operator_is_traced_without_a_graph_break(levels):
    layer = layer_of()
    layer = layer if levels else replace(layer, levels=(), pinned=layer.tokens)
    layer = layer.to(interpreter.DEVICE)
    query, keys, values = inputs(layer)
    rule = rule_of(layer)

    def step(query):
        return operator.decode_step(2 * query, layer, rule, Suffix(keys, values))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    output, log_mass, read = compiled(query)
    expected, mass, expected_read = run(
        2 * query, layer, rule, keys, values, scale=layer.scale, tuning=None
    )
    torch.testing.assert_close(output, expected, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(log_mass, mass, atol=1e-5, rtol=1e-5)
    assert read.tolist() == expected_read.tolist()


def test_operator_promises_the_shapes_it_returns():
    layer = layer_of().to(interpreter.DEVICE)
    query, keys, values = inputs(layer)
    tensors = [[getattr(level, name) for level in layer.levels] for name in LEVEL_TENSORS]
    arguments = (
        query, layer.keys, layer.values, "plain", [], layer.positions, layer.value_slope,
        layer.centre, *tensors[:4], tensors[4][:-1], keys, values, None, None, None, None,
        rule_of(layer).log_thresholds, "none", layer.pinned, 0.1,
    )  # fmt: skip
    torch.library.opcheck(
        operator.step_of_parts, arguments, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("rows", [3, 5])
def test_tokens_that_select_alone_equal_reference_in_tiles_of_few_sizes(rows, monkeypatch):
    layer = layer_of().to(interpreter.DEVICE)
    query, keys, values = inputs(layer, 2, 2, recent=rows + 3)
    query = query * torch.rand(1, 1, rows, 1, device=query.device).to(query.dtype)
    mask = torch.rand(2, 1, rows, rows + 3, device=query.device) > 0.3
    mask[0, :, 0] = False  # padding
    rule = rule_of(layer, 2, far_field="second_order", second_order=True)
    sizes, launch = set(), decode.decode_step
    monkeypatch.setattr(triton, "MAX_ROWS", 8)  # four tokens of two heads

    def decode_step(part, *arguments):
        sizes.add(len(part))
        return launch(part, *arguments, TUNING)

    monkeypatch.setattr(decode, "decode_step", decode_step)
    operands = (layer, rule, Suffix(keys, values, mask), mask.any(-1)[:, 0])
    output, log_mass, read = triton.decode_tokens(query, *operands)
    exact, exact_mass, expected = reference.attend(query.double(), *operands)
    rounded = reference.attend(query, *operands).output
    torch.testing.assert_close(log_mass.double(), exact_mass, atol=1e-5, rtol=1e-5)
    epsilon = torch.finfo(query.dtype).eps
    allowed = 2 * (rounded.double() - exact).norm() + epsilon / 2 * exact.norm()
    assert (output.double() - exact).norm() <= allowed
    assert read.tolist() == expected.tolist()
    assert all(size & (size - 1) == 0 for size in sizes)


@pytest.mark.parametrize("where", ["query", "suffix", "pinned"])
def test_nan_shows_where_dense_attention_shows_it(where):
    layer = layer_of()
    query, keys, values = inputs(layer, group=2)
    if where == "query":
        query[0, 0, 0, 3] = float("nan")
    elif where == "suffix":
        keys[0, 0, 1, 3] = float("nan")
    else:
        layer.keys[0, 2, 3] = float("nan")
    rule = rule_of(layer, 2, far_field="second_order", second_order=True)
    output, _, _ = run(query, layer, rule, keys, values)
    lost = output.isnan().any(-1).flatten().tolist()
    expected = [True, where != "query", *[False] * (len(lost) - 2)]
    assert lost == expected
