"""A cache spec whose manager gives the blocks of a context vLLM's null block.

vLLM then holds no second copy of the context: a request's block table begins with zeros, and its
first real block is that of the first token after the context. The only file that knows vLLM's block
managers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields, replace

from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from squeezed.vllm.settings import Settings

ENDS: dict[bytes, int] = {}
"""Hash that a request over a context has for the context's last block -> blocks of the context.

Block hashes are chained, so one stands for all before it. The hash is no request's of vLLM's own:
`own_chain` makes it, so that only a request that was given a context can meet null blocks.
"""


@dataclass(frozen=True, kw_only=True)
class ContextAttentionSpec(FullAttentionSpec):
    """Full attention whose first blocks may be held by contexts instead of vLLM."""

    own_tokens: int = 0
    """Most tokens of a request that vLLM must hold; 0 for as many as the model takes."""

    @classmethod
    def of(cls, spec: FullAttentionSpec, own_tokens: int) -> ContextAttentionSpec:
        known = {field.name: getattr(spec, field.name) for field in fields(spec)}
        return cls(**known, own_tokens=own_tokens)

    @classmethod
    def merge(cls, specs):
        return replace(super().merge(specs), own_tokens=specs[0].own_tokens)

    def max_memory_usage_bytes(self, vllm_config) -> int:
        """What the pool must hold at least, or vLLM does not start."""
        usual = super().max_memory_usage_bytes(vllm_config)
        own = -(-self.own_tokens // self.block_size) * self.page_size_bytes
        return min(usual, own) if own else usual


class ContextBlocks:
    """What an attention backend of ours does with vLLM's spec, ahead of the backend it extends.

    Attributes:
        settings: of the engine; `None` where our connector is not, and all is as in vLLM.
    """

    settings: Settings | None = None

    @classmethod
    def customize_spec(cls, spec):
        if type(spec) is not FullAttentionSpec or cls.settings is None:
            return spec
        return ContextAttentionSpec.of(spec, cls.settings.own_tokens)


class ContextAttentionManager(FullAttentionManager):
    """vLLM's manager, for which a context counts as cached, by null blocks."""

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes, max_length, kv_cache_group_ids, block_pool, kv_cache_spec, **kwargs
    ):
        size = kv_cache_spec.block_size
        hashes = resolve_block_hashes(
            block_hashes,
            block_pool.hash_block_size,
            size,
            supports_fine_grained_hash_lookup=False,
            alignment_tokens=size,
        )
        most = min(max_length // size, len(hashes))
        held = next((n for end, n in ENDS.items() if n <= most and hashes[n - 1] == end), 0)
        if not held:
            return super().find_longest_cache_hit(
                block_hashes, max_length, kv_cache_group_ids, block_pool, kv_cache_spec, **kwargs
            )
        found = tuple([block_pool.null_block] * held for _ in kv_cache_group_ids)
        for place in range(held, most):  # what was said after the context is cached as usual
            cached = block_pool.get_cached_block(hashes[place], kv_cache_group_ids)
            if not cached:
                break
            for group, block in zip(found, cached, strict=True):
                group.append(block)
        return found, len(found[0]) * size


def own_chain(request, blocks: int, reading: str) -> bytes:
    """Give a request hashes of its own from the context's last block on; the hash of that block.

    What stands in later blocks was computed with keys that depend on how the context was read: so
    `reading`, which names context, budget and preset, is part of every hash after it.
    """
    usual = request.block_hashes[blocks - 1]
    end = hashlib.sha256(bytes(usual) + reading.encode()).digest()[: len(usual)]
    _rechain(request, blocks, end)
    return end


def usual_chain(request, blocks: int, usual: bytes) -> None:
    """Take `own_chain` back."""
    _rechain(request, blocks, usual)


def _rechain(request, blocks: int, end: bytes) -> None:
    request.block_hashes[blocks - 1 :] = [type(request.block_hashes[0])(end)]
    request.update_block_hashes()


def _register() -> None:
    """At import, for the spec comes to the scheduler pickled.

    The registry fills itself when it is first asked and empty: so it is asked before.
    """
    KVCacheSpecRegistry.get_manager_class(_any_spec())
    KVCacheSpecRegistry.register(
        ContextAttentionSpec, ContextAttentionManager, uniform_type_base_spec=FullAttentionSpec
    )


def _any_spec() -> FullAttentionSpec:
    import torch

    return FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=16, dtype=torch.float32)


_register()
