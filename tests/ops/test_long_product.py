"""A product in pieces is the product."""

import pytest
import torch

from squeezed.ops import long_product


class OnGpu(torch.Tensor):
    """A CPU tensor that says it lies on a GPU, so that it is cut into pieces."""

    is_cuda = True


@pytest.mark.parametrize("length", [5, 64, 128, 137, 200])
def test_long_product_equals_the_product(length, monkeypatch):
    monkeypatch.setattr(long_product, "PIECE", 32)
    left, right = torch.randn(3, 7, length), torch.randn(3, length, 4)
    found = long_product.long_product(left.as_subclass(OnGpu), right)
    torch.testing.assert_close(found.as_subclass(torch.Tensor), left @ right, atol=1e-4, rtol=1e-4)
