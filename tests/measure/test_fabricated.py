import torch

from squeezed.hf.capture import capture
from squeezed.hf.identity.fingerprint import check_attention, check_model
from squeezed.measure.speed.fabricated import context_of, random_model


def test_a_fabricated_context_is_known_as_that_of_its_model():
    model = random_model(1, "cpu", small=True)
    ids = torch.randint(0, 512, (200,), generator=torch.Generator().manual_seed(0))
    seeds = list(capture(model, ids, ids[:40], 64))
    context = context_of(model, seeds, 600, 0.2)
    check_model(model, context)
    check_attention(context.model, 0, model.model.layers[0].self_attn)
    assert (len(context.tokens), len(context.layers)) == (600, 1)
