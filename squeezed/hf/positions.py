"""Where a model's positions end: a document must leave room for questions, an answer must fit."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from torch import nn

from squeezed.errors import SqueezedError
from squeezed.hf.rope import End, rope_end
from squeezed.hf.support import text_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

LEAST_PROBE = 16
"""Tokens without which a probe says nothing, and a document leaves no room for a question."""

log = logging.getLogger("squeezed")


def positions_end(model: PreTrainedModel, document: int) -> End | None:
    """The first end that a document of so many tokens must not pass with its questions."""
    config = text_config(model)
    window = getattr(config, "sliding_window", None)
    ends = [rope_end(config, document), _table_end(model, config)]
    if window and window >= (_longest(model) or window + 1):
        ends.append(End(window, "its attention is a window of that size"))
    return min((end for end in ends if end), key=lambda end: end.tokens, default=None)


def _longest(model: PreTrainedModel) -> int | None:
    return getattr(text_config(model), "max_position_embeddings", None)


def _table_end(model: PreTrainedModel, config: PreTrainedConfig) -> End | None:
    """Where learned positions end: a table beside that of the tokens, as long as the positions."""
    longest, tokens = _longest(model), model.get_input_embeddings()
    for module in model.base_model.modules():
        if not longest or not isinstance(module, nn.Embedding) or module is tokens:
            continue
        if 0 <= module.num_embeddings - longest <= 2:
            skipped = getattr(module, "offset", 0)
            if module.padding_idx is not None:
                skipped = module.padding_idx + 1
            rows = min(longest, module.num_embeddings - skipped)
            return End(rows, "its learned positions end there")
    return None


def check_document(model: PreTrainedModel, document: int) -> int:
    """Tokens that a probe after a document of so many tokens may have.

    Raises:
        SqueezedError: the document is longer than the positions, or leaves no room for questions.
    """
    longest, end = _longest(model), positions_end(model, document)
    if longest and document > longest:
        raise SqueezedError(
            f"text: the document has {document:,} tokens, the model's positions end at "
            f"{longest:,}; shorten the document or choose a model for longer contexts"
        )
    if longest and (end is None or longest < end.tokens):
        end = End(longest, "its positions end there")
    if end and end.tokens - document < LEAST_PROBE:
        raise SqueezedError(
            f"text: the document has {document:,} tokens and the model can read {end.tokens:,} "
            f"({end.reason}), which leaves no room for a question; shorten the document"
        )
    return end.tokens - document if end else 1 << 62


def check_room(model: PreTrainedModel, document: int, prompt: int, new_tokens: int) -> None:
    """Raise `SqueezedError` if an answer would pass an end; note where it passes the trained one.

    Args:
        document: tokens of the context.
        prompt: tokens before the answer, the context's included.
        new_tokens: most tokens of the answer.
    """
    read = prompt + new_tokens - 1  # the last one is not read again
    end, longest = positions_end(model, document), _longest(model)
    if end and read > end.tokens:
        fitting = end.tokens - prompt + 1
        remedy = f"ask for at most {fitting:,}" if fitting > 0 else "shorten the question"
        raise SqueezedError(
            f"max_new_tokens: {prompt:,} tokens of document and question with {new_tokens:,} of "
            f"answer pass {end.tokens:,}, where the model ends ({end.reason}); {remedy}"
        )
    if longest and read > longest:
        log.warning(
            "%d tokens of document, question and answer pass the %d positions that the model was "
            "made for: answers may lose their sense",
            read,
            longest,
        )
