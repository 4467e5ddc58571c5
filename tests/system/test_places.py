"""Places for files that can be made again: chosen, the user's, or one that is private."""

import stat
import tempfile
from pathlib import Path

import pytest

from squeezed.system import places


@pytest.fixture(autouse=True)
def bare(tmp_path, monkeypatch):
    """No variables, and temporary files of the test's own."""
    for name in ("SQUEEZED_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def test_chosen_directory_is_the_only_one(tmp_path, monkeypatch):
    monkeypatch.setenv("SQUEEZED_CACHE", str(tmp_path / "mine"))
    assert list(places.cache_directories()) == [tmp_path / "mine"]


def test_users_cache_comes_before_a_private_directory(tmp_path, monkeypatch):
    expected = tmp_path / "home" / ".cache" / "squeezed"
    assert list(places.cache_directories()) == [expected, places.private_path()]
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the specification
    assert next(places.cache_directories()) == expected
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert next(places.cache_directories()) == tmp_path / "xdg" / "squeezed"


def test_without_a_home_only_the_private_directory_is_left(monkeypatch):
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert list(places.cache_directories()) == [places.private_path()]


def test_home_that_cannot_be_written_is_passed_over(tmp_path, monkeypatch):
    (tmp_path / "home").write_text("not a directory, for root too")
    found = places.writable(places.cache_directories())
    assert found == places.private_path()
    assert stat.S_IMODE(found.stat().st_mode) == 0o700
    assert places.writable(places.cache_directories()) == found  # and again


@pytest.mark.parametrize("trap", ["link", "open", "file"])
def test_private_directory_of_another_is_never_used(tmp_path, trap):
    path = places.private_path()
    if trap == "link":
        (tmp_path / "foreign").mkdir(mode=0o700)
        path.symlink_to(tmp_path / "foreign")
    elif trap == "open":
        path.mkdir()
        path.chmod(0o777)
    else:
        path.write_text("")
    assert places.writable([path, path / "kernels"]) is None
    with pytest.raises(PermissionError, match="of this user alone"):
        places.make_private(path)


def test_nothing_is_left_where_a_place_was_tried(tmp_path):
    assert places.writable([Path(tmp_path) / "a"]) == tmp_path / "a"
    assert not list((tmp_path / "a").iterdir())
