"""Arguments of `squeezed.generate` mean what they mean in Transformers, or are refused by name."""

import pytest
import torch
import transformers
from tiny import tiny_model, tiny_tokenizer
from transformers import GenerationConfig

import squeezed
from squeezed.context.prompt import PromptTemplate
from squeezed.errors import SqueezedError
from squeezed.hf.answer import respond

CONFIG = squeezed.IndexConfig(
    clustering=squeezed.ClusteringConfig(levels=(0.05, 0.2), pinned_first=4, pinned_last=20)
)
QUESTION = "what is alpha? tell me."


@pytest.fixture(scope="module")
def context():
    text = bytes(range(32, 127)).decode() * 4
    return squeezed.index(tiny_model(), tiny_tokenizer(), text, CONFIG, PromptTemplate.plain())


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(
        tiny_model(), "generation_config", GenerationConfig(pad_token_id=258, eos_token_id=None)
    )
    return tiny_model()


def ask(model, context, **arguments):
    found = dict(budget=1.0, implementation="reference") | arguments
    return squeezed.generate(model, tiny_tokenizer(), context, QUESTION, **found)


def dense(model, context, **arguments):
    ids = torch.cat([context.tokens, torch.tensor(tiny_tokenizer()(QUESTION)["input_ids"])])[None]
    with torch.no_grad():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    return sequences[:, ids.shape[1] :]


LOOKING_BACK = {
    "repetition_penalty": {"repetition_penalty": 1.3},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.3},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 2},
    "sequence_bias": {"sequence_bias": {(44,): -9.0, (109, 101): 9.0}},
    "min_length": {"min_length": 412, "eos_token_id": list(range(60, 110))},
    "exponential_decay": {"exponential_decay_length_penalty": (2, 1.5), "eos_token_id": 65},
    "beams": {"num_beams": 3, "repetition_penalty": 1.2},
    "beams_returned": {"num_beams": 3, "num_return_sequences": 2},
    "lookup": {"prompt_lookup_num_tokens": 4, "repetition_penalty": 1.2},
    "chunks": {"prefill_chunk_size": 7},
    "guidance": {"guidance_scale": 1.5},
}


@pytest.mark.transformers("5.23")
@pytest.mark.parametrize("name", LOOKING_BACK)
def test_generate_with_processors_that_look_back_equals_dense(name, model, context):
    arguments = {"max_new_tokens": 10} | LOOKING_BACK[name]
    answer = ask(model, context, **arguments)
    assert answer.sequences.equal(dense(model, context, do_sample=False, **arguments))


def test_generate_with_own_processor_sees_the_whole_prompt(model, context):
    seen = []

    def processor(ids, scores):
        seen.append(ids.shape[1])
        return scores

    ask(model, context, logits_processor=processor, max_new_tokens=2)
    start = len(context.tokens) + len(QUESTION)
    assert seen == [start, start + 1]


def test_generate_with_an_assistant_equals_dense(model, context):
    answer = ask(model, context, assistant_model=tiny_model(seed=1), max_new_tokens=10)
    assert answer.tokens.equal(dense(model, context, do_sample=False, max_new_tokens=10)[0])
    assert answer.seconds["first_token"] > 0


def test_generate_early_exit_equals_dense(model, context):
    answer = ask(model, context, assistant_early_exit=1, max_new_tokens=10)
    assert answer.tokens.equal(dense(model, context, do_sample=False, max_new_tokens=10)[0])


def test_generate_samples_like_dense_with_a_seed(model, context):
    arguments = {"do_sample": True, "temperature": 0.7, "num_return_sequences": 3}
    torch.manual_seed(5)
    answer = ask(model, context, max_new_tokens=4, **arguments)
    torch.manual_seed(5)
    assert answer.sequences.equal(dense(model, context, max_new_tokens=4, **arguments))
    assert answer.tokens.shape == answer.sequences.shape == (3, 4)
    assert answer.text == tiny_tokenizer().decode(answer.sequences[0]).strip()


