"""The arithmetic without a model: keys -> a tree -> one attention call, compared with dense.

python examples/attention_alone.py
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

import squeezed
from squeezed.config import BEST, ClusteringConfig
from squeezed.context.captured import ObservedLayer
from squeezed.indexing.calibrate import calibrate
from squeezed.indexing.clustering import cluster_layer
from squeezed.indexing.forest import Forest
from squeezed.testing.parts import Parts

HEADS, GROUP, DIM, SCALE, RECENT = 2, 2, 64, 64**-0.5, 8


def run(tokens=4096, budgets=(0.05, 0.1, 0.3, 1.0), name="reference"):
    """The output's error relative to dense, by budget."""
    parts = Parts.of(HEADS, DIM, "cpu")
    probe, query = (parts.queries(rows, GROUP, torch.float32) for rows in (64, 1))
    every = parts.keys(tokens + RECENT, torch.float32)  # much of them is common to all
    values = torch.randn(every.shape, generator=parts.generator)
    layer = cluster_layer(
        every[:, :tokens], values[:, :tokens], ClusteringConfig(), probe[0], SCALE
    )
    seen = Forest.of([ObservedLayer(layer, probe[0])])
    calibration = calibrate(seen, BEST, (0.05, 0.1, 0.3))

    expected = dense(query, every, values)
    recent = squeezed.Suffix.of(layer, every[None, :, tokens:], values[None, :, tokens:])
    errors = {}
    for budget in budgets:
        rule = calibration.rule(0, budget, block=False)
        output, _, read = squeezed.attend(query, layer, rule, recent, implementation=name)
        errors[budget] = float((output - expected).norm() / expected.norm())
        print(f"budget {budget:.2f}: {int(read[0])} keys read, error {errors[budget]:.5f}")
    return errors


def dense(query, keys, values):
    """In float64, as the yardstick."""
    inputs = (x.double() for x in (query, keys[None], values[None]))
    return scaled_dot_product_attention(*inputs, scale=SCALE, enable_gqa=True)


if __name__ == "__main__":
    run()
