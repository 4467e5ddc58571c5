"""A small suite for the runner, and a run of it with the tiny model."""

from tiny import document, tiny_model, tiny_tokenizer

from squeezed.answers.session import Session
from squeezed.context.prompt import PromptTemplate
from squeezed.measure.accuracy.examples import Document, Question
from squeezed.measure.accuracy.results import ResultFile
from squeezed.measure.accuracy.runner import Runner, RunOptions

HEADER = {"suite": "made up", "model": "tiny", "context_tokens": 600, "seed": 0}


def question(name, text, forced="kappa mu", metrics=("f1",)):
    return Question(name, text, ("kappa",), metrics, max_new_tokens=3, forced=forced)


def made_document(name="first", questions=3):
    asked = [
        question(str(i), f" {'what ' * (i + 1)}then?", "kappa " * (i + 1)) for i in range(questions)
    ]
    return Document(name, "made", document(600), PromptTemplate.plain(), tuple(asked))


def runner(path, methods=("best", "quest"), budgets=(0.1,), **changes):
    options = RunOptions(methods, budgets, implementation="reference", **changes)
    results = ResultFile(path, HEADER)
    session = Session(tiny_model(), tiny_tokenizer())
    return Runner(session, options, results, lambda line: None)
