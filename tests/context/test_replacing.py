"""Whatever ends a save, at any moment: the older context or the new one lies there, and no rubbish.

The contexts are made without a model.
"""

import errno
import os
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from made import made_context, same_context

from squeezed.context.storage import directory as storage
from squeezed.context.storage import replacing
from squeezed.errors import ContextFileError

OLD, NEW = made_context(0), made_context(1)


@pytest.fixture(params=["exchange", "two renames"])
def way(request, monkeypatch):
    """Both ways to replace a directory: in one step, and where no system call does that."""
    if request.param == "two renames":
        monkeypatch.setattr(replacing, "exchange", _no_exchange)
    return request.param


def _no_exchange(one, other):
    raise NotImplementedError


def beside(path):
    return sorted(entry.name for entry in path.parent.iterdir())


def holds(path, context):
    return same_context(storage.load(path), context)


@pytest.mark.parametrize("replaced", [True, False])
def test_interrupted_at_any_line_is_old_or_new_without_rubbish(
    way, replaced, tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a thousand saves
    target, seen = tmp_path / "c.sqz", set()
    files = {module.__file__ for module in (replacing, storage)}
    if replaced:
        storage.save(OLD, target)
    for line in range(5000):
        ended = _interrupted(lambda: storage.save(NEW, target), line, files)
        if not ended:
            break
        assert beside(target) in (["c.sqz"], [] if not replaced else None), f"line {line}"
        if target.exists():
            was_new = holds(target, NEW)
            seen.add("new" if was_new else "old")
            assert was_new or holds(target, OLD), f"line {line}"
            if was_new and replaced:
                storage.save(OLD, target)
            elif was_new:
                for file in target.iterdir():
                    file.unlink()
                target.rmdir()
    assert line > 100 and not ended
    assert seen == ({"old", "new"} if replaced else {"new"})


def _interrupted(action, line, files):
    """Run `action` with a KeyboardInterrupt before the `line`-th line of some files, of which one
    counts twice at most; whether it came so far."""
    count, met = [0], Counter()

    def trace(frame, event, argument):
        if frame.f_code.co_filename not in files:
            return None
        place = frame.f_code.co_filename, frame.f_lineno
        if event == "line" and met[place] < 2:
            met[place] += 1
            count[0] += 1
            if count[0] == line + 1:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return count[0] > line


@pytest.mark.parametrize(
    "recover", [storage.load, lambda target: storage.save(NEW, target.parent / "d.sqz")]
)
def test_killed_between_two_renames_is_put_back_by_load_and_by_save(recover, tmp_path):
    target = storage.save(OLD, tmp_path / "c.sqz")
    _killed_when_moved_aside(target)
    assert not target.exists()
    recover(target)
    assert holds(target, OLD)
    assert not [name for name in beside(target) if name.startswith(".")]


def _killed_when_moved_aside(target):
    child = os.fork()
    if child == 0:
        rename = os.rename
        replacing.exchange = _no_exchange

        def once(source, goal):
            rename(source, goal)
            os._exit(9)

        os.rename = once
        storage.save(NEW, target)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_reader_waits_for_a_saver_between_two_renames(tmp_path, monkeypatch):
    target = storage.save(OLD, tmp_path / "c.sqz")
    monkeypatch.setattr(replacing, "exchange", _no_exchange)
    rename = os.rename

    def slowly(source, goal):
        rename(source, goal)
        time.sleep(0.2)

    monkeypatch.setattr(os, "rename", slowly)
    saver = threading.Thread(target=storage.save, args=(NEW, target))
    saver.start()
    while target.exists():
        time.sleep(0.001)
    assert holds(target, NEW)
    saver.join()


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    living = replacing.Place(tmp_path / "other.sqz")
    living.make()
    for name in (f"{replacing.PREFIX}{replacing.kernel()}-1", f"{replacing.PREFIX}otherone-2"):
        (tmp_path / name / "context").mkdir(parents=True)
    (tmp_path / ".squeezed-notes").mkdir()
    (tmp_path / ".squeezed-notes" / "mine.txt").write_text("keep me")
    target = storage.save(NEW, tmp_path / "c.sqz")
    left = set(beside(target))
    assert left == {"c.sqz", living.path.name, ".squeezed-notes", f"{replacing.PREFIX}otherone-2"}
    living.remove()
    old = time.time() - 2 * replacing.FOREIGN_SECONDS
    os.utime(tmp_path / f"{replacing.PREFIX}otherone-2", (old, old))
    storage.save(NEW, target)
    assert beside(target) == [".squeezed-notes", "c.sqz"]


def test_threads_save_to_one_name(way, tmp_path):
    target, failures = tmp_path / "c.sqz", []

    def savings(context):
        try:
            for _ in range(15):
                storage.save(context, target)
                loaded = storage.load(target)
                assert same_context(loaded, OLD) or same_context(loaded, NEW)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=savings, args=(c,)) for c in (OLD, NEW, OLD)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert beside(target) == ["c.sqz"]


def test_opened_context_answers_on_when_it_is_replaced(way, tmp_path):
    target = storage.save(OLD, tmp_path / "c.sqz")
    opened = storage.load(target)
    storage.save(NEW, target)
    assert same_context(opened, OLD) and holds(target, NEW)
    assert beside(target) == ["c.sqz"]


