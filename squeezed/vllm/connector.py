"""The KV connector: what the scheduler decides reaches the workers, and what they read comes back.

One instance lives with the scheduler and one with every worker. No keys are transferred: contexts
are in the workers' memory, and vLLM's blocks hold only what follows them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

from squeezed.vllm import metrics
from squeezed.vllm.cutting import Share
from squeezed.vllm.news import WorkerNews
from squeezed.vllm.scheduler import SchedulerHalf
from squeezed.vllm.settings import Settings
from squeezed.vllm.worker import WORKER


@dataclass
class FromWorkers(KVConnectorWorkerMetadata):
    """`WorkerNews` as vLLM carries it."""

    news: WorkerNews

    def aggregate(self, other: FromWorkers) -> FromWorkers:
        return FromWorkers(self.news.add(other.news))


class SqueezedConnector(KVConnectorBase_V1, SupportsHMA):
    """Both halves; vLLM asks each for its own part only."""

    def __init__(self, vllm_config, role, kv_cache_config) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.settings = Settings.of(self._kv_transfer_config.kv_connector_extra_config)
        if role == KVConnectorRole.SCHEDULER:
            self.scheduler = SchedulerHalf(vllm_config, kv_cache_config, self.settings)
        else:
            _start_worker(vllm_config, self.settings)
            self._news = WorkerNews()

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    # The scheduler's half

    def bind_kv_cache_manager(self, kv_cache_manager) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        self.scheduler.block_ids = kv_cache_manager.get_block_ids

    def on_new_request(self, request) -> None:
        """Called before the request is looked up in the prefix cache."""
        self.scheduler.arrive(request)

    def get_num_new_matched_tokens(self, request, num_computed_tokens) -> tuple[int | None, bool]:
        """No tokens: the block manager has counted the context. `None` while it is loaded."""
        return (0 if self.scheduler.may_begin(request) else None), False

    def update_state_after_alloc(self, request, blocks, num_external_tokens) -> None:
        self.scheduler.admitted(request, blocks.get_block_ids())

    def build_connector_meta(self, scheduler_output) -> KVConnectorMetadata:
        # or the news would come after the forward pass; vLLM's HiSparse connector does the same
        scheduler_output.has_sync_kv_loads = True
        return self.scheduler.news_for(scheduler_output)

    def update_connector_output(self, connector_output) -> None:
        found = connector_output.kv_connector_worker_meta
        if isinstance(found, FromWorkers):
            self.scheduler.heard(found.news)

    def request_finished_all_groups(self, request, block_ids) -> tuple[bool, dict | None]:
        return False, self.scheduler.finished(request)

    def get_kv_connector_stats(self):
        scheduler = getattr(self, "scheduler", None)
        return scheduler.stats() if scheduler else None

    @classmethod
    def build_kv_connector_stats(cls, data=None):
        return metrics.Stats(data=data or {})

    @classmethod
    def build_prom_metrics(cls, vllm_config, metric_types, labelnames, per_engine_labelvalues):
        return metrics.Prometheus(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # The worker's half

    def start_load_kv(self, forward_context, **kwargs: Any) -> None:
        """Runs before the forward pass: `has_sync_kv_loads`."""
        news = self._get_connector_metadata()
        idle = forward_context.attn_metadata is None
        self._news = WORKER.step(news, list(kwargs.get("request_ids", ())), idle)

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        news, self._news = self._news, WorkerNews()
        news.spent = WORKER.spent()
        return FromWorkers(news) if news else None

    def wait_for_layer_load(self, layer_name: str) -> None: ...

    def save_kv_layer(self, layer_name, kv_layer, attn_metadata, **kwargs) -> None: ...

    def wait_for_save(self) -> None: ...

    def take_events(self) -> Iterable:
        return ()

    def shutdown(self) -> None:
        if self.role == KVConnectorRole.SCHEDULER:
            self.scheduler.end()
        elif WORKER.arena is not None:
            WORKER.arena.end()


def _start_worker(vllm_config, settings: Settings) -> None:
    import torch
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    kind = vllm_config.device_config.device_type
    device = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else "cpu"
    WORKER.start(
        Share(group.rank_in_group, group.world_size),
        torch.device(device),
        settings,
        4 * vllm_config.scheduler_config.max_num_seqs,
        vllm_config.model_config.hf_text_config.num_hidden_layers,
    )
