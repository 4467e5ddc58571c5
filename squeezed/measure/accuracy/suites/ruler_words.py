"""RULER's tracing and counting tasks: variables, common words, frequent coded words."""

from __future__ import annotations

import itertools
import random
import string
from pathlib import Path

from squeezed.measure.accuracy.suites.haystack import NOISE, word_list

HOPS = 4
COMMON, COMMON_TIMES, RARE_TIMES = 10, 30, 3
ZETA = 2.0  # exponent of the coded words' frequencies


def variable_tracking(data: Path | None, rng: random.Random, number: int) -> tuple:
    """A chain `VAR A = 12345`, `VAR B = VAR A`, ... hidden in order within noise."""
    value = rng.randint(10_000, 99_999)
    names: list[str] = []
    while len(names) < HOPS + 1:
        name = "".join(rng.choices(string.ascii_uppercase, k=5))
        names += [] if name in names else [name]
    links = [f"VAR {names[0]} = {value}"]
    links += [f"VAR {b} = VAR {a}" for a, b in itertools.pairwise(names)]
    seed = rng.random()

    def build(size: int) -> str:
        return hide_in_order(links, [" ".join(NOISE)] * size, random.Random(seed))

    ask = (
        f"Question: Find all variables that are assigned the value {value} in the text above."
        "{after} Answer: According to the chain(s) of variable assignment in the text above, "
        f"{len(names)} variables are assigned the value {value}, they are:"
    )
    before = (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    )
    return before, build, ask, tuple(names), 30


def hide_in_order(links: list[str], hay: list[str], rng: random.Random) -> str:
    """Like `hide`, but a link never comes before the one it refers to."""
    places = sorted(rng.randint(0, len(hay)) for _ in links)
    hidden = list(hay)
    for place, link in reversed(list(zip(places, links, strict=True))):
        hidden.insert(place, link + ".")
    return "\n".join(hidden)


def common_words(data: Path | None, rng: random.Random, number: int) -> tuple:
    """A numbered list in which ten words occur thirty times and all others three times."""
    pool = rng.sample(word_list("noun") + word_list("adjective"), 4000)
    common, rare = pool[:COMMON], pool[COMMON:]
    seed = rng.random()

    def build(size: int) -> str:
        listed = common * COMMON_TIMES + rare[: size - 1] * RARE_TIMES
        random.Random(seed).shuffle(listed)
        return " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))

    before = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.\n"
    )
    ask = (
        "Question: What are the 10 most common words in the above list?{after} Answer: The top 10 "
        "words that appear most often in the list are:"
    )
    return before, build, ask, tuple(common), 120, "all_found", len(rare)


def frequent_words(data: Path | None, rng: random.Random, number: int) -> tuple:
    """Coded words whose frequencies follow a zeta distribution; the most frequent is a blank."""
    coded = ["".join(rng.choices(string.ascii_lowercase, k=6)) for _ in range(300)]
    shares = [rank**-ZETA for rank in range(1, len(coded) + 1)]
    seed = rng.random()

    def build(size: int) -> str:
        listed = []
        for word, share in zip(["...", *coded[1:]], shares, strict=True):
            listed += [word] * round((size + 60) * share / sum(shares))
        random.Random(seed).shuffle(listed)
        return " ".join(listed)

    ask = (
        "Question: Do not provide any explanation. Please ignore the dots '....'. What are the "
        "three most frequently appeared words in the above coded text?{after} Answer: According to "
        "the coded text above, the three most frequently appeared words are:"
    )
    before = (
        "Read the following coded text and track the frequency of each coded word. Find the three "
        "most frequently appeared coded words. "
    )
    return before, build, ask, tuple(coded[1:4]), 50
