"""A model and its tokenizer from a directory, a hub name or a GGUF file."""

from __future__ import annotations

from pathlib import Path

import torch

from squeezed.errors import SqueezedError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def load_model(name: str, device: str, dtype: str):
    """`(model, tokenizer)`, ready to evaluate.

    Raises:
        SqueezedError: an unknown dtype, or nothing that Transformers can load under `name`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype not in DTYPES:
        raise SqueezedError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    path, extra = name, {}
    if name.endswith(".gguf"):
        path, extra = str(Path(name).parent), {"gguf_file": Path(name).name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **extra)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype], **extra)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SqueezedError(f"model: could not load {name!r}: {first}") from error
    return model.to(device).eval(), tokenizer
