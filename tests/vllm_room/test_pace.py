import pytest

from squeezed.vllm.pace import Pace

BLOCK, MOST = 16, 2048


def read(document, limit, seconds_of, most=MOST):
    """Pieces of a document, and how long each step took; and what is read at last."""
    pace, done, steps = Pace(limit, BLOCK, most), 0, []
    while piece := pace.next(document - done):
        seconds = seconds_of(done, piece)
        steps.append((piece, seconds))
        pace.took(piece, seconds)
        done += piece
        assert done <= document and len(steps) < 10_000
    rest = document - done
    return steps, (rest, seconds_of(done, rest))


def machine(per_token, per_pair, anyway=0.02):
    return lambda done, tokens: anyway + tokens * (per_token + per_pair * (done + tokens / 2))


@pytest.mark.parametrize("per_token", [1e-6, 3e-5, 2e-4])
@pytest.mark.parametrize("per_pair", [0.0, 1e-9, 1e-8])
@pytest.mark.parametrize("limit", [0.02, 0.1])
def test_no_step_takes_longer_by_more_than_allowed(per_token, per_pair, limit):
    """However dear a token is, and however dear looking back becomes."""
    steps, last = read(60_000, limit, machine(per_token, per_pair))
    assert sum(piece for piece, _ in steps) + last[0] == 60_000
    assert all(piece % BLOCK == 0 and piece <= MOST for piece, _ in steps)
    first = steps[0][1]
    assert max(seconds for _, seconds in steps) <= first + limit
    assert last[1] <= first + limit


def test_time_that_is_allowed_is_used():
    steps, _ = read(60_000, 0.1, machine(3e-5, 1e-9))
    assert sorted(seconds for _, seconds in steps)[len(steps) // 2] > 0.02 + 0.05


def test_what_a_request_takes_anyway_does_not_count():
    """On a slow machine, or in a crowd: else a document would be read block by block."""
    sizes = [
        [piece for piece, _ in read(60_000, 0.1, machine(3e-5, 1e-9, anyway))[0]]
        for anyway in (0.0, 0.5)
    ]
    assert sizes[0] == sizes[1] and max(sizes[0]) > 1000


def test_a_step_held_up_by_others_is_forgiven():
    """One slow step makes the next ones small, for a while."""
    pace = Pace(0.1, BLOCK, MOST, done=100_000, shortest=0.01)
    pace.took(1024, 0.09)
    assert 1000 < pace.tokens <= 1024
    pace.took(1024, 9.0)
    assert pace.tokens == BLOCK
    pace.took(BLOCK, 0.012)
    assert pace.tokens == 2 * BLOCK


@pytest.mark.parametrize("document", [1, 15, 16, 17, 40, 63, 64, 65, 1000])
def test_something_is_left_for_the_last_request(document):
    """It hands over what was read, and computes little."""
    steps, (rest, _) = read(document, 0.1, lambda done, tokens: 10.0)
    assert 1 <= rest <= BLOCK and all(piece % BLOCK == 0 for piece, _ in steps)


def test_without_a_limit_all_is_read_at_once():
    assert read(60_000, 0, machine(1e-6, 0))[0] == []
