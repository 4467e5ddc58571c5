"""Files from strangers: whatever they hold, one line or an answer, and what was checked is used."""

import errno
import gc
import json
import os
import shutil
import struct
import threading
import time

import pytest
import torch
from made import (
    HEADS,
    LAYER_FILE,
    PINNED,
    TOKENS,
    WINDOW_FILE,
    made_context,
    same_context,
    with_content,
    with_manifest,
    with_tensors,
)

from squeezed import methods
from squeezed.attention import Suffix
from squeezed.context.storage import directory, held, saving
from squeezed.context.storage.manifest import FORMAT_VERSION
from squeezed.context.storage.outline import CLUSTERED, KEYS_AND_VALUES, LEVEL, Outline
from squeezed.context.storage.strict import Malformed, conformed
from squeezed.context.storage.structure import check_layer, tensors_of
from squeezed.errors import ContextFileError, SqueezedError

CONTEXT = made_context()


@pytest.fixture
def saved(tmp_path):
    return saving.save(CONTEXT, tmp_path / "c.sqz")


def refused(path, match=None):
    """Open everything; it must fail with one short line, which is returned."""
    with pytest.raises(ContextFileError, match=match) as caught:
        context = directory.load(path)
        list(context.layers), list(context.observed)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    return str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_saved_context_comes_back(dtype, tmp_path):
    context = made_context(dtype=dtype)
    loaded = directory.load(saving.save(context, tmp_path / "c.sqz"))
    assert same_context(loaded, context)
    assert loaded.calibrations["best"].rule(1, 0.2, True).log_thresholds.shape == (2, HEADS)
    for name, calibration in context.calibrations.items():
        for field in ("per_token", "per_block", "alpha", "far_alpha"):
            pairs = zip(
                getattr(calibration, field), getattr(loaded.calibrations[name], field), strict=True
            )
            assert all(a is b is None or torch.equal(a, b) for a, b in pairs)


def test_kinds_and_shapes_are_known_before_a_layer_is_opened(saved):
    loaded = directory.load(saved)
    assert loaded.outlines == CONTEXT.outlines and not loaded.is_dense
    assert [outline.is_clustered for outline in loaded.outlines] == [True, False, True]
    assert not loaded.layers.opened


def _at(name, place, value):
    def change(tensors):
        tensors[name][place] = value

    return change


def _new(name, make):
    def change(tensors):
        tensors[name] = make(tensors[name]).contiguous()

    return change


def _cut_children(tensors):
    tensors["level0.child_offsets"][:, 1:-1] = tensors["level0.child_offsets"][:, -1:]


CRAFTED = {
    "leaves end behind the rows": _at("level1.key_offsets", (..., -1), TOKENS + 1),
    "leaves end far behind": _at("level1.key_offsets", (..., -1), 2**31 - 1),
    "leaves begin before the pinned rows": _at("level1.key_offsets", (..., 0), PINNED - 1),
    "leaves begin before zero": _at("level1.key_offsets", (0, 0), -1),
    "an offset falls": _at("level1.key_offsets", (1, 4), PINNED - 1 + TOKENS),
    "coarse offsets of their own": _at("level0.key_offsets", (1, 1), PINNED + 1),
    "children end behind the nodes": _at("level0.child_offsets", (..., -1), 10),
    "children begin before zero": _at("level0.child_offsets", (0, 0), -(2**31)),
    "rows without a child": _cut_children,
    "no child offsets": lambda tensors: tensors.pop("level0.child_offsets"),
    "child offsets of the leaves": lambda t: t.update({"level1.child_offsets": torch.ones(2)}),
    "a position twice": _at("positions", (0, 20), 21),
    "a position behind the document": _at("positions", (0, 20), TOKENS),
    "a position before it": _at("positions", (1, 5), -1),
    "pinned rows in another order": _new("positions", lambda t: t.flip(1)),
    "positions as floats": _new("positions", lambda t: t.float()),
    "too many rows pinned": _at("pinned", (), 10**9),
    "a negative number pinned": _at("pinned", (), -1),
    "pinned as a list": _new("pinned", lambda t: t[None]),
    "short centroids": _new("level0.centroids", lambda t: t[:, :-1]),
    "narrow centroids": _new("level1.centroids", lambda t: t[..., :-1]),
    "short mean values": _new("level1.mean_values", lambda t: t[:, :1]),
    "a head too few": _new("values", lambda t: t[:1]),
    "a row too few": _new("keys", lambda t: t[:, :-1]),
    "values of another type": _new("values", lambda t: t.bfloat16()),
    "keys turned round": _new("keys", lambda t: t.mT),
    "no keys": lambda tensors: tensors.pop("keys"),
    "an empty slope": _new("value_slope", lambda t: t[:0]),
    "no centre": lambda tensors: tensors.pop("centre"),
    "a tensor too many": lambda tensors: tensors.update(more=torch.zeros(1)),
    "a negative variance": _at("level1.variance", (0, 3), -1.0),
    "NaN among the keys": _at("keys", (1, 7, 3), float("nan")),
    "infinity among the values": _at("values", (0, 0, 0), float("-inf")),
    "NaN among the mean keys": _at("level0.centroids", (0, 0, 0), float("nan")),
    "an infinite variance": _at("level0.variance", (0, 0), float("inf")),
}


