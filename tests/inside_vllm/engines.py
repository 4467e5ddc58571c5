"""An engine over the contexts of a place, in this process, and how it is asked."""

import time


def engine(place, extra=None, **arguments):
    """vLLM in this process; one is all that a process may have."""
    from vllm import LLM
    from vllm.config import KVTransferConfig

    given = {
        "dtype": "float32",
        "max_model_len": 3072,
        "enforce_eager": True,
        "block_size": 32,
        "distributed_executor_backend": "uni",
        "disable_log_stats": False,
    }
    return LLM(
        str(place / "model"),
        kv_transfer_config=KVTransferConfig(
            kv_connector="SqueezedConnector",
            kv_role="kv_both",
            kv_connector_extra_config={"contexts": str(place / "contexts")} | (extra or {}),
        ),
        **(given | arguments),
    )


def ask(llm, requests, new=16, **sampling):
    """Answers of `(ids, vllm_xargs)`, all at once: tokens, cached tokens, and what is said."""
    from vllm import SamplingParams

    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids, _ in requests],
        [
            SamplingParams(
                max_tokens=new, temperature=0, ignore_eos=True, extra_args=extra or None, **sampling
            )
            for _, extra in requests
        ],
        use_tqdm=False,
    )
    return [
        {
            "tokens": list(output.outputs[0].token_ids),
            "cached": output.num_cached_tokens,
            "said": (output.kv_transfer_params or {}).get("squeezed"),
        }
        for output in outputs
    ]


def metric(llm, name):
    """The sum of a counter or gauge over its labels."""
    from prometheus_client import REGISTRY

    found = {name, f"{name}_total"}
    values = [one.value for each in REGISTRY.collect() for one in each.samples if one.name in found]
    assert values, name
    return sum(values)


def until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.05)
