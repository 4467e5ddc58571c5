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
        "worker_extension_cls": "squeezed.vllm.extension.WorkerExtension",
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


def capture(llm, place, file, text):
    """Let the engine index a text; the state in which that ended."""
    from transformers import AutoTokenizer

    from squeezed.vllm.asking import Asked
    from squeezed.vllm.capture import ARGUMENT

    asked = Asked.of(AutoTokenizer.from_pretrained(place / "model"), file, text)
    said = ask(llm, [(asked.prompt, {ARGUMENT: asked.argument})], new=1)[0]["said"]
    assert said is None, said
    states = []

    def ended():
        states.append(llm.collective_rpc("squeezed_indexing", args=(file.removesuffix(".sqz"),)))
        return states[-1][0]["state"] in ("saved", "failed")

    until(ended, 120)
    return states[-1][0]


def in_order(layer, rows):
    """Keys or values of a saved layer in the document's order, as the model makes them."""
    order = layer.positions.long().argsort(1)[..., None].expand_as(rows)
    centre = layer.centre[:, None] if rows is layer.keys else 0
    return (rows + centre).gather(1, order)


def check_alike(mine, its):
    """Two contexts of one document, by two engines that round differently."""
    import torch

    assert mine.tokens.tolist() == its.tokens.tolist()
    assert mine.tokenizer == its.tokenizer and mine.template == its.template
    assert mine.calibrations.keys() == its.calibrations.keys()
    assert len(mine.observed) == len(its.observed) == len(mine.layers) == len(its.layers)
    for one, other in zip(mine.observed, its.observed, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=2e-4)
    for one, other in zip(mine.layers, its.layers, strict=True):
        assert one.scale == other.scale and one.pinned == other.pinned
        assert [lv.nodes for lv in one.levels] == [lv.nodes for lv in other.levels]
        for name in ("keys", "values"):
            pair = (in_order(x, getattr(x, name)) for x in (one, other))
            torch.testing.assert_close(*pair, atol=2e-4, rtol=2e-4)


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