@pytest.mark.parametrize("change", CRAFTED.values(), ids=CRAFTED)
def test_crafted_tensors_are_refused(change, saved):
    with_tensors(saved, LAYER_FILE, change)
    refused(saved, "no context looks like that")


@pytest.mark.parametrize(
    "change",
    [
        _at("window_tokens", (), TOKENS + 1),
        _at("window_tokens", (), -1),
        _new("keys", lambda t: t[:, 1:]),
        lambda tensors: tensors.pop("window_tokens"),
    ],
)
def test_crafted_windows_are_refused(change, saved):
    with_tensors(saved, WINDOW_FILE, change)
    refused(saved, "no context looks like that")


@pytest.mark.parametrize(
    "change",
    [
        _new("layer_000", lambda t: t[:3]),
        _new("layer_001", lambda t: t[..., :5]),
        _new("layer_000", lambda t: t[0]),
        _at("layer_000", (0, 0, 0), float("nan")),
        lambda tensors: tensors.pop("layer_001"),
        lambda tensors: tensors.update(layer_002=torch.zeros(1)),
    ],
)
def test_crafted_observed_queries_are_refused(change, saved):
    with_tensors(saved, "observed_queries.safetensors", change)
    refused(saved, "no context looks like that")


def _put(*path_and_value):
    *path, key, value = path_and_value

    def change(manifest):
        for step in path:
            manifest = manifest[step]
        manifest[key] = value

    return change


def _without(*path):
    def change(manifest):
        for step in path[:-1]:
            manifest = manifest[step]
        del manifest[path[-1]]

    return change


BEST = ("calibrations", "best")
FIELDS = {
    "tokens": [[], [-1], [True], [1.5], [2**63], None, "abc", [[1]], [1] * (TOKENS + 1)],
    "windows": [[None, 13], [None, None, None], [None, 0, None], [None, 1.5, None], [13, 13, 13]],
    "scales": [[0.3], [0.3, 0], [0.3, -1], [0.3, "x"], [0.3, None], [], {}],
    "seconds": [[], {"prefill": "x"}, {"prefill": -1}, {"prefill": None}],
    "files": [{}, [], None, {"../../etc/passwd": {"bytes": 1, "sha256": ""}}],
    "layers": [[], None, [{}], [None] * 3],
    "model": [None, 5, [], "x" * (1 << 20), {"x": "x" * (1 << 20)}],
    "tokenizer": [None, 5, "\ud800"],
    "template": [{}, None, {"before": "", "between": "", "after": 1}],
    "calibrations": [[], {"best": {}}, None, {"other": None}],
    "config": [{}, None, []],
}


@pytest.mark.parametrize("field", FIELDS)
def test_fields_of_the_description_are_checked(field, saved, tmp_path):
    for value in FIELDS[field]:
        shutil.copytree(saved, tmp_path / "copy")
        with_manifest(tmp_path / "copy", _put(field, value))
        refused(tmp_path / "copy")
        shutil.rmtree(tmp_path / "copy")
    with_manifest(saved, _without(field))
    refused(saved, f"{field} is missing")


