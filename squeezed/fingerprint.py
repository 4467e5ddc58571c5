"""Fingerprints of a model and a tokenizer: does this context belong to this model?"""

from __future__ import annotations

import hashlib
import json

import torch

VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")
PROBE = "The quick brown fox: 0123456789 \n\tжизнь 言語 {}[]() ~ café."


def model_fingerprint(model) -> str:
    """Hash of the configuration and of a few weights of every parameter, as hexadecimal.

    Two checkpoints of one architecture differ; loading the same one again, in another place or
    under another attention implementation, does not.
    """
    config = {
        key: value
        for key, value in model.config.to_dict().items()
        if key not in VOLATILE and not key.startswith(("_", "quantization"))
    }
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.named_parameters()):
        flat = weight.detach().reshape(-1)
        if not flat.is_floating_point():
            continue
        sample = flat[:: max(1, flat.numel() // 16)][:16].to("cpu", torch.float32)
        digest.update(name.encode())
        digest.update(sample.to(torch.bfloat16).float().numpy().tobytes())
    return digest.hexdigest()[:32]


def tokenizer_fingerprint(tokenizer) -> str:
    """Hash of the vocabulary and of how a probe text is split."""
    digest = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    digest.update(str(tokenizer(PROBE, add_special_tokens=False)["input_ids"]).encode())
    return digest.hexdigest()[:32]
