"""Whatever ends a save, at any moment: the older context or the new one lies there, and no rubbish.

The contexts are made without a model.
"""

import errno
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from made import made_context, same_context

from squeezed.context.storage import clearing, manifest, names, replacing, saving, tensorfile
from squeezed.context.storage.directory import load
from squeezed.context.storage.saving import prove_writable, save
from squeezed.errors import ContextFileError
from squeezed.system import files

OLD, NEW = made_context(0), made_context(1)
UNNAMED, LOCK = files.unnamed, files.lock


@pytest.fixture(params=["without names", "with names"])
def way(request, monkeypatch):
    """Files that get their names last, and those of systems where they need one at once."""
    if request.param == "with names":
        monkeypatch.setattr(files, "unnamed", lambda directory: None)
    return request.param


def beside(path):
    return sorted(entry.name for entry in path.parent.iterdir())


def holds(path, context):
    """Whether a context lies there, whole, and nothing else with it."""
    listed = manifest.listed_files(path)
    return same_context(load(path), context) and listed == set(os.listdir(path))


@pytest.mark.parametrize("replaced", [True, False])
def test_interrupted_at_any_line_is_old_or_new_without_rubbish(
    way, replaced, tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a thousand saves
    target, seen = tmp_path / "c.sqz", set()
    modules = (replacing, saving, clearing, tensorfile)
    paths = {module.__file__ for module in modules}
    if replaced:
        save(OLD, target)
    for line in range(5000):
        ended = _interrupted(lambda: save(NEW, target), line, paths)
        if not ended:
            break
        assert beside(target) in (["c.sqz"], [] if not replaced else None), f"line {line}"
        if target.exists():
            was_new = same_context(load(target), NEW)
            seen.add("new" if was_new else "old")
            assert holds(target, NEW if was_new else OLD), f"line {line}"
            if was_new and replaced:
                save(OLD, target)
            elif was_new:
                shutil.rmtree(target)
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


def _killed(steps, action):
    """Run `action` in a child that is killed before its `steps`-th step with a file; whether it
    was."""
    child = os.fork()
    if child == 0:
        left = [steps]

        def counting(real):
            def step(*arguments, **options):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **options)

            return step

        for name in ("open", "link", "rename", "replace", "unlink", "mkdir", "rmdir"):
            setattr(os, name, counting(getattr(os, name)))
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_killed_at_any_step_is_old_or_new_and_nothing_beside_it(way, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    target, seen = save(OLD, tmp_path / "c.sqz"), set()
    before = sorted(os.listdir(target))
    for step in range(1000):
        if not _killed(step, lambda: save(NEW, target)):
            break
        assert beside(target) == ["c.sqz"], f"step {step}"
        was_new = same_context(load(target), NEW)
        seen.add(was_new)
        assert was_new or same_context(load(target), OLD), f"step {step}"
        save(OLD, target)
        assert holds(target, OLD)
        before = sorted(os.listdir(target))
    assert step > 20 and seen == {True, False} and before


def test_killed_at_any_step_over_nothing_is_none_or_new(way, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    target, left = tmp_path / "c.sqz", Counter()
    for step in range(1000):
        if not _killed(step, lambda: save(NEW, target)):
            break
        assert not target.exists() or holds(target, NEW), f"step {step}"
        left[bool(set(beside(target)) - {"c.sqz"})] += 1
        save(OLD, target)
        assert holds(target, OLD) and beside(target) == ["c.sqz"]
        shutil.rmtree(target)
    assert step > 20 and left[False]


def test_files_without_names_are_left_by_nobody(tmp_path, monkeypatch):
    if UNNAMED(tmp_path) is None:
        pytest.skip("this file system has no files without names")
    target = save(OLD, tmp_path / "c.sqz")
    before = sorted(os.listdir(target))
    write, done = tensorfile.write, []

    def killed_in_the_last_file(descriptor, tensors, metadata=None):
        found = write(descriptor, tensors, metadata)
        done.append(descriptor)
        if len(done) == len(before) - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    for place in (target, tmp_path / "d.sqz"):
        child = os.fork()
        if child == 0:
            tensorfile.write = killed_in_the_last_file
            try:
                save(NEW, place)
            finally:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert beside(target) == ["c.sqz"] and sorted(os.listdir(target)) == before


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    living = replacing.Work(tmp_path / "other.sqz")
    living.begin()
    foreign = f"{names.WORK}{'0' * 8}{names.new_token()[8:]}"
    empty, dead = (f"{names.WORK}{names.new_token()}" for _ in range(2))
    for name in (foreign, dead):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("")
        (tmp_path / name / "layer_000.safetensors").write_text("")
    for name in (empty, ".squeezed-notes"):
        (tmp_path / name).mkdir()
    notes = tmp_path / f"{names.WORK}{names.new_token()}"
    for directory in (notes, tmp_path / ".squeezed-notes"):
        directory.mkdir(exist_ok=True)
        (directory / "mine.txt").write_text("keep me")
    target = save(NEW, tmp_path / "c.sqz")
    kept = {"c.sqz", notes.name, ".squeezed-notes"}
    assert set(beside(target)) == {*kept, living.begin().path.name, foreign}
    living.end()
    old = time.time() - 2 * clearing.FOREIGN_SECONDS
    os.utime(tmp_path / foreign / foreign, (old, old))
    save(NEW, target)
    assert set(beside(target)) == kept


def test_files_of_a_living_saver_in_the_same_context_stay(way, tmp_path):
    target = save(OLD, tmp_path / "c.sqz")
    slow = replacing.Work(target)
    with slow.open("layer_000.safetensors") as descriptor:
        tensorfile.write(descriptor, {})
    slow.begin()
    if way == "with names":
        under_way = {
            slow.begin().description.path.name,
            slow.files["layer_000.safetensors"].path.name,
        }
    else:
        under_way = {slow.begin().description.path.name}
    save(NEW, target)
    assert same_context(load(target), NEW)
    assert set(os.listdir(target)) - manifest.listed_files(target) == under_way
    slow.end()
    assert holds(target, NEW)


def test_threads_save_to_one_name(way, tmp_path):
    target, failures = tmp_path / "c.sqz", []

    def savings(context):
        try:
            for _ in range(15):
                save(context, target)
                loaded = load(target)
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
    target = save(OLD, tmp_path / "c.sqz")
    opened = load(target)
    save(NEW, target)
    assert same_context(opened, OLD) and holds(target, NEW)
    assert beside(target) == ["c.sqz"]


def test_everything_is_on_the_disk_before_the_older_one_goes(way, tmp_path, monkeypatch):
    target = save(OLD, tmp_path / "c.sqz")
    before, steps = set(os.listdir(target)), []
    flushed = {}
    fsync, replace, unlink = os.fsync, os.replace, os.unlink

    def noted(descriptor):
        found = os.fstat(descriptor)
        flushed[found.st_ino] = found.st_size
        return fsync(descriptor)

    def moved(source, goal):
        new = {n: os.stat(target / n) for n in set(os.listdir(target)) - before}
        assert all(flushed.get(found.st_ino) == found.st_size for found in new.values())
        assert len(new) == len(before) and target.stat().st_ino in flushed
        flushed.clear()
        steps.append("replaced")
        return replace(source, goal)

    def removed(path, **options):
        if "replaced" in steps and os.path.lexists(path):
            assert target.stat().st_ino in flushed
            steps.append("removed")
        return unlink(path, **options)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", moved)
    monkeypatch.setattr(os, "unlink", removed)
    save(NEW, target)
    assert steps == ["replaced"] + ["removed"] * (len(before) - 1)


@pytest.mark.parametrize("extra", ["notes.txt", "layer_000.safetensors.bak", "src/thesis.tex"])
def test_a_context_with_files_of_others_is_not_replaced(extra, tmp_path):
    target = save(OLD, tmp_path / "c.sqz")
    (target / extra).parent.mkdir(exist_ok=True)
    (target / extra).write_text("years of work")
    with pytest.raises(ContextFileError, match="does not belong"):
        save(NEW, target)
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
    for action in (lambda: save(NEW, target), lambda: prove_writable(target)):
        with pytest.raises(ContextFileError, match="not a saved context"):
            action()
    assert (target / "context.json").read_text() == content


def test_a_file_that_appears_while_saving_is_kept(way, tmp_path, monkeypatch):
    target = save(OLD, tmp_path / "c.sqz")
    write = tensorfile.write

    def and_meanwhile(*arguments):
        (target / "notes.txt").write_text("keep me")
        return write(*arguments)

    monkeypatch.setattr(tensorfile, "write", and_meanwhile)
    save(NEW, target)
    assert (target / "notes.txt").read_text() == "keep me"
    assert same_context(load(target), NEW) and beside(target) == ["c.sqz"]


def test_another_directory_that_appears_while_saving_is_kept(way, tmp_path, monkeypatch):
    target, write = tmp_path / "c.sqz", tensorfile.write

    def and_meanwhile(*arguments):
        target.mkdir(exist_ok=True)
        (target / "notes.txt").write_text("keep me")
        return write(*arguments)

    monkeypatch.setattr(tensorfile, "write", and_meanwhile)
    with pytest.raises(ContextFileError, match="not a saved context"):
        save(NEW, target)
    assert os.listdir(target) == ["notes.txt"] and beside(target) == ["c.sqz"]


def test_a_link_is_followed(way, tmp_path):
    (tmp_path / "disk").mkdir()
    real = save(OLD, tmp_path / "disk" / "c.sqz")
    link = tmp_path / "c.sqz"
    link.symlink_to(real)
    save(NEW, link)
    assert link.is_symlink() and holds(real, NEW)
    assert beside(link) == ["c.sqz", "disk"] and beside(real) == ["c.sqz"]


@pytest.mark.parametrize(
    "name", ["보" * 81 + ".sqz", "x" * 248, "a\nb", " ", "-", "…", "x.sqz.sqz"]
)
def test_names_that_a_directory_may_have(name, tmp_path):
    prove_writable(tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    assert holds(save(NEW, tmp_path / name), NEW)
    assert holds(save(OLD, tmp_path / name), OLD)


@pytest.mark.parametrize(
    "name", ["x" * 256, "x" * 249, "보" * 90, "a\0b", "..", "", "dangling", "file/c", "loop"]
)
def test_places_that_cannot_be_written_are_refused_in_one_line(name, tmp_path):
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "c.sqz")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("")
    before = beside(tmp_path / "file")
    for action in (prove_writable, lambda path: save(NEW, path)):
        with pytest.raises(ContextFileError) as caught:
            action(tmp_path / name if name else Path("."))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert beside(tmp_path / "file") == before


def test_a_place_inside_a_saved_context_is_refused(tmp_path):
    target = save(OLD, tmp_path / "c.sqz")
    for act in (prove_writable, lambda path: save(NEW, path)):
        with pytest.raises(ContextFileError, match="is a saved context itself"):
            act(target / "inner.sqz")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "context.json").write_text("{}")
    save(NEW, tmp_path / "notes" / "d.sqz")
    save(NEW, target)
    assert holds(target, NEW)


def test_a_place_where_nothing_can_be_made_says_why(tmp_path, monkeypatch):
    def gone(path, *mode):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(Path, "mkdir", gone)  # as in /proc
    with pytest.raises(ContextFileError, match=r"could not save .*: No such file or directory;"):
        prove_writable(tmp_path / "c.sqz")


def test_missing_parents_are_made_and_stay_only_with_a_context(tmp_path, monkeypatch):
    target = tmp_path / "a" / "b" / "c.sqz"
    prove_writable(target)
    assert list(tmp_path.iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr(tensorfile, "write", _full)
        with pytest.raises(ContextFileError, match="No space"):
            save(NEW, target)
    assert list(tmp_path.iterdir()) == []
    assert holds(save(NEW, target), NEW)


def _full(*arguments, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_rights_follow_the_umask(umask, tmp_path):
    before = os.umask(umask)
    try:
        target = save(NEW, tmp_path / "c.sqz")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in target.iterdir()} == {0o666 & ~umask}
    assert target.stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_file_system_without_locks_saves_too(way, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "lock", lambda descriptor: None)
    target = save(OLD, tmp_path / "c.sqz")
    save(NEW, target)
    assert holds(target, NEW) and beside(target) == ["c.sqz"]


def test_a_system_without_its_modules_has_no_locks_and_enough_descriptors(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(files, "resource", None)
    assert LOCK(0) is None and files.may_open(10**9)
    assert holds(save(NEW, tmp_path / "c.sqz"), NEW)


def test_too_few_descriptors_give_names_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(files.resource, "getrlimit", lambda kind: (40, 40))
    monkeypatch.setattr(files, "unnamed", lambda directory: pytest.fail("opened without a name"))
    assert holds(save(NEW, tmp_path / "c.sqz"), NEW)


def test_an_older_context_on_a_mounted_file_system_is_replaced(tmp_path):
    """Nothing beside the context is written: its directory may be all that one may write to."""
    target = save(OLD, tmp_path / "c.sqz")
    before = tmp_path.stat().st_mtime_ns
    save(NEW, target)
    assert tmp_path.stat().st_mtime_ns == before and holds(target, NEW)
