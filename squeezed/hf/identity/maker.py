"""Are these the model and the tokenizer that made a context?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from squeezed.context.record import ContextRecord
from squeezed.errors import ContextFileError, SqueezedError, expect, got
from squeezed.hf.identity.fingerprint import check_model
from squeezed.hf.identity.vocabulary import tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_pair(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `SqueezedError` for what is no model or no tokenizer of Transformers."""
    if not callable(getattr(model, "generate", None)) or not hasattr(model, "config"):
        raise SqueezedError(f"model: expected a Transformers model, got {got(model)}")
    if not callable(tokenizer) or not hasattr(tokenizer, "get_vocab"):
        raise SqueezedError(
            f"tokenizer: expected a Transformers tokenizer, got {got(tokenizer)}; of a processor "
            "pass its tokenizer"
        )


def check_maker(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: ContextRecord
) -> None:
    """Raise `ContextFileError` unless model and tokenizer, as they are now, made this context."""
    expect("context", context, ContextRecord, "a FixedContext, made by squeezed.index or load")
    check_tokenizer(tokenizer, context)
    check_model(model, context)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, context: ContextRecord) -> None:
    """Raise `ContextFileError` unless `tokenizer` made this context."""
    if tokenizer_fingerprint(tokenizer) != context.tokenizer:
        raise ContextFileError(
            "tokenizer: this context was made with another tokenizer; use the one it was made with"
        )