@pytest.mark.parametrize(
    "change",
    [
        _put(*BEST, "per_token", 0, []),
        _put(*BEST, "per_token", 0, 0, 0, "x"),
        _put(*BEST, "per_block", 1, 0, 0, [0.0]),
        _put(*BEST, "per_block", []),
        _put(*BEST, "alpha", 0, None),
        _put(*BEST, "alpha", 0, 0, 0, -0.1),
        _put(*BEST, "alpha", 0, 0, 0, 4.1),
        _put(*BEST, "alpha", 0, 0, [0.5] * 3),
        _put(*BEST, "far_alpha", 0, [0.5] * 2),
        _put(*BEST, "far_alpha", 1, None),
        _put("calibrations", "paper", "alpha", 0, [[0.5] * 4] * 2),
        _put(*BEST, "budgets", [0.3, 0.1]),
        _put(*BEST, "budgets", [0.1, 1.5]),
        _put(*BEST, "budgets", [0.1]),
        _put(*BEST, "preset", "name", "paper"),
        _put(*BEST, "preset", "far_field", "third_order"),
        _put(*BEST, "preset", "query_block", 10**12),
        _put(*BEST, "preset", "query_block", 0),
        _put(*BEST, "preset", "single_tokens", True),
        _put(*BEST, "preset", "more", 1),
        _put("config", "clustering", "levels", [0.5, 0.1]),
        _put("config", "clustering", "iterations", 1.5),
        _put("config", "prefill_chunk", "1024"),
        _put("layers", 0, "pinned", 0),
        _put("layers", 0, "pinned", TOKENS),
        _put("layers", 0, "rows", TOKENS + 1),
        _put("layers", 0, "heads", 0),
        _put("layers", 0, "dtype", "int64"),
        _put("layers", 0, "nodes", []),
        _put("layers", 0, "nodes", [3, 10**9]),
        _put("layers", 0, "kind", "WindowLayer"),
        _put("layers", 1, "kind", "ClusteredLayer"),
        _put("layers", 1, "nodes", [3]),
        _put("files", LAYER_FILE, "bytes", -1),
        _put("files", LAYER_FILE, "sha256", None),
        _put("files", LAYER_FILE, {}),
        _put("more", 1),
    ],
)
def test_crafted_descriptions_are_refused(change, saved):
    with_manifest(saved, change)
    refused(saved)


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"9" * 10_000,
        b'{"format_version": 5, "format_version": 5}',
        b'{"format_version": NaN}',
        b'{"format_version": "5"}',
        b'{"format_version": true}',
        b'{"format_version": 5}',
        b"\xff\xfe",
        b"null",
        b"[]",
        b"",
    ],
)
def test_text_that_is_no_description_is_refused(text, saved):
    (saved / "context.json").write_bytes(text)
    refused(saved)


@pytest.mark.parametrize(
    ("version", "remedy"),
    [(4, "index the document again"), (FORMAT_VERSION + 1, "upgrade"), (10**300, "upgrade")],
)
def test_other_versions_say_what_to_do(version, remedy, saved):
    with_manifest(saved, _put("format_version", version))
    refused(saved, remedy)


def test_a_context_of_another_version_may_be_replaced(saved):
    with_manifest(saved, _put("format_version", 4))
    saving.save(CONTEXT, saved)
    assert same_context(directory.load(saved), CONTEXT)


def _header(change):
    def crafted(content):
        size = struct.unpack("<Q", content[:8])[0]
        fields = json.loads(content[8 : 8 + size])
        text = change(fields) or json.dumps(fields).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + size :]

    return crafted


