"""A context answers only for the weights, adapters, frequencies and tokenizer that made it."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from tiny import FAMILIES, document, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import squeezed
from squeezed.answers.chat import Chat
from squeezed.context.prompt import PromptTemplate
from squeezed.errors import ContextFileError, UnsupportedModelError
from squeezed.hf.identity.fingerprint import difference, model_fingerprint, same_model
from squeezed.hf.identity.vocabulary import tokenizer_fingerprint
from squeezed.hf.switch import using_attention

FLOATS = ("float32", "float16", "bfloat16")


@pytest.fixture(scope="module")
def context():
    config = squeezed.IndexConfig(squeezed.ClusteringConfig(pinned_first=4, pinned_last=20))
    plain = PromptTemplate.plain()
    return squeezed.index(tiny_model(), tiny_tokenizer(), document(400), config, plain)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(path)
    return path


@pytest.fixture
def model():
    return copy.deepcopy(tiny_model())


def differs(made, model):
    return difference(model_fingerprint(model, like=made), made)


def loaded(path, dtype="float32"):
    return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))


def one_neuron(model):
    mlp = model.model.layers[1].mlp
    mlp.gate_proj.weight[7].normal_(std=0.2)
    mlp.up_proj.weight[7].normal_(std=0.2)
    mlp.down_proj.weight[:, 7].normal_(std=0.2)


def one_column(model):
    model.model.layers[2].self_attn.v_proj.weight[:, 33].mul_(1.05)


def one_element(model):
    model.model.layers[0].self_attn.o_proj.weight[5, 9] += 0.05


def two_rows_swapped(model):
    weight = model.model.embed_tokens.weight
    weight[[97, 98]] = weight[[98, 97]]


def one_embedding(model):
    model.model.embed_tokens.weight[101].mul_(0.9)


def a_low_rank_update(model):
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight += 1e-4 * torch.randn(len(weight), 1) @ torch.randn(1, weight.shape[1])


def one_norm(model):
    model.model.layers[1].post_attention_layernorm.weight[3] *= 1.1


def all_frequencies(model):
    model.model.rotary_emb.inv_freq.mul_(0.5)


def the_lowest_frequency(model):
    model.model.rotary_emb.inv_freq[-1] *= 1.05


def the_scale_of_rotary_embeddings(model):
    model.model.rotary_emb.attention_scaling = 1.05


def the_epsilon_of_norms(model):
    for layer in model.model.layers:
        layer.input_layernorm.variance_epsilon = 1e-5


def a_hook(model):
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: output * 1.1)


def an_activation(model):
    model.model.layers[0].mlp.act_fn = torch.nn.GELU()


EDITS = [
    one_neuron,
    one_column,
    one_element,
    two_rows_swapped,
    one_embedding,
    a_low_rank_update,
    one_norm,
    all_frequencies,
    the_lowest_frequency,
    the_scale_of_rotary_embeddings,
    the_epsilon_of_norms,
    a_hook,
    an_activation,
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_any_edit_is_noticed(model, edit):
    made = model_fingerprint(model)
    with torch.no_grad():
        edit(model)
    assert differs(made, model) and not same_model(made, model_fingerprint(model))


@pytest.mark.parametrize("edit", EDITS[:5], ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_an_edit_is_noticed_in_another_type_too(checkpoint, tmp_path, edit, dtype):
    made = model_fingerprint(loaded(checkpoint))
    edited = loaded(checkpoint)
    with torch.no_grad():
        edit(edited)
    edited.save_pretrained(tmp_path)
    assert differs(made, loaded(tmp_path, dtype))
    assert differs(model_fingerprint(loaded(tmp_path, dtype)), loaded(checkpoint))


def test_an_edit_of_a_large_weight_is_noticed_in_a_model_that_was_checked_before():
    model = copy.deepcopy(tiny_model(hidden_size=256, intermediate_size=300, vocab_size=5000))
    made = model_fingerprint(model)
    assert not differs(made, model) and not differs(made, model)
    with torch.no_grad():
        model.model.embed_tokens.weight[4321, 17] += 0.1
    assert "embed_tokens" in differs(made, model)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_checkpoint_in_any_type_is_the_same_model(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path)
    opened = {dtype: loaded(tmp_path, dtype) for dtype in FLOATS}
    for made_in in FLOATS:
        made = model_fingerprint(opened[made_in])
        assert json.loads(json.dumps(made)) == made and len(json.dumps(made)) < 20_000
        for dtype in FLOATS:
            assert differs(made, opened[dtype]) is None, (made_in, dtype)
            assert same_model(made, model_fingerprint(opened[dtype])), (made_in, dtype)
        assert differs(made, opened["bfloat16"].float()) is None or made_in == "float16"
        opened["bfloat16"] = loaded(tmp_path, "bfloat16")


def cast(model):
    return model.half()


def saved_again(model):
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.transformers_version = "6.0"
    return model


def other_ids(model):
    model.config.pad_token_id = model.generation_config.pad_token_id = 257
    model.config.eos_token_id = [256, 257]
    return model


def other_outputs(model):
    model.config.num_labels = 7
    model.config.output_hidden_states = model.config.use_cache = True
    return model


def a_newer_configuration(model):
    model.config.field_of_a_newer_release = None
    model.config.max_position_embeddings *= 2
    return model


def eager(model):
    model.set_attn_implementation("eager")
    return model


def appended_embeddings(model):
    model.resize_token_embeddings(264)
    return model


def compiled(model):
    return torch.compile(model)


def compiled_by_layer(model):
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(layer)
    return model


def in_training(model):
    return model.train()


SAME = [
    cast,
    saved_again,
    other_ids,
    other_outputs,
    a_newer_configuration,
    eager,
    appended_embeddings,
    compiled,
    compiled_by_layer,
    in_training,
]


@pytest.mark.parametrize("change", SAME, ids=lambda change: change.__name__)
def test_what_moves_no_key_is_no_other_model(model, change):
    made = model_fingerprint(model)
    assert differs(made, change(model)) is None


def test_looking_at_a_model_leaves_it_as_it_was(model):
    model.train()
    model.model.layers[0].eval()
    model.set_attn_implementation("eager")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    model_fingerprint(model)
    assert model.training and not model.model.layers[0].training
    assert model.config._attn_implementation == "eager"
    assert all(before[name].equal(tensor) for name, tensor in model.state_dict().items())
    assert torch.get_rng_state().equal(state)


class Switched(torch.nn.Linear):
    """Two additions, of which an attribute of the class says which one counts."""

    chosen = "one"

    def forward(self, x):
        return super().forward(x) + x @ self.additions[self.chosen].T


def test_an_adapter_of_unknown_make_is_noticed_by_what_it_does(model, monkeypatch):
    for layer in model.model.layers:
        layer.self_attn.k_proj = Switched(64, 32, bias=False)
        additions = {name: torch.randn(32, 64) * 0.1 for name in ("one", "two")}
        layer.self_attn.k_proj.additions = torch.nn.ParameterDict(additions)
    made = model_fingerprint(model)
    assert differs(made, model) is None
    monkeypatch.setattr(Switched, "chosen", "two")
    assert differs(made, model) == "keys and values differ"


def adapted(dtype, size, name="one", **settings):
    peft = pytest.importorskip("peft")
    torch.manual_seed(5)
    settings = {"target_modules": ["q_proj", "v_proj"]} | settings
    config = peft.LoraConfig(r=4, init_lora_weights=False, **settings)
    model = copy.deepcopy(tiny_model()).to(getattr(torch, dtype))
    model = peft.get_peft_model(model, config, adapter_name="one")
    model.add_adapter("two", config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                parameter.normal_(0, size)
    return model.eval()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [0.3, 0.03, 0.01])
def test_only_the_active_adapter_counts(dtype, size):
    model, base = adapted(dtype, size), copy.deepcopy(tiny_model()).to(getattr(torch, dtype))
    made, alone = model_fingerprint(model), model_fingerprint(base)
    assert differs(made, model) is None and differs(alone, model) and differs(made, base)
    with model.disable_adapter():
        assert differs(made, model) and differs(alone, model) is None
    model.set_adapter("two")
    assert differs(made, model)
    model.set_adapter("one")
    model.merge_adapter()
    assert differs(made, model) is None
    assert differs(made, model.merge_and_unload()) is None
    assert differs(alone, model.merge_and_unload()) or size == 0.01


def test_virtual_tokens_are_refused_before_the_prefill():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(copy.deepcopy(tiny_model()), config)
    with pytest.raises(UnsupportedModelError, match="virtual tokens"):
        squeezed.index(model, tiny_tokenizer(), document(300))


class VirtualTokens:
    """As much of a prompt-tuned model as a fingerprint looks at."""

    def __init__(self):
        self.active_adapter = "soft"
        self.peft_config = {"soft": SimpleNamespace(is_prompt_learning=True, peft_type="P_TUNING")}


def test_virtual_tokens_are_known_by_their_configuration():
    with pytest.raises(UnsupportedModelError, match="'soft'"):
        model_fingerprint(VirtualTokens())


def test_weights_in_memory_are_read_where_they_are_offloaded_to(model):
    accelerate = pytest.importorskip("accelerate")
    made = model_fingerprint(model)
    other = copy.deepcopy(tiny_model())
    with torch.no_grad():
        one_column(other)
    for candidate, same in ((model, True), (other, False)):
        accelerate.cpu_offload(candidate, execution_device=torch.device("cpu"))
        assert next(candidate.model.layers[0].parameters()).is_meta
        assert (differs(made, candidate) is None) == same


def test_of_weights_on_disk_the_small_ones_are_read(model, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    made, other = model_fingerprint(model), tiny_model(seed=1)
    for name, candidate in (("same", model), ("other", copy.deepcopy(other))):
        accelerate.disk_offload(candidate, tmp_path / name, execution_device=torch.device("cpu"))
        assert (differs(made, candidate) is None) == (name == "same")


def quantised(model, bits):
    """Weights as integers with a scale per row, as libraries store them."""
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, Quantised(getattr(layer.mlp, name).weight, bits))
    return model


class Quantised(torch.nn.Module):
    def __init__(self, weight, bits):
        super().__init__()
        scale = weight.detach().abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        self.register_buffer("qweight", (weight / scale).round().to(torch.int8))
        self.register_buffer("scales", scale)

    def forward(self, x):
        return x @ (self.qweight * self.scales).T


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_copy_is_the_same_model_and_another_one_is_not(model, bits):
    made = model_fingerprint(model)
    packed = quantised(copy.deepcopy(model), bits)
    assert differs(made, packed) is None
    assert differs(model_fingerprint(packed), model) is None
    assert differs(made, quantised(copy.deepcopy(tiny_model(seed=1)), bits))
    packed_made = model_fingerprint(packed)
    packed.model.layers[0].mlp.up_proj.qweight[3, 4] += 1
    assert differs(packed_made, packed)


# where a context meets a model


def test_every_way_to_ask_notices_another_model(context, tmp_path):
    other, words = tiny_model(seed=1), tiny_tokenizer()
    path = context.save(tmp_path / "manual.sqz")
    with pytest.raises(ContextFileError, match="another model"):
        squeezed.load(path, other)
    opened = squeezed.load(path)
    with pytest.raises(ContextFileError, match="another model"):
        squeezed.generate(other, words, opened, "x", max_new_tokens=2)
    with pytest.raises(ContextFileError, match="another model"):
        Chat(other, words, opened, opened.cache())
    answer = squeezed.generate(
        tiny_model(), words, opened, "x", implementation="reference", max_new_tokens=2
    )
    assert len(answer.tokens) == 2


def test_a_chat_notices_an_edit_between_two_turns(context, model):
    cache = context.cache(implementation="reference")
    chat = Chat(model, tiny_tokenizer(), context, cache)
    chat.ask("what?", max_new_tokens=2)
    with torch.no_grad():
        one_neuron(model)
    with pytest.raises(ContextFileError, match="another model"):
        chat.ask("what?", max_new_tokens=2)


@pytest.mark.parametrize(
    "changes", [{"num_hidden_layers": 2}, {"num_hidden_layers": 4}, {"num_key_value_heads": 1}]
)
def test_a_model_of_another_shape_is_refused(context, changes):
    with pytest.raises(ContextFileError, match="another model"):
        squeezed.generate(tiny_model(**changes), tiny_tokenizer(), context, "x", max_new_tokens=2)


@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"num_hidden_layers": 2}, {"num_hidden_layers": 4}, {"head_dim": 32}]
)
def test_plain_generation_over_a_cache_notices_another_model(context, changes):
    with pytest.raises(squeezed.SqueezedError, match="another model"):
        plainly(tiny_model(**changes), context)


def test_plain_generation_over_a_cache_notices_an_edit_of_attention(context, model):
    plainly(model, context)
    with torch.no_grad():
        one_column(model)
    with pytest.raises(ContextFileError, match=r"v_proj\.weight of layer 2"):
        plainly(model, context)


def plainly(model, context):
    ids = torch.tensor([[97, 98, 99]])
    mask = torch.ones(1, len(context.tokens) + 3, dtype=torch.long)
    cache = context.cache(implementation="reference")
    with using_attention(model):
        model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=2)


# tokenizers


def byte_pairs(merges=(("a", "b"), ("ab", "c")), **settings):
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    vocabulary = {letter: index for index, letter in enumerate(dict.fromkeys(letters))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges), **settings))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def unicode_normalizer(tokenizer):
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()


def replacing_normalizer(tokenizer):
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("qzx", "qxz")


def split_digits(tokenizer):
    usual = tokenizer.backend_tokenizer.pre_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, usual])


def merges_dropped(tokenizer):
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokenizer.backend_tokenizer.model = models.BPE(vocab=model["vocab"], merges=[])


def an_added_token(tokenizer):
    tokenizer.add_tokens(["qzx"])


def an_added_special_token(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|qzx|>"]})


def special_tokens_split(tokenizer):
    tokenizer.split_special_tokens = True


TOKENIZER_EDITS = [
    unicode_normalizer,
    replacing_normalizer,
    split_digits,
    merges_dropped,
    an_added_token,
    an_added_special_token,
    special_tokens_split,
]


@pytest.mark.parametrize("edit", TOKENIZER_EDITS, ids=lambda edit: edit.__name__)
def test_an_edited_tokenizer_is_noticed(edit):
    tokenizer = byte_pairs()
    before = tokenizer_fingerprint(tokenizer)
    edit(tokenizer)
    assert tokenizer_fingerprint(tokenizer) != before


def test_order_of_merges_counts():
    pairs = (("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc"))
    other = (pairs[1], pairs[0], *pairs[2:])
    assert tokenizer_fingerprint(byte_pairs(pairs)) != tokenizer_fingerprint(byte_pairs(other))


def test_saving_padding_and_roles_make_no_other_tokenizer(tmp_path):
    tokenizer = byte_pairs()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(transformers.AutoTokenizer.from_pretrained(tmp_path)) == before
    tokenizer.pad_token, tokenizer.padding_side = "</s>", "left"
    tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)
    tokenizer.chat_template, tokenizer.model_max_length = "{{ messages }}", 77
    assert tokenizer_fingerprint(tokenizer) == before


def test_a_file_of_another_release_makes_no_other_tokenizer(tmp_path):
    tokenizer = byte_pairs()
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    written = json.loads(file.read_text())
    written["model"]["merges"] = [" ".join(pair) for pair in written["model"]["merges"]]
    for name in ("ignore_merges", "byte_fallback", "fuse_unk"):
        del written["model"][name]
    del written["pre_tokenizer"]["use_regex"]
    file.write_text(json.dumps(written))
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)
