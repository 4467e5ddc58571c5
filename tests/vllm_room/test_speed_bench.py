"""The bench's contexts are ones that an engine takes: `squeezed.measure.speed.vllm`."""

import torch

from squeezed.context.storage import directory
from squeezed.hf.identity.checkpoint import Checkpoint
from squeezed.measure.speed import vllm as bench


def test_a_fabricated_context_is_one_of_the_model_beside_it(tmp_path):
    model = bench.model_directory(tmp_path / "model", bench.SMALL)
    assert (model / "config.json").is_file()
    path = bench.context_directory(tmp_path, bench.SMALL, 1024, 0.1, "cpu", torch.float32)
    record = directory.load(path)
    config = type("Config", (), dict(bench.SMALL, rope_parameters=None))
    Checkpoint(model, config).check(record)
    assert len(record.layers) == bench.SMALL["num_hidden_layers"]
    assert record.tokens.tolist() == bench.document(1024, bench.SMALL["vocab_size"])
