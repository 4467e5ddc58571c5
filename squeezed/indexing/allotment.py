"""Errors of every KV head at every share of its keys -> the share that each head gets.

A budget is worth most where the output errs most. Heads that gather from everywhere are served by
the far field; a head that copies single tokens may need a third of its keys to find them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from squeezed.config import AllotmentConfig

BISECTIONS = 50
LOWEST_ERROR = 1e-12


def allot(
    errors: Tensor,
    tried: tuple[float, ...],
    layer_of_head: Tensor,
    budgets: tuple[float, ...],
    config: AllotmentConfig,
) -> Tensor:
    """The shares with the least error in sum whose mean over all heads is the budget.

    The price of a key is the same for all heads: each takes the share that minimises its error
    plus the price of its keys, and bisection finds the price at which the budget is spent. A layer
    gets at least what it would at the price at which it spends `least_share` of the budget.

    Args:
        errors: `[len(tried), N]`, squared errors of the KV heads of all layers.
        tried: shares of a head's keys at which they were measured, rising.
        layer_of_head: `[N]` int64 on the CPU, counted from 0; heads of a layer stand together.

    Returns:
        `[budgets, N]` float64.
    """
    layers, layer = int(layer_of_head[-1]) + 1, layer_of_head.to(errors.device)
    weighted = torch.where(layer == 0, config.first_layer_weight * errors, errors)
    shares, curves = _curves(weighted.double(), tried, config.steps)
    wanted = shares.new_tensor(budgets)[:, None]
    alone = (config.least_share * wanted).expand(-1, layers)
    least = _spend(shares, curves, alone, layer, torch.zeros_like(wanted))
    return _spend(shares, curves, wanted, torch.zeros_like(layer), least)


def _spend(shares: Tensor, curves: Tensor, wanted: Tensor, group: Tensor, least: Tensor) -> Tensor:
    """Shares `[budgets, N]` at one price per group of heads, none below `least`.

    Args:
        wanted: mean share of every group, `[budgets, groups]`.
        group: of every head, `[N]`.
    """
    low, high = torch.full_like(wanted, -40.0), torch.full_like(wanted, 20.0)
    averages = one_hot(group, wanted.shape[1]).to(wanted)
    averages /= averages.sum(0)

    def at(log_price: Tensor) -> Tensor:
        costs = curves + log_price.exp()[:, None, group] * shares[:, None]
        return shares[costs.argmin(1)].clamp(min=least)

    for _ in range(BISECTIONS):
        price = (low + high) / 2
        over = at(price) @ averages > wanted
        low, high = torch.where(over, price, low), torch.where(over, high, price)
    more, less = at(low), at(high)
    left = (wanted - less @ averages) / ((more - less) @ averages).clamp(min=1e-12)
    return torch.lerp(less, more, left[:, group])  # shares move in steps: part of the last one


def _curves(errors: Tensor, tried: tuple[float, ...], steps: int) -> tuple[Tensor, Tensor]:
    """Shares `[steps]` and errors `[steps, N]` there, from errors `[len(tried), N]`.

    More keys never count as worse, and all keys have no error. Between measured shares the error
    is a power of the share.
    """
    falling = errors.cummin(0).values.clamp(min=LOWEST_ERROR)
    falling = torch.cat([falling, torch.full_like(falling[:1], LOWEST_ERROR)]).log()
    known = errors.new_tensor([*tried, 1.0]).log()
    places = torch.linspace(float(known[0]), 0.0, steps, dtype=known.dtype, device=known.device)
    above = torch.searchsorted(known, places).clamp(1, len(known) - 1)
    weight = (places - known[above - 1]) / (known[above] - known[above - 1])
    return places.exp(), torch.lerp(falling[above - 1], falling[above], weight[:, None]).exp()
