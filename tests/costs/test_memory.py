"""A context that does not fit is refused before anything is allocated."""

import resource
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model

from squeezed import ClusteringConfig, SqueezedError
from squeezed.costs import memory
from squeezed.costs.shape import model_shape


def model_on_gpu():
    model = tiny_model()
    return SimpleNamespace(config=model.config, dtype=torch.bfloat16, device=torch.device("cuda"))


def test_refusal_says_what_would_fit(monkeypatch):
    free = 2 << 30
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    clustering = ClusteringConfig()
    with pytest.raises(SqueezedError, match="would fit") as refusal:
        memory.check_memory(model_on_gpu(), 100_000_000, clustering)
    assert "\n" not in str(refusal.value) and "2.1 GB are free" in str(refusal.value)
    shape, reserve = model_shape(tiny_model().config, 2), memory.ACTIVATIONS["cuda"]
    most = memory.fitting_tokens(shape, free, clustering, reserve)
    assert memory.context_bytes(shape, most, clustering, reserve) <= free
    assert memory.context_bytes(shape, most + 3000, clustering, reserve) > free
    memory.check_memory(model_on_gpu(), most, clustering)


def test_a_cpu_without_room_is_refused_and_one_with_room_is_not():
    with pytest.raises(SqueezedError, match=r"on cpu, .* would fit: .* more memory"):
        memory.check_memory(tiny_model(), 10**12, ClusteringConfig())
    memory.check_memory(tiny_model(), 1000, ClusteringConfig())


def test_only_cpus_and_nvidia_gpus_are_checked(monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "free_bytes", lambda device: asked.append(device.type) or 1 << 60)
    for kind in ("meta", "mps", "cpu", "cuda"):
        model = SimpleNamespace(
            config=tiny_model().config, dtype=torch.bfloat16, device=torch.device(kind)
        )
        memory.check_memory(model, 1000, ClusteringConfig())
    assert asked == ["cpu", "cuda"]


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Writes the files of a made-up system."""

    def write(**files):
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda limit: unlimited)
    return write


def free():
    return memory.free_bytes(torch.device("cpu"))


def test_free_memory_of_a_machine_counts_swap(system):
    system(proc__meminfo="MemTotal:  900 kB\nMemAvailable:  500 kB\nSwapFree:  70 kB\n")
    assert free() == 570 * 1024


def test_memory_of_a_machine_that_does_not_say_what_is_free_is_all_it_has(system, monkeypatch):
    sizes = {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(memory.os, "sysconf", sizes.__getitem__)
    assert free() == 4096 * 1000
    monkeypatch.setattr(memory.os, "sysconf_names", {})
    assert free() is None


def test_free_memory_is_what_the_tightest_group_leaves(system, tmp_path):
    system(proc__meminfo="MemAvailable:  500 kB\n", proc__self__cgroup="0::/outer/inner\n")
    group = tmp_path / "cgroup" / "outer"
    (group / "inner").mkdir(parents=True)
    (group / "inner" / "memory.max").write_text("max\n")
    (group / "inner" / "memory.current").write_text("90000\n")
    assert free() == 500 * 1024
    (group / "memory.max").write_text("200000\n")
    (group / "memory.current").write_text("150000\n")
    assert free() == 50_000
    (group / "memory.stat").write_text("anon 110000\ninactive_file 40000\n")
    assert free() == 90_000
    (group / "memory.current").write_text("999999\n")
    assert free() == 0


def test_free_memory_in_a_container_of_the_first_version(system, tmp_path):
    system(proc__self__cgroup="7:cpu,memory:/docker/abc\n3:pids:/x\n")  # seen from inside
    group = tmp_path / "cgroup" / "memory"
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text("300000\n")
    (group / "memory.usage_in_bytes").write_text("100000\n")
    (group / "memory.stat").write_text("total_inactive_file 5000\n")
    assert free() == 205_000


@pytest.mark.parametrize(("limit", "name"), [("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData")])
def test_free_memory_is_what_a_limit_of_the_process_leaves(system, monkeypatch, limit, name):
    system(proc__self__status=f"Name:\tpython\n{name}:\t  300 kB\n")
    most = {getattr(resource, limit): 400 * 1024}
    unlimited = resource.RLIM_INFINITY
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (most.get(kind, unlimited), unlimited))
    assert free() == 100 * 1024
