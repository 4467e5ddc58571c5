"""Model, tokenizer and context for the commands that ask."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from squeezed.cli.console import index_progress, is_directory, note, quiet_libraries, read_document
from squeezed.config import IndexConfig, check_budget

if TYPE_CHECKING:
    from squeezed.hf.cache import SqueezedCache
    from squeezed.hf.fixed_context import FixedContext


@dataclass(frozen=True)
class Asking:
    """How questions are answered; the command line's options of that name."""

    budget: float
    preset: str
    implementation: str
    method: str

    def __post_init__(self) -> None:
        check_budget(self.budget)


@dataclass(frozen=True)
class Session:
    """A loaded model and the context it reads."""

    model: Any
    tokenizer: Any
    context: FixedContext

    def cache(self, asking: Asking) -> SqueezedCache:
        """A cache that remembers its queries, for sources and traffic."""
        cache = self.context.cache(
            asking.budget, asking.preset, asking.implementation, asking.method
        )
        cache.watch_queries()
        return cache


def open_session(
    source: Path,
    model: str,
    dtype: str,
    device: str,
    config: IndexConfig | None = None,
    keep_control_tokens: bool = False,
) -> Session:
    """Load a saved context, which knows its own template, or index a text file on the way."""
    import squeezed
    from squeezed.context.prompt import PromptTemplate
    from squeezed.engine import check_tokenizer
    from squeezed.hf.loading import load_model

    quiet_libraries()
    text = None if is_directory(source) else read_document(source)
    loaded, tokenizer = load_model(model, dtype, device, note)
    if text is None:
        context = squeezed.load(source, loaded)
        check_tokenizer(tokenizer, context)
    else:
        template = PromptTemplate.of(tokenizer, keep_control_tokens)
        with index_progress() as progress:
            context = squeezed.index(loaded, tokenizer, text, config, template, progress)
    say_if_dense(context)
    return Session(loaded, tokenizer, context)


def say_if_dense(context: FixedContext) -> None:
    if context.is_dense:
        note(
            f"note: {len(context.tokens)} tokens are too few to cluster beside the pinned ones; "
            "every answer reads all of them (dense)"
        )
