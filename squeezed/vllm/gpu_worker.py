"""vLLM's worker on a GPU (`--worker-cls`): a decoding step over contexts is one CUDA graph.

vLLM asks its graph manager which graphs a step takes, before the step's metadata are built, and
later has it run the model. `ContextSteps` stands in front of that manager: a step over contexts is
never one of vLLM's full graphs, which know no contexts, and is replayed from one of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from vllm.config import CUDAGraphMode
from vllm.distributed.parallel_state import graph_capture
from vllm.forward_context import get_forward_context
from vllm.v1.worker.gpu_worker import Worker as GpuWorker

from squeezed.vllm.builder import SqueezedMetadata
from squeezed.vllm.graphs import Captured, StepGraphs
from squeezed.vllm.step import Step, resolve
from squeezed.vllm.worker import WORKER


class Worker(GpuWorker):
    """One rank."""

    def compile_or_warm_up_model(self) -> Any:
        found = super().compile_or_warm_up_model()
        manager = getattr(self.model_runner, "cudagraph_manager", None)
        if WORKER.arena is not None and manager is not None and manager.needs_capture():
            steps = ContextSteps(manager, self.device, WORKER.uses_graphs)
            self.model_runner.cudagraph_manager = steps
            WORKER.graphs = steps.graphs
        return found

    def execute_model(self, scheduler_output: Any) -> Any:
        news = scheduler_output.kv_connector_metadata
        WORKER.foresee(news, scheduler_output.num_scheduled_tokens)
        return super().execute_model(scheduler_output)


class ContextSteps:
    """A graph manager of vLLM's, and graphs of steps over contexts.

    Args:
        manager: `vllm.v1.worker.gpu.cudagraph_utils.ModelCudaGraphManager`, which answers all else.
        uses_graphs: whether to capture at all.
    """

    def __init__(self, manager: Any, device: torch.device, uses_graphs: bool) -> None:
        self.manager = manager
        around = partial(graph_capture, device=device)  # ranks' sums can be captured there
        self.graphs = StepGraphs(Captured(manager.pool, around)) if uses_graphs else None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.manager, name)

    def dispatch(
        self,
        num_reqs: int,
        num_tokens: int,
        uniform_token_count: int | None,
        *rest: Any,
        **named: Any,
    ) -> Any:
        """Graphs for a step: none of vLLM's full ones for a step that needs Python."""
        if WORKER.needs_python:
            uniform_token_count = None
        return self.manager.dispatch(num_reqs, num_tokens, uniform_token_count, *rest, **named)

    def run_pw_graph(self, model: Callable[..., Any], model_inputs: dict[str, Any]) -> Any:
        """The model's forward pass, inside its forward context."""

        def launch() -> Any:
            return self.manager.run_pw_graph(model, model_inputs)

        graphs = None if WORKER.jobs else self.graphs
        step = step_of(get_forward_context())
        if graphs is None or step is None or step.alike is None:
            return launch()

        def compute() -> Any:
            with without_pieces():
                return model(**model_inputs)

        return graphs.run((step.alike, addresses(model_inputs)), compute, launch)


def addresses(model_inputs: dict[str, Any]) -> tuple:
    """Where a step's inputs lie: a graph reads there."""
    slots = get_forward_context().slot_mapping
    given = [*model_inputs.values(), *(slots.values() if isinstance(slots, dict) else ())]
    found = {(x.data_ptr(), tuple(x.shape)) for x in given if isinstance(x, torch.Tensor)}
    return tuple(sorted(found))


def step_of(context: Any) -> Step | None:
    """What a batch reads of contexts, from the metadata of its layers."""
    metadata = context.attn_metadata
    if not isinstance(metadata, dict):
        return None
    ours = (meta for meta in metadata.values() if isinstance(meta, SqueezedMetadata))
    found = next(ours, None)
    return None if found is None else resolve(found)


@contextmanager
def without_pieces() -> Iterator[None]:
    """No graphs of vLLM's inside: all is launched into the one that is being captured."""
    context = get_forward_context()
    mode, context.cudagraph_runtime_mode = context.cudagraph_runtime_mode, CUDAGraphMode.NONE
    try:
        yield
    finally:
        context.cudagraph_runtime_mode = mode