HEADERS = {
    "shape overflows": _header(lambda h: h["keys"].update(shape=[2**32, 2**32, 16])),
    "huge shape": _header(lambda h: h["keys"].update(shape=[10**30])),
    "negative shape": _header(lambda h: h["keys"].update(shape=[-2, -90, 16])),
    "shape of floats": _header(lambda h: h["keys"].update(shape=[2.0, 90.0, 16.0])),
    "offsets overlap": _header(lambda h: h["keys"].update(data_offsets=[0, 8])),
    "offsets of another tensor": _header(
        lambda h: h["keys"].update(data_offsets=h["values"]["data_offsets"])
    ),
    "offsets beyond the file": _header(
        lambda h: h["keys"].update(data_offsets=[10**9, 10**9 + 2 * 90 * 16 * 4])
    ),
    "one offset": _header(lambda h: h["keys"].update(data_offsets=[0])),
    "unknown type": _header(lambda h: h["keys"].update(dtype="F8_E4M3")),
    "no type": _header(lambda h: h["keys"].pop("dtype") and None),
    "a tensor that is a list": _header(lambda h: h.update(keys=[])),
    "metadata of numbers": _header(lambda h: h.update(__metadata__={"a": 1})),
    "a key twice": _header(lambda h: b'{"a": 1, "a": 1}'),
    "brackets": _header(lambda h: b"[" * 100_000),
    "not an object": _header(lambda h: b"[]"),
    "no text": _header(lambda h: b"\xff" * 100),
    "length beyond the file": lambda content: struct.pack("<Q", 2**63) + content[8:],
    "length of zero": lambda content: bytes(8) + content[8:],
    "seven bytes": lambda content: content[:7],
    "bytes behind the tensors": lambda content: content + b"x",
    "bytes missing": lambda content: content[:-1],
    "nothing": lambda content: b"",
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS)
def test_lying_headers_are_refused(change, saved):
    with_content(saved, LAYER_FILE, change((saved / LAYER_FILE).read_bytes()))
    refused(saved)


def test_header_in_another_order_and_unaligned_data_are_read(saved):
    def odd(fields):
        text = json.dumps(fields, indent=1).encode()
        return text + b" " * (3 - len(text) % 4)

    with_content(saved, LAYER_FILE, _header(odd)((saved / LAYER_FILE).read_bytes()))
    assert same_context(directory.load(saved), CONTEXT)


@pytest.mark.parametrize("kind", ["directory", "pipe", "dangling", "absent"])
@pytest.mark.parametrize("name", [LAYER_FILE, "context.json"])
def test_files_that_are_none_are_refused_at_once(kind, name, saved):
    file = saved / name
    file.unlink()
    if kind == "directory":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "dangling":
        file.symlink_to("nowhere")
    started = time.monotonic()
    line = refused(saved)
    assert time.monotonic() - started < 5
    assert "try later" not in line and ("context.json" in line) == (name == "context.json")


@pytest.mark.parametrize("name", ["x" * 300, "a\nb", "a\0b", "file", "file/c.sqz", "loop", ""])
def test_names_of_nothing_are_refused(name, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused(tmp_path / name)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.EMFILE])
@pytest.mark.parametrize("name", ["context.json", "layer_000.safetensors"])
def test_why_a_file_cannot_be_opened_is_said(name, code, saved, monkeypatch):
    """Of another user, on a broken disk, by a process that has too many open."""
    opened = os.open

    def refused(path, *args, **kwargs):
        if path == name:
            raise OSError(code, os.strerror(code))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr("os.open", refused)
    with pytest.raises(SqueezedError, match=os.strerror(code)):
        directory.load(saved).layers[0]


def test_what_was_checked_is_what_is_used(saved):
    opened = directory.load(saved)
    list(opened.layers), list(opened.observed)
    for file in saved.iterdir():
        with open(file, "r+b") as stream:
            stream.write(os.urandom(file.stat().st_size))
        os.truncate(file, 10)
    assert same_context(opened, CONTEXT)


def test_a_file_that_is_cut_after_it_was_opened_is_refused(saved):
    opened = directory.load(saved)
    os.truncate(saved / LAYER_FILE, 1000)
    with pytest.raises(ContextFileError, match="found 1000 bytes"):
        opened.layers[2]


@pytest.fixture
def in_pieces(monkeypatch):
    """As files larger than a piece are read: hashed in a thread, into large pages."""
    monkeypatch.setattr(held, "PIECE", 1000)
    monkeypatch.setattr(held, "LARGE", 0)


def test_large_files_are_read_whole_and_may_be_written_to(in_pieces, saved):
    opened = directory.load(saved)
    assert same_context(opened, CONTEXT)
    assert not any(thread.name.startswith("checksum") for thread in threading.enumerate())
    opened.layers[0].keys.zero_()  # memory of its own: the file stays as it is
    assert same_context(directory.load(saved), CONTEXT)


