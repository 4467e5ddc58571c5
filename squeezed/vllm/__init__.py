"""Inside vLLM: contexts from a directory, one read of a document for all its readers.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`). Nothing of vLLM
is changed: it is given an attention backend, a cache spec with its manager, and a KV connector.
"""

from squeezed.vllm.plugin import register

__all__ = ["register"]
