"""A session for the commands that ask: options read, notes written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from squeezed.cli.console import index_progress, is_directory, note, quiet_libraries
from squeezed.cli.document import read_document
from squeezed.config import PRESETS, IndexConfig

if TYPE_CHECKING:
    from squeezed import Session
    from squeezed.hf.asking import Asking
    from squeezed.hf.fixed_context import FixedContext


@contextmanager
def open_session(
    source: Path,
    model: str,
    dtype: str,
    device: str,
    asking: Asking | None = None,
    config: IndexConfig | None = None,
    keep_control_tokens: bool = False,
) -> Iterator[tuple[Session, FixedContext]]:
    """A session and a saved context, which knows its own template, or a text file indexed now.

    Args:
        asking: settings of the questions, proved before a document is read.
    """
    from squeezed import Session
    from squeezed.context.prompt import PromptTemplate

    quiet_libraries()
    text = None if is_directory(source) else read_document(source)
    if text is not None and asking is not None:
        asking.check_preset(PRESETS)
    with Session.of(model, dtype, device, note) as session:
        if text is None:
            context = session.open(source)
        else:
            if asking is not None:
                session.prove(asking, config)
            template = PromptTemplate.of(session.tokenizer, keep_control_tokens)
            with index_progress() as progress:
                context = session.index(text, None, config, template, progress)
        say_if_dense(context)
        yield session, context


def say_if_dense(context: FixedContext) -> None:
    if context.is_dense:
        note(
            f"note: {len(context.tokens)} tokens are too few to cluster beside the pinned ones; "
            "every answer reads all of them (dense)"
        )
