"""What a token drew on: what draws attention always, and what stands out."""

from types import SimpleNamespace

import pytest
import torch

from squeezed.server.local.reading import MOST_TOLD, passages_told

PASSAGES, SOURCE = 30, 4


def told():
    """A token of an answer over passages of which the last ones draw attention always."""
    always = torch.linspace(0.1, 2, PASSAGES, dtype=torch.float64)
    always /= always.sum()
    share = always.clone()
    share[SOURCE] *= 2
    row = SimpleNamespace(
        ask=SimpleNamespace(per_token=True), offsets=[0], words=SimpleNamespace(length=3)
    )
    places = [(i, i + 1) for i in range(PASSAGES)]
    read = torch.zeros(PASSAGES, dtype=torch.float64)
    found = passages_told(places, (share[None], read), always, row)
    shares = (share / share.sum()).tolist()
    return found["tokens"][0], shares


def test_token_tells_what_it_drew_on_most_and_what_stands_out_most():
    token, shares = told()
    drawn = dict(map(tuple, token["passages"]))
    assert (token["start"], token["end"]) == (0, 3)
    assert SOURCE in drawn and set(range(PASSAGES - MOST_TOLD, PASSAGES)) <= drawn.keys()
    assert len(drawn) <= 2 * MOST_TOLD
    assert drawn == {i: pytest.approx(shares[i], abs=1e-6) for i in drawn}
    assert list(drawn.values()) == sorted(drawn.values(), reverse=True)
