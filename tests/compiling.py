"""Compile kernels for a GPU without one, in a process of its own.

    python compiling.py GPU "OPERATION DTYPE DIM GROUP FAR_FIELD REQUESTS [ENCODING]" ...

Prints a JSON object for every case: for every kernel its largest shared memory in bytes, and how
many versions a second context and prompt of other sizes compiled on top of the first.
"""

import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from squeezed.attention.triton import gpus

KIBI = 1 << 10
GPUS = {  # compute capability, multiprocessors, shared memory of one program
    "A100": (80, 108, 163 * KIBI),
    "RTX 4090": (89, 128, 99 * KIBI),
    "H200": (90, 132, 227 * KIBI),
    "B200": (100, 148, 227 * KIBI),
}


class Driver:
    """Stands for the driver: the compiler asks it for the target, and nothing is ever launched."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


FOUND = {}  # per kernel, the shared memory of every compiled version


def compile_only():
    launch = JITFunction.run

    def run(self, *arguments, grid, warmup, **settings):
        kernel = launch(self, *arguments, grid=grid, warmup=True, **settings)
        FOUND.setdefault(self.fn.__name__, {})[kernel.hash] = kernel.metadata.shared
        return kernel

    JITFunction.run = run


def decode(dtype, dim, group, far_field, requests, encoding):
    from squeezed.attention.interface import Suffix
    from squeezed.attention.triton.decode.launch import decode_step

    for tokens, suffix in ((400, 40), (411, 57)):
        layer, rule = context(dtype, dim, group, far_field, tokens, 1, encoding)
        query = torch.randn(requests, 2 * group, 1, dim, dtype=dtype)
        keys = torch.randn(requests, 2, suffix, dim, dtype=dtype)
        decode_step(query, layer, rule, Suffix(keys, keys))
        yield


def blocks(dtype, dim, group, far_field, requests, encoding):
    from squeezed.attention.interface import Suffix
    from squeezed.attention.triton.prefill.launch import prefill

    for tokens, rows, suffix in ((400, 256, 256), (411, 131, 299)):
        layer, rule = context(dtype, dim, group, far_field, tokens, 128, encoding)
        query = torch.randn(requests, 2 * group, rows, dim, dtype=dtype)
        keys = torch.randn(requests, 2, suffix, dim, dtype=dtype)
        mask = torch.ones(requests, 1, rows, suffix, dtype=torch.bool)
        prefill(query, layer, rule, Suffix(keys, keys, mask), mask.any(-1)[:, 0])
        yield


def context(dtype, dim, group, far_field, tokens, block, encoding):
    from trees import random_layer

    from squeezed.context.encoding import encoded
    from squeezed.context.rule import SelectionRule

    far_alpha = torch.ones(2 * group) if far_field == "second_order" else None
    alpha = torch.ones(2, 2 * group)
    thresholds = torch.tensor([[-8.0] * 2, [-6.0] * 2])
    layer = random_layer(kv_heads=2, nodes=(7, 24), dim=dim, tokens=tokens, dtype=dtype)
    layer = encoded(layer, encoding)
    return layer, SelectionRule(thresholds, alpha, far_field, block, far_alpha)


def clustering(dtype, dim, group, far_field, requests, encoding):
    from squeezed.indexing.triton import kmeans as clustering

    for points, nodes in ((1000, 40), (1300, 70)):
        keys, centroids = torch.randn(points, dim).to(dtype), torch.randn(nodes, dim).to(dtype)
        counts = (torch.tensor([n]) for n in (points, nodes))
        clustering.nearest(keys, centroids, clustering.Runs.of(*counts, points, nodes, dim))
        yield


def compile_case(operation, dtype, dim, group, far_field, requests, encoding="plain"):
    FOUND.clear()
    versions = []
    run = {"decode": decode, "prefill": blocks, "clustering": clustering}[operation]
    for _ in run(getattr(torch, dtype), int(dim), int(group), far_field, int(requests), encoding):
        versions.append(sum(map(len, FOUND.values())))
    shared = {kernel: max(sizes.values()) for kernel, sizes in FOUND.items()}
    return {"shared": shared, "more": versions[1] - versions[0]}


def main(name, *cases):
    capability, multiprocessors, shared_bytes = GPUS[name]
    gpus.INTERPRETER = gpus.Gpu(multiprocessors, capability // 10, shared_bytes)
    triton.runtime.driver.set_active(Driver(capability))
    compile_only()
    for case in cases:
        print(json.dumps(compile_case(*case.split())))


if __name__ == "__main__":
    main(*sys.argv[1:])
