"""One model, several documents: questions from threads, and an answer in pieces.

python examples/session.py "How do I reset it?" manual.txt notes.txt
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import squeezed


def run(session, texts, question, new_tokens=48):
    """The answer from each of `texts`, by name, and those pieces in which the last one came."""
    for name, text in texts.items():
        session.index(text, name)  # or session.open("manual.sqz"), once it is saved
    with ThreadPoolExecutor() as threads:
        asked = {
            name: threads.submit(
                session.ask, name, question, budget=0.1, watch=True, max_new_tokens=new_tokens
            )
            for name in session.names
        }
    answers = {name: answer.result() for name, answer in asked.items()}
    for name, answer in answers.items():
        print(f"{name}, {answer.spending.budget:.1%} of the keys: {answer.text}")
        print(f"  from: {session.sources(answer, count=1)[0].text}")

    pieces = []
    stream = session.stream(name, question, budget=0.1, max_new_tokens=new_tokens)
    for piece in stream:  # leaving this loop would stop the model
        pieces.append(piece)
        print(piece, end="", flush=True)
    print(f"\n{stream.answer.seconds['per_token'] * 1e3:.0f} ms per token")
    return answers, pieces


if __name__ == "__main__":
    asked, *paths = sys.argv[1:]
    texts = {Path(path).stem: Path(path).read_text(encoding="utf-8") for path in paths}
    with squeezed.Session.of("demo") as session:
        run(session, texts, asked)
