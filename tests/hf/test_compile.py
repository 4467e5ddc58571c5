"""The decode step compiles into one graph: no graph breaks between query and logits."""

import pytest
import torch
from tiny import document, tiny_model, tiny_tokenizer

import squeezed
from squeezed.attention import reference
from squeezed.context.prompt import PromptTemplate
from squeezed.hf.switch import using_attention

triton = pytest.importorskip("triton")

CONFIG = squeezed.IndexConfig(
    clustering=squeezed.ClusteringConfig(levels=(0.05, 0.2), pinned_first=4, pinned_last=20)
)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_decode_step_is_one_graph_and_equals_the_eager_step(family, monkeypatch):
    from squeezed import attention as ops
    from squeezed.attention import triton as kernels

    # Without a GPU the reference stands in for the kernel behind the operator.
    monkeypatch.setattr(kernels.decoding, "decode_step", reference.attend)
    monkeypatch.setattr(kernels.prefilling, "prefill", reference.attend)
    monkeypatch.setattr(ops, "implementation", lambda name, device: kernels.attend)
    model = tiny_model(family)
    context = squeezed.index(model, tiny_tokenizer(), document(), CONFIG, PromptTemplate.plain())
    question = torch.tensor([tiny_tokenizer()("what is alpha?")["input_ids"]])
    torch.compiler.reset()
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    with using_attention(model), torch.no_grad():
        logits = []
        for forward in (model.forward, compiled):
            cache = context.cache(0.2, suffix_tokens=32)
            tokens = model(input_ids=question, past_key_values=cache).logits[:, -1:].argmax(-1)
            for _ in range(3):
                step = forward(
                    input_ids=tokens,
                    past_key_values=cache,
                    position_ids=cache.get_seq_length().view(1, 1),
                    attention_mask=_masks(model, cache, tokens),
                ).logits
                tokens = step[:, -1:].argmax(-1)
                logits.append(step)
            spent = cache.spending()
            assert spent.keys_read > 0 and spent.budget < 0.6
    for eager, graph in zip(logits[:3], logits[3:], strict=True):
        torch.testing.assert_close(eager, graph, atol=1e-4, rtol=1e-4)


def _masks(model, cache, tokens):
    """The masks that generate() makes before it calls the compiled forward."""
    from transformers.masking_utils import create_masks_for_generate

    total = int(cache.get_seq_length()) + 1
    return create_masks_for_generate(
        config=model.config,
        inputs_embeds=torch.empty(1, 1, 0),
        attention_mask=torch.ones(1, total, dtype=torch.long),
        past_key_values=cache,
        position_ids=None,
    )
