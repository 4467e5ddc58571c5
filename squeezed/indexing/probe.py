"""The question that calibrates: what people ask of any text, and excerpts of this one."""

from __future__ import annotations

from squeezed.config import ProbeConfig


def probe_question(document: str, config: ProbeConfig) -> str:
    """A question that calibrates: what people ask of any text, and two excerpts of this one.

    Queries of the document's own last tokens look back at their neighbours; thresholds fitted on
    them let real questions read a quarter more than asked (DESIGN.md).
    """
    starts = (len(document) // 3, 2 * len(document) // 3)
    excerpts = (document[start : start + config.excerpt_characters] for start in starts)
    return " ".join([config.question, *(" ".join(excerpt.split()) for excerpt in excerpts)])
