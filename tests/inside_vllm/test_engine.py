"""Requests over contexts inside vLLM, on a CPU: what they answer, say, and leave alone.

The pool holds 800 tokens, a step 64: prompts are read in chunks beside the decoding of others. The
memory for contexts holds two of the three.
"""

import shutil

import pytest
from engines import ask, engine, metric, until

BLOCKS, BLOCK = 26, 32  # one block is vLLM's null block


@pytest.fixture(scope="module")
def llm(place):
    files = [f for name in ("one", "two") for f in (place / "contexts" / f"{name}.sqz").iterdir()]
    memory = sum(file.stat().st_size for file in files if file.name.startswith("layer"))
    made = engine(
        place,
        {"scan_seconds": 0.1, "own_tokens": 800, "context_memory": memory * 1.02 / (1 << 30)},
        max_num_batched_tokens=64,
        max_num_seqs=8,
        num_gpu_blocks_override=BLOCKS,
    )
    yield made
    made.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def crowd(answers):
    """Requests of every kind: two contexts, budgets, presets, none, half of one, opted out."""
    ids = answers["contexts"]
    question = [40 + i % 60 for i in range(150)]
    return [
        ([*ids["one"], 50, 51, 52], {"squeezed_budget": 0.1}),
        ([*ids["one"], 50, 51, 52], {"squeezed_budget": 0.3}),
        ([*ids["one"], *question], {}),
        ([*ids["one"], *question], {"squeezed_preset": "paper"}),
        ([*ids["two"], 60], {"squeezed_context": "two", "squeezed_budget": 1.0}),
        ([*ids["two"], 61, 62], {}),
        ([70, 71, 72, 73], {}),
        ([*ids["one"][:320], 80], {}),
    ]


def tokens(found):
    return [one["tokens"] for one in found]


def test_answers_are_those_of_transformers(llm, answers):
    for first in range(0, len(answers["asked"]), 2):
        both = answers["asked"][first : first + 2]
        extra = {"squeezed_budget": both[0]["budget"], "squeezed_preset": both[0]["preset"]}
        found = ask(llm, [(one["prompt"], extra) for one in both])
        for one, wanted in zip(found, both, strict=True):
            assert one["tokens"] == wanted["tokens"]
            assert one["cached"] >= len(answers["contexts"]["one"]) - BLOCK - 4
            said = one["said"]
            assert (said["context"], said["preset"]) == ("one", wanted["preset"])
            assert said["budget"] == wanted["budget"]
            assert said["budget_spent"] == pytest.approx(wanted["spent"], rel=0.1)
            assert said["keys_read"] > 0


def test_a_crowd_is_answered_as_each_alone(llm, crowd):
    together = ask(llm, crowd)
    alone = []
    for request in crowd:
        llm.reset_prefix_cache()
        alone += ask(llm, [request])
    assert tokens(together) == tokens(alone)
    for place in (0, 1, 4, 5, 6, 7):  # in 2 and 3 chunks may cut blocks of tokens that select
        assert together[place]["said"] == alone[place]["said"]
    read = [(one["said"] or {}).get("context") for one in together]
    assert read == ["one", "one", "one", "one", "two", "two", None, None]
    assert together[0]["said"]["keys_read"] < together[1]["said"]["keys_read"]
    assert together[4]["said"]["budget_spent"] == 1.0


def test_more_contexts_than_fit_are_served_in_turns(llm, answers):
    """None goes while it is read, and who waits for room is served."""
    some = [
        ([*answers["contexts"][name], 50 + i], {"squeezed_context": name})
        for i, name in enumerate(("one", "two", "three", "one", "three", "two"))
    ]
    before = metric(llm, "squeezed_evictions")
    together = ask(llm, some)
    assert [one["said"].get("context") for one in together] == [
        e["squeezed_context"] for _, e in some
    ]
    assert metric(llm, "squeezed_evictions") > before
    assert metric(llm, "squeezed_resident_bytes") <= metric(llm, "squeezed_capacity_bytes")
    alone = [ask(llm, [request])[0] for request in some]
    assert tokens(together) == tokens(alone)


def test_preempted_requests_answer_as_alone(llm, answers):
    """Six requests need 30 blocks and more; what was generated is read again."""
    some = [
        ([*answers["contexts"]["one"], 40 + i, *range(50, 130)], {"squeezed_budget": budget})
        for i, budget in enumerate((0.1, 0.1, 0.1, 0.3, 1.0, 1.0))
    ]
    before = metric(llm, "vllm:num_preemptions")
    together = ask(llm, some, new=60)
    assert metric(llm, "vllm:num_preemptions") > before
    alone = []
    for request in some:
        llm.reset_prefix_cache()
        alone += ask(llm, [request], new=60)
    assert tokens(together) == tokens(alone)


