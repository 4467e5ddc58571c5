"""What a caller changes in a context's text: more of it, less of it, or another text."""

from __future__ import annotations

from squeezed.context.growth import pieces_of
from squeezed.context.text import check_text
from squeezed.errors import SqueezedError
from squeezed.hf.growing import Context, Growing


def append(growing: Growing, context: Context, text: str) -> Context:
    """The context with `text` behind it, tokenised by itself."""
    check_text("text", text)
    ids = context.template.further_ids(growing.tokenizer, text)
    if not len(ids):
        raise SqueezedError("text: there is nothing to append; give at least one word")
    return growing.grown(context, ids, (*pieces_of(context), len(ids)))
