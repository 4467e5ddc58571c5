"""Seeding and iterations of the spherical k-means: mean cosine of a key to its leaf's centroid.

python benchmarks/seeding.py MODEL_DIRECTORY GGUF_FILE TEXT_FILE [TOKENS]
"""

import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from squeezed import ClusteringConfig
from squeezed.hf.capture import capture
from squeezed.indexing import kmeans
from squeezed.indexing.clustering import cluster_layer
from squeezed.measure.record import write_record


def plus_plus(points, valid, slot, generator):
    """k-means++ by cosine distance, one centre after the other, for all problems at once."""
    rows = torch.arange(points.shape[0])
    chosen = [(torch.rand(len(rows), generator=generator) * valid.sum(-1)).long()]
    distance = torch.full(valid.shape, 2.0)
    for _ in range(len(slot) - 1):
        centre = points[rows, chosen[-1]]
        distance = distance.minimum(1 - torch.einsum("nkd,nd->nk", points, centre)).clamp(min=0)
        weight = distance.masked_fill(~valid, 0) + 1e-12 * valid
        chosen.append(torch.multinomial(weight.clamp(min=1e-20), 1, generator=generator)[:, 0])
    return torch.stack(chosen, 1)


def cosine(layer):
    level = layer.levels[-1]
    keys = torch.nn.functional.normalize(layer.keys[:, layer.pinned :].float(), dim=-1)
    total = 0.0
    for head, sizes in zip(keys, level.sizes, strict=True):
        leaf = torch.arange(level.nodes).repeat_interleave(sizes)
        centres = torch.zeros(level.nodes, keys.shape[-1]).index_add_(0, leaf, head)
        centres = torch.nn.functional.normalize(centres, dim=-1)
        total += float((head * centres[leaf]).sum(-1).mean())
    return total / len(keys)


def main(directory, gguf, text, tokens=6144):
    tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=gguf)
    model = AutoModelForCausalLM.from_pretrained(directory, gguf_file=gguf, dtype=torch.bfloat16)
    words = Path(text).read_text(encoding="utf-8")
    ids = tokenizer(words, return_tensors="pt").input_ids[0, : int(tokens)]
    started = time.perf_counter()
    layers = capture(model, ids, ids[:100], 1024)
    prefill_s = time.perf_counter() - started
    even, lloyd, rows = kmeans.seeds, kmeans.spherical_kmeans, []
    for seeding in ("even", "k-means++"):
        for iterations in (3, 5, 10):
            generator = torch.Generator().manual_seed(0)

            def seeded(points, valid, clusters, count, generator=generator):
                kmeans.seeds = lambda v, c, slot: plus_plus(points, v, slot, generator)
                return lloyd(points, valid, clusters, count)

            kmeans.seeds = even
            kmeans.spherical_kmeans = lloyd if seeding == "even" else seeded
            config = ClusteringConfig(iterations=iterations)
            started = time.perf_counter()
            built = [cluster_layer(c.keys, c.values, config) for c in layers]
            seconds = time.perf_counter() - started
            rows.append(
                {
                    "seeding": seeding,
                    "iterations": iterations,
                    "mean_cosine": sum(map(cosine, built)) / len(built),
                    "clustering_s": seconds,
                    "share_of_prefill": seconds / prefill_s,
                }
            )
            print(rows[-1])
    settings = {"tokens": len(ids), "prefill_s": prefill_s}
    write_record(Path("benchmarks/seeding.json"), settings, rows, "cpu")


if __name__ == "__main__":
    main(*sys.argv[1:])