def test_everything_is_on_the_disk_before_the_older_one_goes(way, tmp_path, monkeypatch):
    target = storage.save(OLD, tmp_path / "c.sqz")
    steps = []
    fsync, exchange, rename, rmtree = (
        os.fsync,
        replacing.exchange,
        os.rename,
        replacing.shutil.rmtree,
    )
    monkeypatch.setattr(os, "fsync", lambda fd: steps.append(_name_of(fd)) or fsync(fd))
    monkeypatch.setattr(os, "rename", lambda a, b: steps.append("move") or rename(a, b))
    monkeypatch.setattr(
        replacing, "exchange", lambda a, b: (exchange(a, b), steps.append("move"))[0]
    )
    monkeypatch.setattr(
        replacing.shutil, "rmtree", lambda p, **k: steps.append("remove") or rmtree(p, **k)
    )
    storage.save(NEW, target)
    moves = [i for i, step in enumerate(steps) if step == "move"]
    written = {file.name for file in target.iterdir()} | {replacing.NEW}
    assert written <= set(steps[: moves[0]])
    removal = len(steps) - 1 - steps[::-1].index("remove")
    assert tmp_path.name in steps[moves[-1] : removal]


def _name_of(descriptor):
    return Path(os.readlink(f"/proc/self/fd/{descriptor}")).name


@pytest.mark.parametrize("extra", ["notes.txt", "layer_000.safetensors.bak", "src/thesis.tex"])
def test_a_context_with_files_of_others_is_not_replaced(extra, tmp_path):
    target = storage.save(OLD, tmp_path / "c.sqz")
    (target / extra).parent.mkdir(exist_ok=True)
    (target / extra).write_text("years of work")
    with pytest.raises(ContextFileError, match="does not belong"):
        storage.save(NEW, target)
    assert (target / extra).read_text() == "years of work"
    assert beside(target) == ["c.sqz"]


@pytest.mark.parametrize(
    "content",
    ["{}", '{"name": "a web application"}', '{"format_version": 5, "files": {}}', "[", ""],
)
def test_a_directory_with_another_context_json_is_not_replaced(content, tmp_path):
    target = tmp_path / "project"
    target.mkdir()
    (target / "context.json").write_text(content)
    for action in (lambda: storage.save(NEW, target), lambda: storage.prove_writable(target)):
        with pytest.raises(ContextFileError, match="not a saved context"):
            action()
    assert (target / "context.json").read_text() == content


def test_a_file_that_appears_while_saving_is_kept(way, tmp_path, monkeypatch):
    target = storage.save(OLD, tmp_path / "c.sqz")
    write = storage._write

    def and_meanwhile(context, directory):
        write(context, directory)
        (target / "notes.txt").write_text("keep me")

    monkeypatch.setattr(storage, "_write", and_meanwhile)
    with pytest.raises(ContextFileError, match=r"c\.sqz is a saved context and holds notes\.txt"):
        storage.save(NEW, target)
    assert (target / "notes.txt").read_text() == "keep me"
    assert holds(target, OLD) and beside(target) == ["c.sqz"]


def test_a_link_is_followed(way, tmp_path):
    (tmp_path / "disk").mkdir()
    real = storage.save(OLD, tmp_path / "disk" / "c.sqz")
    link = tmp_path / "c.sqz"
    link.symlink_to(real)
    storage.save(NEW, link)
    assert link.is_symlink() and holds(real, NEW)
    assert beside(link) == ["c.sqz", "disk"] and beside(real) == ["c.sqz"]


@pytest.mark.parametrize(
    "name", ["보" * 81 + ".sqz", "x" * 255, "a\nb", " ", "-", "…", "x.sqz.sqz"]
)
def test_names_that_a_directory_may_have(name, tmp_path):
    storage.prove_writable(tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    assert holds(storage.save(NEW, tmp_path / name), NEW)
    assert holds(storage.save(OLD, tmp_path / name), OLD)


@pytest.mark.parametrize(
    "name", ["x" * 256, "보" * 90, "a\0b", "..", "", "dangling", "file/c", "loop"]
)
def test_places_that_cannot_be_written_are_refused_in_one_line(name, tmp_path):
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "c.sqz")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("")
    before = beside(tmp_path / "file")
    for action in (storage.prove_writable, lambda path: storage.save(NEW, path)):
        with pytest.raises(ContextFileError) as caught:
            action(tmp_path / name if name else Path("."))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert beside(tmp_path / "file") == before


def test_missing_parents_are_made_and_stay_only_with_a_context(tmp_path, monkeypatch):
    target = tmp_path / "a" / "b" / "c.sqz"
    storage.prove_writable(target)
    assert list(tmp_path.iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr(storage, "save_file", _full)
        with pytest.raises(ContextFileError, match="No space"):
            storage.save(NEW, target)
    assert list(tmp_path.iterdir()) == []
    assert holds(storage.save(NEW, target), NEW)


def _full(*arguments, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_rights_follow_the_umask(umask, tmp_path):
    before = os.umask(umask)
    try:
        target = storage.save(NEW, tmp_path / "c.sqz")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in target.iterdir()} == {0o666 & ~umask}
    assert target.stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_file_system_without_locks_saves_too(way, tmp_path, monkeypatch):
    def none(*arguments):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(replacing.fcntl, "flock", none)
    target = storage.save(OLD, tmp_path / "c.sqz")
    storage.save(NEW, target)
    assert holds(target, NEW) and beside(target) == ["c.sqz"]


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_linux_replaces_in_one_step(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    (one / "mark").write_text("")
    replacing.exchange(one, other)
    assert (other / "mark").exists() and not (one / "mark").exists()
