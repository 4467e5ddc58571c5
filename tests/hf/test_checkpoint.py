import pytest
import torch
from tiny import document, tiny_model, tiny_tokenizer

import squeezed
from squeezed.errors import ContextFileError
from squeezed.hf.identity.checkpoint import Checkpoint, decoder_name, quantization_of
from squeezed.hf.identity.fingerprint import difference, model_fingerprint


def context_of(model):
    return squeezed.index(model, tiny_tokenizer(), document(300))


def files(model, path, dtype=torch.float32):
    model.to(dtype).save_pretrained(path)
    model.float()
    return Checkpoint(path, model.config)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "smollm", "mistral"])
def test_a_checkpoint_knows_its_contexts(family, tmp_path):
    model = tiny_model(family)
    context = context_of(model)
    files(model, tmp_path).check(context)
    with pytest.raises(ContextFileError, match="another model"):
        files(tiny_model(family, 1), tmp_path / "other").check(context)


def test_the_type_that_it_is_stored_in_does_not_matter(tmp_path):
    model = tiny_model("llama", 5)
    context = context_of(model)
    rounded = files(model, tmp_path, torch.bfloat16)  # the weights stay rounded
    rounded.check(context)
    rounded.check(context_of(model))


@pytest.mark.parametrize("name", ["input_layernorm.weight", "k_proj.weight", "v_proj.weight"])
def test_one_edited_weight_is_seen(name, tmp_path):
    model = tiny_model("llama", 6)
    context = context_of(model)
    edited = next(p for n, p in model.named_parameters() if n.endswith(name))
    before = edited.detach().clone()
    try:
        edited.data.view(-1)[0] += 0.1
        with pytest.raises(ContextFileError, match=name):
            files(model, tmp_path).check(context)
    finally:
        edited.data.copy_(before)


def test_other_frequencies_are_seen(tmp_path):
    model = tiny_model("llama", 7)
    context = context_of(model)
    checkpoint = files(model, tmp_path)
    config = type(model.config)(**model.config.to_dict())
    config.rope_parameters = {**config.rope_parameters, "rope_theta": 123456.0}
    with pytest.raises(ContextFileError, match="inv_freq"):
        Checkpoint(tmp_path, config).check(context)
    checkpoint.check(context)


def test_another_shape_is_seen_without_reading_weights(tmp_path):
    context = context_of(tiny_model("llama"))
    with pytest.raises(ContextFileError, match="layers"):
        Checkpoint(tmp_path, tiny_model("llama", num_hidden_layers=4).config).check(context)
    with pytest.raises(ContextFileError, match="KV heads"):
        Checkpoint(tmp_path, tiny_model("llama", num_key_value_heads=4).config).check(context)


def test_contexts_of_unquantised_weights_are_not_for_quantised_engines(tmp_path):
    model = tiny_model("llama")
    context = context_of(model)
    files(model, tmp_path)
    with pytest.raises(ContextFileError, match="fp8"):
        Checkpoint(tmp_path, model.config, "fp8").check(context)


def test_an_engines_fingerprint_is_understood_by_transformers(tmp_path):
    model, other = tiny_model("llama"), tiny_model("llama", 1)
    made = files(model, tmp_path).fingerprint()
    assert difference(model_fingerprint(model, like=made), made) is None
    assert difference(model_fingerprint(other, like=made), made)


def test_names_of_wrapped_decoders():
    assert decoder_name("model.layers.0.x.weight") == "layers.0.x.weight"
    assert decoder_name("model.language_model.layers.0.x.weight") == "layers.0.x.weight"
    assert decoder_name("lm_head.weight") == "lm_head.weight"


def test_quantisation_is_read_from_the_files(tmp_path):
    assert quantization_of(tmp_path) is None
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    assert quantization_of(tmp_path) == "awq"
