"""Observed queries + budget -> thresholds, and the weights of the second-order terms.

In the paper one threshold per level holds for all layers and heads, so a head that needs more keys
gets more (arXiv 2411.09688, section 3.2). A preset may instead try every KV head out at several
shares of its keys (`squeezed.indexing.trials`), share the budget out by what that costs in error
(`squeezed.indexing.allotment`) and give every head the thresholds that spend its share.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from squeezed.config import CalibrationConfig, Preset
from squeezed.context.calibration import Calibration
from squeezed.context.captured import ObservedLayer
from squeezed.indexing.allotment import allot
from squeezed.indexing.forest import Forest
from squeezed.indexing.second_order import fit_alpha
from squeezed.indexing.thresholds import fit_head_thresholds, fit_thresholds
from squeezed.indexing.trials import Trials, try_out


def calibrate(
    forest: Forest,
    preset: Preset,
    budgets: tuple[float, ...],
    config: CalibrationConfig | None = None,
) -> Calibration:
    """Fit alpha of every query head, thresholds for every budget, and the far field."""
    config = CalibrationConfig() if config is None else config
    joined, blocks = forest.joined, (1, preset.query_block)
    alpha = [
        fit_alpha(seen, config.alpha_queries) if preset.second_order else None for seen in joined
    ]
    if preset.per_head and joined and joined[0].layer.levels:
        tried = zip(joined, alpha, strict=True)
        trials = [_try_shares(seen, weight, preset, config) for seen, weight in tried]
        far_alpha = [trial.far_alpha for trial in trials]
        errors = torch.cat(list(map(_relative, trials, forest.layers_in)), 1)
        heads = forest.layer_of_head
        shares = allot(errors, config.trials.shares, heads, budgets, config.allotment)
        fitted = [
            fit_head_thresholds(seen, weight, preset, own, blocks, config.scores)
            for seen, weight, own in zip(joined, alpha, shares.split(forest.heads, 1), strict=True)
        ]
    else:
        far_alpha = [_far_alpha(preset, weight) for weight in alpha]
        fitted = fit_thresholds(joined, alpha, preset, budgets, blocks, config.scores)
    grids = [grid for grid in forest.apart(fitted) if grid is not None]
    per_token, per_block = (tuple(grid[kind] for grid in grids) for kind in range(2))
    of_layers = [tuple(forest.apart(found)) for found in (alpha, far_alpha)]
    return Calibration(preset, budgets, per_token, per_block, *of_layers)


def _relative(trial: Trials, layers: int) -> Tensor:
    """Errors `[S, Hkv]` over the mean squared output of their layer's heads."""
    norm, heads = trial.norms.unflatten(0, (layers, -1)).mean(1), trial.errors.shape[1]
    return trial.errors / norm.repeat_interleave(heads // layers, output_size=heads)


def _try_shares(
    seen: ObservedLayer, alpha: Tensor | None, preset: Preset, config: CalibrationConfig
) -> Trials:
    """How far the heads of a layer are from dense when all of them keep the same share."""
    shares = _placed(config.trials.shares, seen.queries.device).expand(-1, seen.layer.kv_heads)
    thresholds = fit_head_thresholds(seen, alpha, preset, shares, (1,), config.scores)[0].float()
    return try_out(seen, alpha, thresholds, preset.far_field, config.trials)


@cache
def _placed(shares: tuple[float, ...], device: torch.device) -> Tensor:
    """Shares `[S, 1]` on a device: copied once, for each copy waits for the device."""
    return torch.tensor(shares, dtype=torch.float64, device=device)[:, None]


def _far_alpha(preset: Preset, alpha: Tensor | None) -> Tensor | None:
    """That of the leaves, before any trial; zero where there is no tree."""
    if preset.far_field != "second_order" or alpha is None:
        return None
    return alpha[-1] if len(alpha) else alpha.new_zeros(alpha.shape[1])
