"""Every setting, and every number that shapes an index, with its unit.

The records are frozen, and bad values raise here. A saved context holds all of `IndexConfig`, so it
says with what it was made; how much is worked on at once, which changes no result, is not among it.
"""

from squeezed.config.budget import DEFAULT_BUDGET, DEFAULT_NEW_TOKENS, check_budget
from squeezed.config.calibration import (
    ALPHA_RANGE,
    AllotmentConfig,
    CalibrationConfig,
    HistogramConfig,
    ProbeConfig,
    TrialConfig,
)
from squeezed.config.clustering import ClusteringConfig, SpaceConfig
from squeezed.config.growth import FOLD_AT, LEAST_FOLDED, GrowthConfig
from squeezed.config.index import IndexConfig
from squeezed.config.preset import BEST, FAR_FIELDS, PAPER, PRESETS, FarField, Preset
from squeezed.config.rows import ROWS, RowsName, check_rows

__all__ = [
    "ALPHA_RANGE",
    "BEST",
    "DEFAULT_BUDGET",
    "DEFAULT_NEW_TOKENS",
    "FAR_FIELDS",
    "FOLD_AT",
    "LEAST_FOLDED",
    "PAPER",
    "PRESETS",
    "ROWS",
    "AllotmentConfig",
    "CalibrationConfig",
    "ClusteringConfig",
    "FarField",
    "GrowthConfig",
    "HistogramConfig",
    "IndexConfig",
    "Preset",
    "ProbeConfig",
    "RowsName",
    "SpaceConfig",
    "TrialConfig",
    "check_budget",
    "check_rows",
]
