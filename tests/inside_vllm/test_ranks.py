"""Two KV heads on two ranks answer as one rank, and as Transformers does."""

import os

os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0|1" if (os.cpu_count() or 1) > 1 else "0|0")

import pytest
from engines import ask, engine


@pytest.fixture(scope="module")
def llm(place):
    made = engine(place, tensor_parallel_size=2, distributed_executor_backend="mp")
    yield made
    made.llm_engine.engine_core.shutdown()


def test_two_ranks_answer_as_transformers(llm, answers):
    wanted = [one for one in answers["asked"] if one["preset"] == "best"]
    found = ask(llm, [(one["prompt"], {"squeezed_budget": one["budget"]}) for one in wanted])
    for one, other in zip(found, wanted, strict=True):
        assert one["tokens"] == other["tokens"]
        said = one["said"]
        assert said["context"] == "one"
        assert said["budget_spent"] == pytest.approx(other["spent"], rel=0.1)
        if other["budget"] == 1.0:
            assert said["budget_spent"] == 1.0
