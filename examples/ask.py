"""Index a document, save it, open it again, ask it: python examples/ask.py manual.txt "Why?" """

import sys
import tempfile
from pathlib import Path

import squeezed
from squeezed.hf.loading import load_model


def run(model, tokenizer, text, question, directory, new_tokens=48):
    """Answer `question` from a context saved under `directory`."""
    path = squeezed.index(model, tokenizer, text).save(Path(directory) / "document.sqz")
    context = squeezed.load(path, model)  # another process would begin here
    answer = squeezed.generate(
        model, tokenizer, context, question, budget=0.1, max_new_tokens=new_tokens
    )
    print(answer.text)
    print(f"read {answer.spending.budget:.1%} of the keys")
    return answer


if __name__ == "__main__":
    document, asked = sys.argv[1:]
    with tempfile.TemporaryDirectory() as scratch:
        run(*load_model("demo"), Path(document).read_text(encoding="utf-8"), asked, scratch)
