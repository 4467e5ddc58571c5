from types import SimpleNamespace

from prometheus_client import REGISTRY, Counter, Gauge, Histogram

from squeezed.vllm.contract import broken
from squeezed.vllm.metrics import Prometheus
from squeezed.vllm.plugin import is_supported


def test_the_installed_vllm_has_every_name_that_is_used():
    import vllm

    assert is_supported(vllm.__version__)
    assert not list(broken())


def test_a_second_engine_in_a_process_has_its_metrics():
    kinds = {Counter: Counter, Gauge: Gauge, Histogram: Histogram}
    config = SimpleNamespace(kv_transfer_config=None)
    news = {"requests": {"context": 2}, "load_seconds": [0.5], "gauges": {"contexts": 3}}
    counts = dict.fromkeys(("keys_read", "keys_available", "loads", "failed_loads", "evictions"), 1)
    for model in ("first", "second"):
        Prometheus(config, kinds, ["model"], {0: [model]}).observe(counts | news)
    of = {"model": "second", "kind": "context"}
    assert REGISTRY.get_sample_value("squeezed_requests_total", of) == 2
    assert REGISTRY.get_sample_value("squeezed_contexts", {"model": "second"}) == 3
    assert REGISTRY.get_sample_value("squeezed_contexts", {"model": "first"}) is None
