"""A conversation about a document: python examples/conversation.py manual.txt "Why?" "And?" """

import sys
from pathlib import Path

import squeezed
from squeezed.answers.chat import Chat
from squeezed.hf.loading import load_model


def run(model, tokenizer, text, questions, new_tokens=48):
    """Ask one question after the other; every turn sees those before it."""
    context = squeezed.index(model, tokenizer, text)
    chat = Chat(model, tokenizer, context, context.cache(budget=0.1))
    answers = []
    for question in questions:
        answers.append(chat.ask(question, max_new_tokens=new_tokens))
        print(f"> {question}\n{answers[-1].text}\n")
    return answers


if __name__ == "__main__":
    document, *asked = sys.argv[1:]
    run(*load_model("demo"), Path(document).read_text(encoding="utf-8"), asked)
