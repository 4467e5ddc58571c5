"""The arithmetic without a model: keys -> a tree -> one attention call, compared with dense.

python examples/attention_alone.py
"""

import torch

from squeezed.attention import implementation
from squeezed.config import BEST, ClusteringConfig
from squeezed.context.captured import ObservedLayer
from squeezed.indexing.calibrate import calibrate
from squeezed.indexing.clustering import cluster_layer
from squeezed.testing.parts import Parts

HEADS, GROUP, DIM, SCALE = 2, 2, 64, 64**-0.5


def run(tokens=4096, budgets=(0.05, 0.1, 0.3, 1.0), name="reference"):
    """The output's error relative to dense, by budget."""
    parts = Parts.of(HEADS, DIM, "cpu")
    keys, values = parts.draw(tokens), torch.randn(HEADS, tokens, DIM, generator=parts.generator)
    probe = torch.randn(HEADS * GROUP, 64, DIM, generator=parts.generator)
    layer = cluster_layer(keys, values, ClusteringConfig(), probe)
    calibration = calibrate([ObservedLayer(layer, probe, SCALE)], BEST, (0.05, 0.1, 0.3))

    query = torch.randn(1, HEADS * GROUP, 1, DIM, generator=parts.generator)
    recent = torch.randn(2, 1, HEADS, 8, DIM, generator=parts.generator)  # keys, values
    attend = implementation(name, keys.device)
    outputs, errors = {}, {}
    for budget in budgets:
        rule = calibration.rule(0, budget, block=False)
        outputs[budget], read = attend(
            query, layer, rule, layer.centred(recent[0]), recent[1], None, SCALE
        )
        error = (outputs[budget] - dense(query, keys, values, recent)).norm()
        errors[budget] = float(error / dense(query, keys, values, recent).norm())
        print(f"budget {budget:.2f}: {int(read[0])} keys read, error {errors[budget]:.4f}")
    return errors


def dense(query, keys, values, recent):
    k, v = (torch.cat([x[None], y], 2) for x, y in zip((keys, values), recent, strict=True))
    return torch.nn.functional.scaled_dot_product_attention(
        query, k, v, scale=SCALE, enable_gqa=True
    )


if __name__ == "__main__":
    run()
