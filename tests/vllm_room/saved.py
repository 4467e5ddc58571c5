"""Contexts of a tiny model, saved; made once in a run."""

import functools
import shutil
import tempfile
from pathlib import Path

from tiny import document, tiny_model, tiny_tokenizer

import squeezed

BLOCK = 16


@functools.cache
def made(words=700, seed=0, model_seed=0):
    """A saved context over a document of its own: its path, and its ids."""
    model = tiny_model("llama", model_seed)
    context = squeezed.index(model, tiny_tokenizer(), document(words, seed))
    path = Path(tempfile.mkdtemp()) / f"words{words}-{seed}.sqz"
    context.save(path)
    return path, context.tokens.tolist()


@functools.cache
def checkpoint(seed=0, dtype=None):
    """The files of a tiny model."""
    model = tiny_model("llama", seed)
    path = tempfile.mkdtemp()
    model.save_pretrained(path)
    return Path(path)


def put(folder, name, **which):
    """A copy of a saved context in `folder`: its ids."""
    path, ids = made(**which)
    shutil.copytree(path, folder / f"{name}.sqz")
    return ids
