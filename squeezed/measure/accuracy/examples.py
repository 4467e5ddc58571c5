"""What a suite hands to the runner: documents, and the questions asked about each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from squeezed.context.prompt import PromptTemplate
from squeezed.errors import SqueezedError


@dataclass(frozen=True)
class Question:
    """One question about a document.

    Attributes:
        id: unique within the document.
        text: the question as the template takes it.
        answers: accepted answers.
        metrics: names in `squeezed.measure.accuracy.metrics.METRICS` that score a generated answer;
            none asks for no generation.
        max_new_tokens: longest generated answer.
        forced: text to compare with dense attention token by token, or `None`.
        classes: all labels of a classification task.
        first_line: whether only the first line of a generated answer counts.
    """

    id: str
    text: str
    answers: tuple[str, ...]
    metrics: tuple[str, ...] = ()
    max_new_tokens: int = 32
    forced: str | None = None
    classes: tuple[str, ...] = ()
    first_line: bool = False


@dataclass(frozen=True)
class Document:
    """A fixed context with its questions; `task` names the kind within the suite."""

    id: str
    task: str
    text: str
    template: PromptTemplate
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class SuiteOptions:
    """What a user may choose about a suite.

    Attributes:
        data: local file or directory; `None` fetches the usual hub data set where there is one.
        context_tokens: length of generated or truncated documents.
        documents, questions: at most so many documents per task, and questions per document.
        tasks: names of tasks; empty means all.
    """

    data: Path | None = None
    context_tokens: int = 8192
    documents: int | None = None
    questions: int | None = None
    tasks: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Suite:
    """A named source of documents."""

    name: str
    source: str
    documents: Callable[[SuiteOptions, object], Iterator[Document]]
    tasks: tuple[str, ...] = field(default=())


def chosen_tasks(suite: str, known: Iterable[str], wanted: tuple[str, ...]) -> tuple[str, ...]:
    """`wanted`, all of which must be known; all known tasks if none is wanted."""
    names = tuple(known)
    for task in wanted:
        if task not in names:
            raise SqueezedError(
                f"tasks: {suite} has {', '.join(names)}, got {task!r}; give --tasks from these"
            )
    return wanted or names
