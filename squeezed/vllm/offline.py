"""A document indexed by vLLM without a server: `squeezed vllm index`.

The engine is of the kind that a server has, and ends when it has read the document: the rest is
done with all of the machine, and again from there if it was interrupted.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from squeezed.context.storage.saving import prove_writable
from squeezed.errors import SqueezedError
from squeezed.system.failures import cause_of, explained
from squeezed.vllm import launch, making
from squeezed.vllm.asking import Asked, fallback_in
from squeezed.vllm.capture import ARGUMENT, checked_file, order_of
from squeezed.vllm.news import Order
from squeezed.vllm.parts import Parts
from squeezed.vllm.settings import Settings

NO_CONTEXTS = 0.001
"""GiB for contexts: this engine reads none."""

POLL_SECONDS = 0.1


def index(
    model: str,
    text: str,
    target: Path,
    given: Sequence[str],
    keep_control_tokens: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Save a context of `text` at `target`; `tokens` of the document, and `seconds` by phase.

    Args:
        given: vLLM's own arguments.
        report: called with a line for every step that takes more than a moment.

    Raises:
        SqueezedError: it cannot be done, with the reason in one line.
    """
    launch.check_installed()
    target = target.absolute()
    checked_file(target.name)
    prove_writable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    on_cpu = not torch.cuda.is_available()
    settings = Settings((target.parent,), context_memory=NO_CONTEXTS)
    tokenizer = _tokenizer(launch.value_of(given, "--tokenizer") or model)
    asked = Asked.of(tokenizer, target.name, text, keep_control_tokens, finish=False)
    words = launch.engine_arguments(settings, given, on_cpu)
    if launch.value_of(given, "--max-model-len") is None:
        words += ["--max-model-len", str(len(asked.prompt) + 1)]
    arguments = _arguments(["--model", model, *words, *given], on_cpu)
    order = _explained(lambda: _order(arguments, asked, target.parent))
    parts = Parts.of(order)
    if parts.is_complete(order.ranks):
        report(f"{asked.document_tokens:,} tokens were read before; going on from there")
    else:
        report(f"reading {asked.document_tokens:,} tokens")
        _explained(lambda: _capture(arguments, asked, order))
    report("clustering and calibrating")
    found = making.run(parts, "cpu" if on_cpu else "cuda:0", torch.get_num_threads())
    if found["state"] != "saved":
        raise SqueezedError(found["why"])
    return found


def _tokenizer(name: str):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # files of any kind may lie there
        known = explained(error)
        raise known or SqueezedError(
            f"model: no tokenizer at {name} ({cause_of(error)})"
        ) from error


def _arguments(words: list[str], on_cpu: bool):
    """vLLM's `EngineArgs`; its variables must be there before it is imported."""
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.update(launch.server_environment(os.environ, on_cpu))
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    def refuse(message: str):
        raise SqueezedError(f"vllm: {message}")

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    parser.error = refuse
    return EngineArgs.from_cli_args(parser.parse_args(words))


def _order(arguments, asked: Asked, place: Path) -> Order:
    from squeezed.vllm.engine import engine_of

    config = arguments.create_engine_config()
    asked.check(config.model_config.max_model_len)
    return order_of(asked.argument, asked.prompt, place, engine_of(config))


def _capture(arguments, asked: Asked, order: Order) -> None:
    """Let vLLM read document and probe, and end."""
    from vllm import LLM, SamplingParams

    engine = LLM.from_engine_args(arguments)
    try:
        prompt = {"prompt_token_ids": asked.prompt, "cache_salt": uuid4().hex}
        sampling = SamplingParams(
            max_tokens=1, temperature=0, extra_args={ARGUMENT: asked.argument}, detokenize=False
        )
        (answer,) = engine.generate([prompt], sampling, use_tqdm=False)
        why = fallback_in(answer.kv_transfer_params)
        while why is None:
            state = engine.collective_rpc("squeezed_indexing", args=(order.name,))[0] or {}
            if state.get("state") == "captured":
                return
            why = state.get("why")
            time.sleep(POLL_SECONDS)
        raise SqueezedError(why)
    finally:
        engine.llm_engine.engine_core.shutdown(timeout=30)


def _explained(work: Callable[[], Any]) -> Any:
    """What vLLM raises, as one line: it has written down the rest itself."""
    try:
        return work()
    except SqueezedError:
        raise
    except Exception as error:
        known = explained(error)
        raise known or SqueezedError(
            f"vllm: {cause_of(error)} ({type(error).__name__}); its own lines say more"
        ) from error
