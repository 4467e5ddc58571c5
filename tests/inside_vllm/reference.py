"""Makes in DIR a tiny model, contexts of it, and what Transformers answers: reference.py DIR."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny import document, tiny_model, tiny_tokenizer

import squeezed

QUESTIONS = ("which word is it?", "what is alpha, and what is beta?")
TEXTS = {"one": (1200, 0), "two": (900, 1), "three": (700, 2)}
NEW = 16


def main(place: Path) -> None:
    model = tiny_model("llama", head_dim=32, initializer_range=0.08)
    tokenizer = tiny_tokenizer()
    for part in (model, tokenizer):
        part.save_pretrained(place / "model")
    answers = {"contexts": {}, "asked": []}
    for name, (length, seed) in TEXTS.items():
        context = squeezed.index(model, tokenizer, document(length, seed))
        context.save(place / "contexts" / f"{name}.sqz")
        answers["contexts"][name] = context.tokens.tolist()
        if name == "one":
            answers["asked"] = [
                asked(model, tokenizer, context, question, budget, preset)
                for budget, preset in ((1.0, "best"), (0.1, "best"), (0.1, "paper"))
                for question in QUESTIONS
            ]
    gemma = tiny_model("gemma3", head_dim=32)
    for part in (gemma, tokenizer):
        part.save_pretrained(place / "gemma" / "model")
    context = squeezed.index(gemma, tokenizer, document(500))
    context.save(place / "gemma" / "contexts" / "sliding.sqz")
    answers["gemma"] = context.tokens.tolist()
    (place / "answers.json").write_text(json.dumps(answers))


def asked(model, tokenizer, context, question, budget, preset):
    answer = squeezed.generate(
        model, tokenizer, context, question, budget, preset, max_new_tokens=NEW
    )
    return {
        "budget": budget,
        "preset": preset,
        "prompt": context.tokens.tolist()
        + context.template.question_ids(tokenizer, question).tolist(),
        "tokens": answer.tokens.tolist(),
        "spent": answer.spending.budget,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
