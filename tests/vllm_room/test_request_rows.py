from squeezed.vllm.news import Reader, WorkerNews
from squeezed.vllm.rows import ALONE, BLOCKS, WHOLE, Row, grouped, rows_of

READERS = {
    "a": Reader("one@1", "one", 0.1, "best", 110, 200),
    "b": Reader("one@1", "one", 0.1, "best", 110, 210),
    "c": Reader("one@1", "one", 0.2, "best", 110, 200),
    "d": Reader("two@1", "two", 0.1, "best", 90, 300),
    "e": Reader("two@1", "two", 0.1, "paper", 90, 300),
}


def batch(*requests):
    """Rows of `(request, new tokens, tokens of the request)`."""
    starts = [0]
    for _, new, _ in requests:
        starts.append(starts[-1] + new)
    ids = [request for request, _, _ in requests]
    return rows_of(starts, [length for _, _, length in requests], ids.__getitem__, READERS)


def names(rows):
    return [row.request for row in rows]


def test_tokens_over_one_context_by_one_rule_decode_together():
    rows = batch(
        ("a", 1, 205), ("x", 1, 9), ("b", 1, 220), ("c", 1, 205), ("d", 1, 301), ("e", 1, 301)
    )
    found = grouped(rows)
    assert [names(group) for group in found.decodes] == [["a", "b"], ["c"], ["d"], ["e"]]
    assert names(found.plain) == ["x"]
    assert not found.prefills


def test_rows_of_more_tokens_are_calls_of_their_own():
    found = grouped(batch(("a", 30, 200), ("b", 1, 220), ("x", 5, 5), (None, 1, 1)))
    assert names(found.prefills) == ["a"]
    assert found.prefills[0].start == 0 and found.prefills[0].stop == 30
    assert [names(group) for group in found.decodes] == [["b"]]
    assert [row.place for row in found.plain] == [2, 3]
    assert found.has_contexts
    assert not grouped(batch(("x", 5, 5))).has_contexts


def test_how_a_token_reads_does_not_hang_on_chunks():
    """A document of 110 tokens, of which 10 fill no block, in a prompt of 200."""

    def kinds(cuts, first=100):
        found = {}
        for stop in cuts:
            row = Row(0, 0, stop - first, stop, "a", READERS["a"])
            for kind, part in row.parts(64):
                for place in range(part.start, part.stop):
                    found[first + place] = kind
            first = stop
        return found

    for cuts in ([202], [150, 202], [105, 110, 137, 199, 200, 201, 202]):
        assert kinds(cuts) == {
            **dict.fromkeys(range(100, 110), WHOLE),
            **dict.fromkeys(range(110, 136), BLOCKS),
            **dict.fromkeys(range(136, 202), ALONE),
        }
    preempted = Row(0, 0, 150, 250, "a", READERS["a"])  # generated tokens are read again
    assert preempted.parts(64)[-1] == (ALONE, slice(36, 150))


def test_short_prompts_have_no_blocks_and_long_chunks_no_end():
    short = Reader("one@1", "one", 0.1, "best", 110, 120)
    assert Row(0, 0, 20, 120, "a", short).parts(64) == [
        (WHOLE, slice(0, 10)),
        (ALONE, slice(10, 20)),
    ]
    assert Row(0, 0, 7, 107, "a", short).parts(64) == [(WHOLE, slice(0, 7))]


def test_a_prompts_single_token_is_no_decoding():
    """It may stand in the document, or select in a block of its own."""
    found = grouped(batch(("a", 1, 109), ("a", 1, 130), ("a", 1, 200), ("a", 1, 201)))
    assert [row.length for row in found.prefills] == [109, 130]
    assert [[row.length for row in group] for group in found.decodes] == [[200, 201]]


def test_news_of_ranks_add_up():
    one = WorkerNews({"a": (3, 10), "b": (1, 5)}, {"k": 1}, {}, {"k": 2.0})
    two = WorkerNews({"a": (4, 10)}, {"k": 1}, {"l": "no"}, {"k": 3.0})
    both = one.add(two)
    assert both.spent == {"a": (7, 20), "b": (1, 5)}
    assert both.loaded == {"k": 2}
    assert both.failed == {"l": "no"}
    assert both.seconds == {"k": 3.0}
    assert both and not WorkerNews()
