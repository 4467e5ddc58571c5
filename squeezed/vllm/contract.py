"""Every name of vLLM that this room uses, and what of it must be there.

vLLM promises none of them. `broken` says in one line each what a version of vLLM lacks; a test
compares this list with the room's imports.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

CONNECTOR_BASE = "vllm.distributed.kv_transfer.kv_connector.v1.base"
CONNECTOR_METRICS = "vllm.distributed.kv_transfer.kv_connector.v1.metrics"
CPU_BACKEND = "vllm.v1.attention.backends.cpu_attn"
FLASH_BACKEND = "vllm.v1.attention.backends.flash_attn"
FORWARD = "layer query key value kv_cache attn_metadata output"
HIT = "block_hashes max_length kv_cache_group_ids block_pool kv_cache_spec"
BUILD = "common_prefix_len common_attn_metadata fast_build"

SYMBOLS: dict[str, dict[str, str]] = {
    "vllm": {
        "__version__": "",
        "SamplingParams": "max_tokens temperature extra_args detokenize",
        "LLM.from_engine_args": "engine_args",
        "LLM.collective_rpc": "method args",
        "LLM.generate": "prompts sampling_params use_tqdm",
    },
    "vllm.engine.arg_utils": {
        "EngineArgs.add_cli_args": "parser",
        "EngineArgs.from_cli_args": "args",
        "EngineArgs.create_engine_config": "",
    },
    "vllm.utils.argparse_utils": {"FlexibleArgumentParser": ""},
    "vllm.config": {
        "get_current_vllm_config": "",
        "CUDAGraphMode.NONE": "",
        "VllmConfig.use_v2_model_runner": "",
    },
    "vllm.distributed.parallel_state": {"get_tp_group": "", "graph_capture": "device"},
    "vllm.forward_context": {
        "get_forward_context": "",
        "ForwardContext": "attn_metadata slot_mapping cudagraph_runtime_mode",
    },
    "vllm.distributed.kv_transfer.kv_connector.factory": {
        "KVConnectorFactory.register_connector": "name module_path class_name",
    },
    CONNECTOR_BASE: {
        "KVConnectorBase_V1.__init__": "vllm_config role kv_cache_config",
        "KVConnectorBase_V1.bind_kv_cache_manager": "kv_cache_manager",
        "KVConnectorBase_V1.on_new_request": "request",
        "KVConnectorBase_V1.get_num_new_matched_tokens": "request num_computed_tokens",
        "KVConnectorBase_V1.update_state_after_alloc": "request blocks num_external_tokens",
        "KVConnectorBase_V1.build_connector_meta": "scheduler_output",
        "KVConnectorBase_V1.update_connector_output": "connector_output",
        "KVConnectorBase_V1.start_load_kv": "forward_context kwargs",
        "KVConnectorBase_V1.build_connector_worker_meta": "",
        "KVConnectorBase_V1.get_kv_connector_stats": "",
        "KVConnectorBase_V1.build_kv_connector_stats": "data",
        "KVConnectorBase_V1.build_prom_metrics": (
            "vllm_config metric_types labelnames per_engine_labelvalues"
        ),
        "KVConnectorBase_V1.requires_kv_delivery": "",
        "KVConnectorBase_V1.shutdown": "",
        "KVConnectorMetadata": "",
        "KVConnectorRole.SCHEDULER": "",
        "KVConnectorWorkerMetadata.aggregate": "other",
        "SupportsHMA.request_finished_all_groups": "request block_ids",
    },
    CONNECTOR_METRICS: {
        "KVConnectorStats": "data",
        "KVConnectorStats.aggregate": "other",
        "KVConnectorStats.reduce": "",
        "KVConnectorStats.is_empty": "",
        "KVConnectorPromMetrics.__init__": (
            "vllm_config metric_types labelnames per_engine_labelvalues"
        ),
        "KVConnectorPromMetrics.observe": "transfer_stats_data engine_idx",
    },
    "vllm.model_executor.models.utils": {"extract_layer_index": "layer_name"},
    "vllm.platforms": {"current_platform": ""},
    "vllm.utils.torch_utils": {"canonicalize_singleton_dim_strides": "t"},
    "vllm.v1.attention.backend": {
        "AttentionBackend.customize_spec": "spec",
        "AttentionCGSupport.NEVER": "",
        "AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE": "",
        "CommonAttentionMetadata": (
            "query_start_loc query_start_loc_cpu seq_lens seq_lens_cpu_upper_bound num_reqs "
            "num_actual_tokens max_query_len max_seq_len block_table_tensor slot_mapping"
        ),
        "CommonAttentionMetadata.replace": "",
    },
    "vllm.v1.attention.backends": {"fa_utils": ""},
    "vllm.v1.attention.backends.registry": {
        "AttentionBackendEnum.CUSTOM": "",
        "AttentionBackendEnum.CPU_ATTN": "",
        "register_backend": "backend class_path",
    },
    CPU_BACKEND: {
        "CPUAttentionBackend.get_impl_cls": "",
        "CPUAttentionBackend.get_builder_cls": "",
        "CPUAttentionBackendImpl.forward": FORWARD,
        "CPUAttentionMetadata": "query_start_loc seq_lens block_table slot_mapping",
        "CPUAttentionMetadataBuilder.build": BUILD,
    },
    FLASH_BACKEND: {
        "FlashAttentionBackend.get_impl_cls": "",
        "FlashAttentionBackend.get_builder_cls": "",
        "FlashAttentionImpl.forward": FORWARD,
        "FlashAttentionMetadata": (
            "num_actual_tokens query_start_loc seq_lens block_table max_query_len max_seq_len "
            "scheduler_metadata max_num_splits"
        ),
        "FlashAttentionMetadataBuilder.build": BUILD,
        "FlashAttentionMetadataBuilder.get_cudagraph_support": "vllm_config kv_cache_spec",
    },
    "vllm.v1.core.kv_cache_utils": {
        "resolve_block_hashes": (
            "block_hashes hash_block_size block_size supports_fine_grained_hash_lookup "
            "alignment_tokens"
        ),
    },
    "vllm.v1.core.kv_cache_manager": {"KVCacheManager.get_block_ids": "request_id"},
    "vllm.v1.core.block_pool": {
        "BlockPool.get_cached_block": "block_hash kv_cache_group_ids",
    },
    "vllm.v1.core.sched.output": {
        "SchedulerOutput": (
            "scheduled_new_reqs scheduled_cached_reqs num_scheduled_tokens finished_req_ids "
            "has_sync_kv_loads kv_connector_metadata"
        ),
    },
    "vllm.v1.core.single_type_kv_cache_manager": {
        "FullAttentionManager.find_longest_cache_hit": HIT,
    },
    "vllm.v1.kv_cache_interface": {
        "FullAttentionSpec": "block_size num_kv_heads head_size dtype",
        "FullAttentionSpec.merge": "specs",
        "FullAttentionSpec.max_memory_usage_bytes": "vllm_config",
    },
    "vllm.v1.kv_cache_spec_registry": {
        "KVCacheSpecRegistry.register": ("kvcache_spec_cls manager_class uniform_type_base_spec"),
        "KVCacheSpecRegistry.get_manager_class": "kvcache_spec",
    },
    "vllm.v1.worker.gpu.cudagraph_utils": {
        "ModelCudaGraphManager.dispatch": "num_reqs num_tokens uniform_token_count",
        "ModelCudaGraphManager.needs_capture": "",
        "ModelCudaGraphManager.run_pw_graph": "model model_inputs",
    },
    "vllm.v1.worker.gpu_worker": {
        "Worker.compile_or_warm_up_model": "",
        "Worker.execute_model": "scheduler_output",
    },
    "vllm.v1.request": {
        "Request.__init__": "request_id prompt_token_ids sampling_params lora_request mm_features",
        "Request.update_block_hashes": "",
    },
}
"""Module -> name in it, and the parameters or fields that must be there."""


def broken() -> Iterator[str]:
    """One line for each name that the installed vLLM does not have as it is used."""
    for module, names in SYMBOLS.items():
        for name, parameters in names.items():
            complaint = _complaint(module, name, parameters.split())
            if complaint:
                yield f"{module}.{name}: {complaint}"


def _complaint(module: str, name: str, parameters: list[str]) -> str | None:
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        return f"not there ({error})"
    missing = [one for one in parameters if one not in _parameters(found)]
    return f"has no {', '.join(missing)}" if missing else None


def _parameters(found: Any) -> set[str]:
    if is_dataclass(found):
        return {field.name for field in fields(found)}
    return set(inspect.signature(found).parameters) if callable(found) else set()