def test_opting_out_is_dense_and_equal_to_everything_read(llm, answers):
    short = [*answers["contexts"]["three"], 50, 51]  # fits the pool without a context
    dense, over = ask(
        llm, [(short, {"squeezed_context": "none"}), (short, {"squeezed_budget": 1.0})]
    )
    assert dense["said"] is None and dense["cached"] < len(short) // 2
    assert over["said"]["context"] == "three"
    assert dense["tokens"] == over["tokens"]


def test_a_second_turn_finds_the_first_in_the_cache(llm, crowd):
    ids, extra = crowd[2]
    first = ask(llm, [(ids, extra)])[0]
    turn = [*ids, *first["tokens"], 44, 45, 46]
    second = ask(llm, [(turn, extra)])[0]
    assert second["cached"] >= len(ids) - BLOCK
    assert second["said"]["context"] == "one"
    llm.reset_prefix_cache()
    assert ask(llm, [(turn, extra)])[0]["tokens"] == second["tokens"]


def test_what_follows_is_cached_apart_for_every_budget(llm, crowd):
    """Keys after the context were computed with what was read of it."""
    ids, _ = crowd[2]
    ask(llm, [(ids, {"squeezed_budget": 0.25})])
    again = ask(llm, [(ids, {"squeezed_budget": 0.25})])[0]
    other = ask(llm, [(ids, {"squeezed_budget": 0.35})])[0]
    assert again["cached"] > other["cached"]


def test_one_token_has_its_numbers_too(llm, crowd):
    said = ask(llm, crowd[:1], new=1)[0]["said"]
    assert said["keys_read"] > 0 and 0 < said["budget_spent"] < 1


def test_what_cannot_be_honoured_runs_dense_and_is_said(llm, answers):
    short = [*answers["contexts"]["three"], 50, 51]
    before = metric(llm, "squeezed_requests")
    wrong = ask(llm, [(short, {"squeezed_budget": 2.0}), (short, {"squeezed_context": "nine"})])
    assert "budget" in wrong[0]["said"]["fallback"]
    assert "nine" in wrong[1]["said"]["fallback"]
    logged = ask(llm, [(short, {})], prompt_logprobs=1)[0]
    assert "prompt_logprobs" in logged["said"]["fallback"]
    right = ask(llm, [(short, {"squeezed_context": "none"})])[0]
    assert tokens(wrong) == [right["tokens"]] * 2
    assert metric(llm, "squeezed_requests") >= before + 4


def test_contexts_come_and_go_while_it_runs(llm, place, answers, tmp_path):
    """New ones are found, halves are not used, deleted ones are forgotten."""
    path, ids = place / "contexts" / "three.sqz", [*answers["contexts"]["three"], 50, 51]
    with_it = ask(llm, [(ids, {"squeezed_budget": 1.0})])[0]
    assert with_it["said"]["context"] == "three"
    shutil.move(path, tmp_path / "three.sqz")

    def context():
        return ask(llm, [(ids, {"squeezed_budget": 1.0})], new=1)[0]["said"]["context"]

    until(lambda: context() is None)
    half = shutil.copytree(tmp_path / "three.sqz", path)
    file = half / "layer_002.safetensors"
    file.unlink()
    without = ask(llm, [(ids, {})])[0]
    assert without["said"] is None and without["tokens"] == with_it["tokens"]
    shutil.copy(tmp_path / "three.sqz" / file.name, file)
    until(lambda: context() == "three")
    damaged = bytearray(file.read_bytes())
    damaged[-5] ^= 1
    shutil.rmtree(path)
    until(lambda: context() is None)
    shutil.copytree(tmp_path / "three.sqz", path)
    file.write_bytes(damaged)
    until(lambda: "checksum" in (ask(llm, [(ids, {})], new=1)[0]["said"] or {}).get("fallback", ""))


def test_metrics_add_up_what_answers_say(llm, crowd):
    """Keys that were read, and those that could have been, of the same answers."""
    names = ("squeezed_keys_read", "squeezed_keys_available")

    def counted():
        ask(llm, [([70, 71], {})], new=1)  # its end tells what came before
        return [metric(llm, name) for name in names]

    before = counted()
    said = [one["said"] for one in ask(llm, crowd[:6])]
    read, available = (after - was for after, was in zip(counted(), before, strict=True))
    assert read == sum(one["keys_read"] for one in said) > 0
    assert available == round(sum(one["keys_read"] / one["budget_spent"] for one in said))
    assert 0.1 < read / available < 0.9


def test_metrics_stand_beside_vllms_own(llm):
    assert metric(llm, "squeezed_loads") >= 3
    assert metric(llm, "squeezed_contexts") == 3
    assert 0 < metric(llm, "squeezed_resident_bytes") < metric(llm, "squeezed_capacity_bytes")
    assert 0 < metric(llm, "squeezed_keys_read") < metric(llm, "squeezed_keys_available")
