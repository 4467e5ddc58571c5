"""Scores of a generated answer, each in [0, 1], the best over the accepted answers.

Definitions follow LongBench (arXiv 2308.14508, section 3) and RULER (arXiv 2404.06654, section 4).
ROUGE comes from `rouge-score` and edit similarity from `rapidfuzz` (the extra `eval`).
"""

from __future__ import annotations

import importlib
import re
import string
from collections import Counter
from collections.abc import Callable
from functools import cache
from types import ModuleType

from squeezed.errors import SqueezedError
from squeezed.measure.accuracy.examples import Question

Metric = Callable[[str, str, Question], float]
"""Prediction, one accepted answer, and its question -> score."""


def score(prediction: str, question: Question) -> dict[str, float]:
    """Every metric of `question`, the best over its answers; some take all answers at once."""
    if question.first_line:
        prediction = prediction.lstrip("\n").split("\n")[0]
    found = {}
    for name in question.metrics:
        if name in ALL_ANSWERS:
            found[name] = ALL_ANSWERS[name](prediction, question.answers)
        else:
            metric = METRICS[name]
            found[name] = max(metric(prediction, gold, question) for gold in question.answers)
    return found


def normalised(text: str) -> list[str]:
    """Lower-case words without punctuation and articles, as in SQuAD."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def token_f1(prediction: str, gold: str, question: Question) -> float:
    ours, theirs = normalised(prediction), normalised(gold)
    common = sum((Counter(ours) & Counter(theirs)).values())
    if not common:
        return float(ours == theirs)
    precision, recall = common / len(ours), common / len(theirs)
    return 2 * precision * recall / (precision + recall)


def containment(prediction: str, gold: str, question: Question) -> float:
    """Whether the normalised answer occurs in the normalised prediction, on word bounds."""
    return float(f" {' '.join(normalised(gold))} " in f" {' '.join(normalised(prediction))} ")


@cache
def optional(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SqueezedError(
            f"metric: expected the package {package}, got none; "
            "pip install 'squeezed-attention[eval]'"
        ) from error


def rouge_l(prediction: str, gold: str, question: Question) -> float:
    scorer = optional("rouge_score.rouge_scorer", "rouge-score").RougeScorer(["rougeL"])
    return scorer.score(gold, prediction)["rougeL"].fmeasure


def edit_similarity(prediction: str, gold: str, question: Question) -> float:
    """Of the first line that is code."""
    lines = prediction.lstrip("\n").split("\n")
    code = next((line for line in lines if not re.search("`|#|//", line)), "")
    return optional("rapidfuzz.fuzz", "rapidfuzz").ratio(code, gold) / 100


def classification(prediction: str, gold: str, question: Question) -> float:
    """1 / number of labels named, if the right one is among them.

    A label that is part of the right label's name is not counted as named.
    """
    named = [label for label in question.classes if label in prediction]
    named = [label for label in named if label == gold or label not in gold]
    return 1 / len(named) if gold in named else 0.0


def share_of_numbers(prediction: str, gold: str, question: Question) -> float:
    """Share of the numbers in the prediction that are the right one (retrieval and counting)."""
    wanted, found = re.findall(r"\d+", gold), re.findall(r"\d+", prediction)
    return sum(number == wanted[0] for number in found) / len(found) if found and wanted else 0.0


def all_found(prediction: str, answers: tuple[str, ...]) -> float:
    """Share of the answers that occur in the prediction, case ignored."""
    return sum(gold.lower() in prediction.lower() for gold in answers) / len(answers)


def any_found(prediction: str, answers: tuple[str, ...]) -> float:
    return float(any(gold.lower() in prediction.lower() for gold in answers))


METRICS: dict[str, Metric] = {
    "f1": token_f1,
    "containment": containment,
    "rouge_l": rouge_l,
    "edit_similarity": edit_similarity,
    "classification": classification,
    "number": share_of_numbers,
}
ALL_ANSWERS: dict[str, Callable[[str, tuple[str, ...]], float]] = {
    "all_found": all_found,
    "any_found": any_found,
}
