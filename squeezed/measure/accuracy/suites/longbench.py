"""LongBench: its 16 English and code tasks, with its prompts and its truncation in the middle.

Local data is a directory with `<task>.jsonl` as LongBench publishes it, or with files that end in
`<task>.json` and hold whole prompts (`origin_prompt`, `gold`), as a published subset does. Without
a path the archive is fetched from the hub data set `zai-org/LongBench`.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from squeezed.context.prompt import PromptTemplate
from squeezed.errors import SqueezedError
from squeezed.measure.accuracy.data import field, read_json, read_json_lines, required
from squeezed.measure.accuracy.examples import (
    Document,
    Question,
    Suite,
    SuiteOptions,
    chosen_tasks,
)
from squeezed.measure.accuracy.suites.longbench_prompts import FIRST_LINE, TASKS, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HUB = ("zai-org/LongBench", "data.zip")


def documents(options: SuiteOptions, tokenizer: PreTrainedTokenizerBase) -> Iterator[Document]:
    """Examples of every chosen task that has a file; prompts are cut to `context_tokens`."""
    folder = required(options.data, "a directory", "longbench") if options.data else from_hub()
    found = False
    for name in chosen_tasks("longbench", TASKS, options.tasks):
        for number, parts in enumerate(read_task(folder, name)):
            found = True
            yield _document(name, number, parts, options.context_tokens, tokenizer)
    if not found:
        raise SqueezedError(
            f"data: expected files <task>.jsonl or *<task>.json in {folder}, found none"
        )


def from_hub() -> Path:
    """The data set's archive, fetched and unpacked beside itself once."""
    from huggingface_hub import hf_hub_download

    archive = Path(hf_hub_download(HUB[0], HUB[1], repo_type="dataset"))
    folder = archive.parent / "data"
    if not folder.exists():
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(archive.parent)
    return folder


Parts = tuple[str, str, tuple[str, ...], tuple[str, ...]]
"""Document, question with all text after the document, answers, and classes."""


def read_task(folder: Path, name: str) -> Iterator[Parts]:
    """Every example of a task in either format; nothing if there is no file."""
    if (folder / f"{name}.jsonl").exists():
        yield from published(folder / f"{name}.jsonl", TASKS[name])
    for file in sorted(folder.glob(f"*_{name}.json")):
        yield from whole_prompts(file, TASKS[name])


def published(file: Path, task: Task) -> Iterator[Parts]:
    for number, row in read_json_lines(file):
        where = f"{file}: line {number}"
        context, asked = (field(row, key, str, where) for key in ("context", "input"))
        answers = tuple(field(row, "answers", list, where))
        classes = tuple(row.get("all_classes") or ())
        yield context, task.after.replace("{input}", asked), answers, classes


def whole_prompts(file: Path, task: Task) -> Iterator[Parts]:
    """Prompts are taken apart where the text after the document begins."""
    rows = read_json(file)
    for key, row in rows.items():
        where = f"{file}: record {key}"
        prompt = field(row, "origin_prompt", str, where)
        start = _question_start(prompt, task, where)
        answers, classes = _gold(row.get("gold"), where)
        before = len(task.before) if prompt.startswith(task.before) else 0
        yield prompt[before:start], prompt[start:], answers, classes


def _question_start(prompt: str, task: Task, where: str) -> int:
    marks = [task.question] if task.question else [task.after.partition("{input}")[0]]
    marks += [other.after.partition("{input}")[0] for other in TASKS.values() if other.chat]
    places = [prompt.rfind(mark) for mark in marks if mark.strip()]
    start = next((place for place in places if place > 0), -1)
    if start < 0:
        raise SqueezedError(f"{where}: field 'origin_prompt': expected one of LongBench's prompts")
    return start


def _gold(gold: object, where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Answers and classes from a list of answers, or from an object with both."""
    if isinstance(gold, dict):
        parts = (field(gold, name, list, where) for name in ("answers", "all_classes"))
        answers, classes = (tuple(part) for part in parts)
        return answers, classes
    if not isinstance(gold, list):
        raise SqueezedError(f"{where}: field 'gold': expected list, got {type(gold).__name__}")
    return tuple(gold), ()


def _document(
    name: str, number: int, parts: Parts, tokens: int, tokenizer: PreTrainedTokenizerBase
) -> Document:
    task = TASKS[name]
    context, asked, answers, classes = parts
    template = PromptTemplate.of(tokenizer) if task.chat else PromptTemplate.plain()
    shown = PromptTemplate(template.before + task.before, "", template.after)
    around = len(shown.document_ids(tokenizer, "")) + len(shown.question_ids(tokenizer, asked))
    question = Question(
        id="0",
        text=asked,
        answers=answers,
        metrics=(task.metric,),
        max_new_tokens=task.new_tokens,
        forced=answers[0],
        classes=classes,
        first_line=name in FIRST_LINE,
    )
    text = without_middle(context, tokens - around - task.new_tokens, tokenizer)
    return Document(f"{name}-{number}", name, text, shown, (question,))


def without_middle(text: str, tokens: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """At most `tokens` tokens: the first and the last half of them, as LongBench truncates."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) <= tokens:
        return text
    half = max(1, tokens // 2)
    return tokenizer.decode(ids[:half]) + tokenizer.decode(ids[-half:])


LONGBENCH = Suite("longbench", "https://arxiv.org/abs/2308.14508", documents, tuple(TASKS))