CHECKPOINTS = {
    "no cache": {"use_cache": False},
    "penalty": {"repetition_penalty": 1.1},
    "static": {"cache_implementation": "static"},
    "short": {"max_length": 30},
    "several": {"num_beams": 2, "early_stopping": True},
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_generate_follows_the_checkpoints_own_configuration(name, model, context):
    model.generation_config.update(**CHECKPOINTS[name])
    expected = dense(model, context, max_new_tokens=8, do_sample=False)
    assert ask(model, context, max_new_tokens=8).sequences.equal(expected)
    chosen = GenerationConfig(max_new_tokens=8)
    assert ask(model, context, generation_config=chosen).sequences.equal(expected)


def test_generate_length_follows_call_then_checkpoint_then_default(model, context, monkeypatch):
    monkeypatch.setattr("squeezed.hf.arguments.DEFAULT_NEW_TOKENS", 3)
    prompt = len(context.tokens) + len(QUESTION)
    assert len(ask(model, context).tokens) == 3
    assert len(ask(model, context, generation_config=GenerationConfig()).tokens) == 3
    model.generation_config.max_length = 20  # full before the answer begins
    assert len(ask(model, context).tokens) == 3
    model.generation_config.max_length = prompt + 5
    assert len(ask(model, context).tokens) == 5
    model.generation_config.max_new_tokens = 6
    assert len(ask(model, context).tokens) == 6
    assert (
        len(ask(model, context, generation_config=GenerationConfig(max_new_tokens=4)).tokens) == 4
    )
    assert len(ask(model, context, max_new_tokens=2).tokens) == 2
    model.generation_config.max_new_tokens = None
    assert len(ask(model, context, max_length=prompt + 7).tokens) == 7
    with pytest.raises(SqueezedError, match="max_length"):
        ask(model, context, max_length=prompt)


def test_generate_is_greedy_unless_the_call_asks_for_sampling(model, context):
    model.generation_config.update(do_sample=True, temperature=5.0)
    greedy = dense(model, context, max_new_tokens=8, do_sample=False)
    assert ask(model, context, max_new_tokens=8).sequences.equal(greedy)
    for asked in (
        {"max_new_tokens": 8, "top_k": 200},
        {"max_new_tokens": 8, "do_sample": True},
        {"generation_config": GenerationConfig(max_new_tokens=8, do_sample=True)},
    ):
        torch.manual_seed(1)
        answer = ask(model, context, **asked)
        torch.manual_seed(1)
        assert answer.sequences.equal(dense(model, context, **asked))
        assert not answer.sequences.equal(greedy)


def test_generate_leaves_the_callers_configuration_alone(model, context):
    chosen = GenerationConfig(max_new_tokens=2, use_cache=False)
    before = chosen.to_dict()
    ask(model, context, generation_config=chosen)
    assert chosen.to_dict() == before


def test_generate_stops_at_strings_and_at_own_criteria(model, context):
    asked = {"max_new_tokens": 12, "stop_strings": ["J", "c"]}
    expected = dense(model, context, do_sample=False, tokenizer=tiny_tokenizer(), **asked)[0]
    for arguments in (asked, {"generation_config": GenerationConfig(**asked)}):
        assert ask(model, context, **arguments).tokens.equal(expected)
    assert 0 < len(expected) < 12
    end = len(context.tokens) + len(QUESTION) + 4

    def four(ids, scores, **kwargs):
        return torch.full((ids.shape[0],), ids.shape[1] >= end)

    for criteria in ([four], four, transformers.StoppingCriteriaList([four])):
        assert len(ask(model, context, max_new_tokens=12, stopping_criteria=criteria).tokens) == 4


def test_generate_returns_the_raw_output_if_asked(model, context):
    answer = ask(model, context, return_dict_in_generate=True, output_scores=True, max_new_tokens=4)
    assert len(answer.output.scores) == 4 and answer.tokens.shape == (4,)
    assert answer.output.sequences[0, : len(context.tokens)].equal(context.tokens)
    assert [int(s.argmax()) for s in answer.output.scores] == answer.tokens.tolist()
    assert ask(model, context, max_new_tokens=4).output is None


def test_generate_streams_what_dense_streams(model, context):
    class Heard:
        def __init__(self):
            self.heard = []

        def put(self, value):
            self.heard.append(value.flatten().tolist())

        def end(self):
            self.heard.append(None)

    ours, theirs = Heard(), Heard()
    ask(model, context, streamer=ours, max_new_tokens=4)
    dense(model, context, streamer=theirs, max_new_tokens=4, do_sample=False)
    assert ours.heard == theirs.heard and ours.heard[-1] is None


REFUSED = {
    "input_ids": torch.ones(1, 1),
    "attention_mask": torch.ones(1, 1),
    "inputs_embeds": torch.ones(1, 1, 64),
    "past_key_values": transformers.DynamicCache(),
    "use_cache": False,
    "cache_implementation": "static",
    "output_attentions": True,
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "token_healing": True,
    "num_beam_groups": 2,
    "use_mtp": True,
    "custom_generate": "somebody/something",
    "generation_config": {"max_new_tokens": 3},
    "max_new_tokenz": 3,
    "num_return_sequences": 2,
    "max_new_tokens": 0,
}


@pytest.mark.parametrize("name", REFUSED)
def test_generate_refuses_by_name_before_the_model_runs(name, model, context, monkeypatch):
    monkeypatch.setattr(model, "forward", lambda *a, **k: pytest.fail("the model ran"))
    with pytest.raises(SqueezedError, match=name.removesuffix("_tokens")) as refused:
        ask(model, context, **{name: REFUSED[name]})
    assert "\n" not in str(refused.value)


class OnlyPut:
    """As short as a streamer may be."""

    def __init__(self):
        self.seen = []

    def put(self, tokens):
        self.seen.append(tokens)


def test_a_streamer_without_an_end_gets_every_token(model, context):
    streamer = OnlyPut()
    answer = ask(model, context, streamer=streamer, max_new_tokens=4)
    prompt, *tokens = streamer.seen
    assert len(prompt.flatten()) > 0
    assert torch.cat([part.flatten() for part in tokens]).equal(answer.tokens)


WRONG_KINDS = {
    "max_new_tokens": ["5", 2.5, True],
    "max_length": ["900"],
    "max_time": ["soon"],
    "num_beams": [0, "many", 1.5],
    "num_return_sequences": [0],
    "temperature": ["hot"],
    "streamer": [5, print],
    "assistant_model": ["gpt2"],
    "stopping_criteria": [5, [None]],
    "logits_processor": ["mine"],
    "synced_gpus": [True],
}


@pytest.mark.parametrize("name", WRONG_KINDS)
def test_arguments_of_the_wrong_kind_are_refused_by_name(name, model, context, monkeypatch):
    monkeypatch.setattr(model, "forward", lambda *a, **k: pytest.fail("the model ran"))
    for value in WRONG_KINDS[name]:
        with pytest.raises(SqueezedError, match=f"^{name}: ") as refused:
            ask(model, context, **{name: value})
        assert "\n" not in str(refused.value)


def test_arguments_that_are_off_are_no_reason_to_refuse(model, context):
    off = {
        "output_attentions": False, "penalty_alpha": 0.0, "num_beam_groups": 1, "use_cache": True,
        "dola_layers": None, "stop_strings": None, "generation_config": None, "streamer": None,
    }  # fmt: skip
    assert ask(model, context, max_new_tokens=3, **off).tokens.shape == (3,)


def test_errors_of_the_callers_own_code_stay_what_they_are(model, context):
    def broken(ids, scores):
        raise ValueError("mine")

    with pytest.raises(ValueError, match=r"^mine$"):
        ask(model, context, logits_processor=[broken], max_new_tokens=3)


def test_respond_over_a_used_cache_answers_the_new_question(model, context):
    cache = context.cache(0.3, implementation="reference")
    first, second = (torch.tensor(tiny_tokenizer()(q)["input_ids"]) for q in ("who?", "what now?"))
    for ids in (first, second, second, first):
        answer = respond(model, tiny_tokenizer(), cache, ids, max_new_tokens=5)
        fresh = context.cache(0.3, implementation="reference")
        expected = respond(model, tiny_tokenizer(), fresh, ids, max_new_tokens=5)
        assert answer.tokens.equal(expected.tokens)


def test_respond_refuses_what_a_fixed_cache_cannot_hold_before_the_model_runs(
    model, context, monkeypatch
):
    cache = context.cache(1.0, implementation="reference", suffix_tokens=12)
    ids = torch.arange(60, 68)
    for tokens in (5, 3):  # 8 + 5 - 1 fill it
        respond(model, tiny_tokenizer(), cache, ids, max_new_tokens=tokens)
    monkeypatch.setattr(model, "forward", lambda *a, **k: pytest.fail("the model ran"))
    with pytest.raises(SqueezedError, match="suffix_tokens"):
        respond(model, tiny_tokenizer(), cache, ids, max_new_tokens=6)
    with pytest.raises(SqueezedError, match="assisted"):
        respond(model, tiny_tokenizer(), cache, ids, max_new_tokens=2, prompt_lookup_num_tokens=2)
    with pytest.raises(SqueezedError, match="question"):
        respond(model, tiny_tokenizer(), cache, ids[:0], max_new_tokens=2)
