"""Compile the kernels of a prefill for an H100 or H200 without one, in a process of its own.

Prints a JSON object: for every compiled kernel its largest shared memory in bytes, and how many
versions the second, differently sized prompt compiled on top of the first (it should be none).
"""

import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction


class Hopper:
    """Stands for the driver: the compiler asks it for the target, and nothing is ever launched."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_only(found):
    launch = JITFunction.run

    def run(self, *arguments, grid, warmup, **settings):
        kernel = launch(self, *arguments, grid=grid, warmup=True, **settings)
        found.setdefault(self.fn.__name__, {})[kernel.hash] = kernel.metadata.shared
        return kernel

    JITFunction.run = run


def main(dtype, dim, group, block, far_field, hopper):
    triton.runtime.driver.set_active(Hopper())
    found = {}
    compile_only(found)

    from trees import random_layer

    from squeezed.ops.triton import prefill_hopper
    from squeezed.ops.triton.prefill import attend
    from squeezed.rule import SelectionRule

    prefill_hopper.is_hopper = lambda device: hopper == "hopper"
    dtype, versions = getattr(torch, dtype), []
    far_alpha = torch.ones(2 * group) if far_field == "second_order" else None
    thresholds = torch.tensor([[-8.0] * 2, [-6.0] * 2])
    rule = SelectionRule(thresholds, None, far_field, int(block), far_alpha)
    for rows, suffix, tokens in ((256, 256, 400), (131, 299, 411)):
        layer = random_layer(kv_heads=2, nodes=(7, 24), dim=dim, tokens=tokens, dtype=dtype)
        query = torch.randn(1, 2 * group, rows, dim, dtype=dtype)
        keys = torch.randn(1, 2, suffix, dim, dtype=dtype)
        mask = torch.ones(1, 1, rows, suffix, dtype=torch.bool)
        attend(query, layer, rule, keys, keys, mask, dim**-0.5)
        versions.append(sum(map(len, found.values())))
    shared = {name: max(sizes.values()) for name, sizes in found.items()}
    print(json.dumps({"shared": shared, "more": versions[1] - versions[0]}))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]), *sys.argv[5:])
