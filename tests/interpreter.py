"""Triton on the CPU for tests: import this before any kernel. With a GPU it changes nothing."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _index_by_item() -> None:
    """Triton 3.6's interpreter makes loop bounds of one-element arrays; numpy 2.4 refuses them."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


if DEVICE == "cpu":
    _index_by_item()
