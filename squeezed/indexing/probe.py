"""The question that calibrates: what people ask of any text, and excerpts of this one."""

from __future__ import annotations

PROBE = (
    "What is this about, and what are its main points? Which names, numbers, dates and places does "
    "it give, and what do they mean? How does it work, why was it done, and what are the "
    "exceptions? Explain the most important part in a few sentences, and say where it is described."
)


EXCERPT_CHARACTERS = 120


def probe_question(document: str) -> str:
    """A question that calibrates: what people ask of any text, and two excerpts of this one.

    Queries of the document's own last tokens look back at their neighbours; thresholds fitted on
    them let real questions read a quarter more than asked (DESIGN.md).
    """
    starts = (len(document) // 3, 2 * len(document) // 3)
    excerpts = (document[start : start + EXCERPT_CHARACTERS] for start in starts)
    return " ".join([PROBE, *(" ".join(excerpt.split()) for excerpt in excerpts)])
