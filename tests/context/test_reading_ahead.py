"""Layers of a saved context taken one after another: the next ones are read meanwhile."""

import threading
from dataclasses import replace

import pytest
import torch
from made import made_context

from squeezed.context.storage import directory, saving
from squeezed.context.storage.names import layer_file
from squeezed.errors import ContextFileError

COUNT = 7


@pytest.fixture
def saved(tmp_path):
    """A context of seven layers, each with keys of its own."""
    made = made_context()
    layers, windows = [], []
    for number in range(COUNT):
        layer = made.layers[0]
        layers.append(replace(layer, rows=replace(layer.rows, keys=layer.keys + number)))
        windows.append(None)
    calibrations = {
        name: replace(
            one,
            **{
                field: [getattr(one, field)[0]] * COUNT
                for field in ("per_token", "per_block", "alpha", "far_alpha")
            },
        )
        for name, one in made.calibrations.items()
    }
    many = replace(
        made,
        layers=tuple(layers),
        windows=tuple(windows),
        observed=[made.observed[0]] * COUNT,
        calibrations=calibrations,
    )
    return many, saving.save(many, tmp_path / "c.sqz")


@pytest.mark.parametrize("cores", [1, 2, 6, 64])
def test_all_layers_in_order_whatever_reads_them(cores, saved, monkeypatch):
    monkeypatch.setattr(directory.os, "cpu_count", lambda: cores)
    many, path = saved
    record = directory.load(path)
    found = list(record.layers)
    assert all(torch.equal(x.keys, y.keys) for x, y in zip(found, many.layers, strict=True))
    assert all(record.layers[i] is layer for i, layer in enumerate(found))
    assert list(record.layers) == found


def test_layers_are_read_at_the_same_time_but_not_far_ahead(saved, monkeypatch):
    monkeypatch.setattr(directory.os, "cpu_count", lambda: 6)
    record = directory.load(saved[1])
    together, began, opened = threading.Barrier(3, timeout=20), [], record.layers._open

    def slow(index):
        began.append(index)
        if index < 3:
            together.wait()  # passes only when three are read at once
        return opened(index)

    monkeypatch.setattr(record.layers, "_open", slow)
    taken = iter(record.layers)
    next(taken)
    assert sorted(began) == [0, 1, 2]
    taken.close()
    assert len(record.layers.opened) == 3


def test_a_damaged_layer_is_an_error_where_it_is_taken(saved, monkeypatch):
    monkeypatch.setattr(directory.os, "cpu_count", lambda: 8)
    file = saved[1] / layer_file(4, directory.load(saved[1]).layers.source.token)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    taken = iter(directory.load(saved[1]).layers)
    for _ in range(4):
        next(taken)
    with pytest.raises(ContextFileError, match="checksum"):
        next(taken)
    assert not [x for x in threading.enumerate() if x.name.startswith("squeezed-layers")]
