from squeezed.vllm.news import Reader, WorkerNews
from squeezed.vllm.rows import Row, grouped, rows_of

READERS = {
    "a": Reader("one@1", "one", 0.1, "best", 200),
    "b": Reader("one@1", "one", 0.1, "best", 210),
    "c": Reader("one@1", "one", 0.2, "best", 200),
    "d": Reader("two@1", "two", 0.1, "best", 300),
    "e": Reader("two@1", "two", 0.1, "paper", 300),
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


def test_what_selects_in_blocks_does_not_hang_on_chunks():
    """Of a prompt of 200 tokens the last 64 select alone, however it is cut."""

    def alone(cuts, first):
        places = []
        for stop in cuts:
            row = Row(0, 0, stop - first, stop, "a", READERS["a"])
            places += range(first + row.in_blocks(64), stop)
            first = stop
        return places

    for cuts in ([200], [150, 200], [110, 137, 199, 200], [199, 200, 201, 202]):
        assert alone(cuts, 100) == list(range(136, cuts[-1]))
    preempted = Row(0, 0, 150, 250, "a", READERS["a"])  # 50 generated tokens are read again
    assert preempted.in_blocks(64) == 36


def test_news_of_ranks_add_up():
    one = WorkerNews({"a": (3, 10), "b": (1, 5)}, {"k": 1}, {}, {"k": 2.0})
    two = WorkerNews({"a": (4, 10)}, {"k": 1}, {"l": "no"}, {"k": 3.0})
    both = one.add(two)
    assert both.spent == {"a": (7, 20), "b": (1, 5)}
    assert both.loaded == {"k": 2}
    assert both.failed == {"l": "no"}
    assert both.seconds == {"k": 3.0}
    assert both and not WorkerNews()