@pytest.mark.parametrize("place", [200, -1])
def test_altered_large_files_are_called_altered_whatever_else_is_wrong(place, in_pieces, saved):
    content = bytearray((saved / LAYER_FILE).read_bytes())
    content[place] ^= 0xFF
    (saved / LAYER_FILE).write_bytes(content)
    refused(saved, "altered")


def test_crafted_large_files_are_refused(in_pieces, saved):
    with_tensors(saved, LAYER_FILE, _at("keys", (1, 7, 3), float("nan")))
    refused(saved, "no context looks like that")


def test_a_deleted_context_is_not_read_any_more(saved):
    opened = directory.load(saved)
    first = opened.layers[0]
    shutil.rmtree(saved)
    for ask in (lambda: opened.layers[2], lambda: opened.observed[0]):
        with pytest.raises(ContextFileError, match="deleted"):
            ask()
    assert opened.layers[0] is first


def test_a_context_that_moves_is_read_on(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    opened = directory.load(directory.Path("c.sqz"))
    monkeypatch.chdir("/")
    saved.rename(tmp_path / "moved.sqz")
    assert same_context(opened, CONTEXT)


@pytest.mark.parametrize("has_preadv", [True, False])
def test_forked_readers_of_one_opened_context_do_not_disturb_each_other(
    has_preadv, saved, monkeypatch
):
    if not has_preadv:
        monkeypatch.delattr(os, "preadv")
    opened = directory.load(saved)
    for _ in range(2):
        child = os.fork()
        if child == 0:
            os._exit(not same_context(opened, CONTEXT))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert same_context(opened, CONTEXT)


def test_descriptors_are_given_back(saved):
    def count():
        return len(os.listdir("/proc/self/fd"))

    gc.collect()  # contexts that other tests refused, held by their errors
    before = count()
    opened = directory.load(saved)
    assert before < count() <= before + 1 + len(os.listdir(saved))
    list(opened.layers), list(opened.observed)
    assert count() == before + 1
    del opened
    assert count() == before


def test_without_descriptors_files_are_opened_later(saved, monkeypatch):
    real = os.open
    few = iter(range(3))

    def limited(*arguments, **options):
        if next(few, None) is None and "dir_fd" in options:
            raise OSError(24, "Too many open files")
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(held.os, "open", limited)
        opened = directory.load(saved)
    assert same_context(opened, CONTEXT)


def test_a_layer_that_could_not_be_loaded_is_not_saved(tmp_path):
    context = made_context()
    context.layers[0].keys[0, 0, 0] = float("nan")
    with pytest.raises(ContextFileError, match="keys"):
        saving.save(context, tmp_path / "c.sqz")
    assert list(tmp_path.iterdir()) == []


def test_every_field_of_a_layer_is_in_the_table():
    layer = CONTEXT.layers[0]
    tensors = tensors_of(layer)
    held = {*vars(layer), *vars(layer.rows)}
    elsewhere = {"rows", "encoding", "codes", "levels", "scale"}
    assert held - elsewhere == {field.name for field in (*KEYS_AND_VALUES, *CLUSTERED)}
    assert set(vars(layer.levels[0])) == {field.name for field in LEVEL}
    check_layer(tensors, Outline.of(layer), TOKENS)


def test_a_value_must_be_what_its_type_says():
    assert conformed([1, 2], tuple[int, ...], "x") == (1, 2)
    assert conformed(None, int | None, "x") is None
    for value, hint in (
        (True, int),
        (1.0, int),
        ("1", float),
        (10**400, float),
        ([1, None], tuple[int, ...]),
        ({"a": 1}, dict[str, str]),
        (1, bool),
    ):
        with pytest.raises(Malformed):
            conformed(value, hint, "x")


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(4, 2, 32), (4, 1, 16), (8, 2, 16), (4, 4, 16)]
)
def test_a_model_of_another_shape_is_refused_before_a_kernel_runs(heads, kv_heads, dim, saved):
    attention = methods.create("squeezed", preset="best", implementation="cpu").prepare(
        directory.load(saved), 0.2
    )[0]
    keys = torch.randn(1, kv_heads, 3, dim)
    query, suffix = torch.randn(1, heads, 1, dim), Suffix(keys, keys)
    with pytest.raises(SqueezedError, match="the model"):
        attention.attend(query, suffix, per_token=True)
