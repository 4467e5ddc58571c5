"""A method of your own beside dense and ours: python examples/own_method.py manual.txt "Why?"

The method reads the keys with the largest product with the mean of the group's queries.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import squeezed
from squeezed.config import check_budget
from squeezed.hf.answer import respond
from squeezed.hf.build import build_cache
from squeezed.hf.loading import load_model
from squeezed.methods import create
from squeezed.methods.base import Blocks
from squeezed.methods.masked import MaskedLayer, top_rows


@dataclass(frozen=True)
class MeanQueryLayer(MaskedLayer):
    def keep(self, queries):
        shared = queries.logits(self.layer.keys).mean(2, keepdim=True)  # [B, Hkv, 1, Q, P]
        scores = queries.shared(shared[..., self.layer.pinned :])  # [B, Hkv, N, R]
        return top_rows(scores, self.budget_keys)


@dataclass(frozen=True)
class MeanQuery:
    name = "mean-query"
    paper = "none: an example"

    def prepare(self, context, budget):
        blocks = Blocks.of(context)
        return [MeanQueryLayer(layer, budget, blocks) for layer in context.clustered_layers]


def run(model, tokenizer, text, question, budget=0.1, new_tokens=32):
    """The answers of three methods by name."""
    context = squeezed.index(model, tokenizer, text)
    ids = context.template.question_ids(tokenizer, question)
    answers = {}
    for method in (create("dense"), create("squeezed"), MeanQuery()):
        layers = method.prepare(context, check_budget(budget))
        cache = build_cache(context, layers, budget)
        answers[method.name] = respond(model, tokenizer, cache, ids, max_new_tokens=new_tokens)
        answer = answers[method.name]
        print(f"{method.name}, {answer.spending.budget:.1%} of the keys: {answer.text}")
    return answers


if __name__ == "__main__":
    document, asked = sys.argv[1:]
    run(*load_model("demo"), Path(document).read_text(encoding="utf-8"), asked)
