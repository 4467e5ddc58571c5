from types import SimpleNamespace

import pytest

from squeezed.errors import SqueezedError
from squeezed.vllm.plugin import is_supported, unsupported
from squeezed.vllm.refusals import check_engine


@pytest.mark.parametrize("version", ["0.32.0", "0.33.1", "0.32.0+cpu", "0.33.0rc1"])
def test_known_versions(version):
    assert is_supported(version)


@pytest.mark.parametrize("version", ["0.31.0", "0.34.0", "1.32.0", "dev", "0.3"])
def test_other_versions_are_named(version):
    assert not is_supported(version)
    assert version in unsupported(version) and "0.32 and 0.33" in unsupported(version)


def config(**changes):
    parts = {
        "cache_config": {"enable_prefix_caching": True, "block_size": 16, "cache_dtype": "auto"},
        "parallel_config": {
            "decode_context_parallel_size": 1,
            "prefill_context_parallel_size": 1,
            "pipeline_parallel_size": 1,
        },
        "model_config": {"use_mla": False},
    }
    for values in parts.values():
        values.update({name: changes[name] for name in values if name in changes})
    return SimpleNamespace(
        **{name: SimpleNamespace(**values) for name, values in parts.items()},
        speculative_config=changes.get("speculative_config"),
        use_v2_model_runner=changes.get("use_v2_model_runner", True),
    )


def test_a_plain_engine_is_taken():
    check_engine(config(), on_cpu=False)
    check_engine(config(block_size=32, use_v2_model_runner=False), on_cpu=True)


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"enable_prefix_caching": False}, "enable_prefix_caching"),
        ({"block_size": 128}, "block_size.*--block-size 16"),
        ({"cache_dtype": "fp8"}, "kv_cache_dtype"),
        ({"decode_context_parallel_size": 2}, "decode_context_parallel_size"),
        ({"prefill_context_parallel_size": 2}, "prefill_context_parallel_size"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size"),
        ({"speculative_config": object()}, "speculative_config"),
        ({"use_mla": True}, "MLA"),
        ({"use_v2_model_runner": False}, "model runner"),
    ],
)
def test_what_cannot_work_is_refused_by_name(changes, name):
    with pytest.raises(SqueezedError, match=name):
        check_engine(config(**changes), on_cpu=False)
