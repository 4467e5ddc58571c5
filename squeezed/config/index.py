"""Everything that `squeezed.index` decides."""

from __future__ import annotations

from dataclasses import dataclass, field

from squeezed.config.budget import rising
from squeezed.config.calibration import CalibrationConfig
from squeezed.config.clustering import ClusteringConfig
from squeezed.config.preset import BEST, PAPER, Preset
from squeezed.config.rows import RowsName, check_rows
from squeezed.errors import SqueezedError, expect, whole

SEQUENCE = (tuple, list)


@dataclass(frozen=True)
class IndexConfig:
    """Everything that `squeezed.index` decides."""

    clustering: ClusteringConfig = field(default_factory=ClusteringConfig)
    presets: tuple[Preset, ...] = (PAPER, BEST)
    budgets: tuple[float, ...] = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75)
    prefill_chunk: int = 1024  # document tokens per forward pass
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    rows: RowsName = "plain"  # how keys and values are written (DESIGN.md)

    def __post_init__(self) -> None:
        wanted = "presets such as squeezed.config.BEST"
        expect("clustering", self.clustering, ClusteringConfig, "a ClusteringConfig")
        object.__setattr__(
            self, "presets", tuple(expect("presets", self.presets, SEQUENCE, wanted))
        )
        for preset in self.presets:
            expect("presets", preset, Preset, wanted)
        if len({preset.name for preset in self.presets}) < max(1, len(self.presets)):
            raise SqueezedError(f"presets: expected {wanted}, each once, got {self.presets}")
        whole("prefill_chunk", self.prefill_chunk, 1)
        object.__setattr__(self, "budgets", rising("budgets", self.budgets))
        check_rows(self.rows)
        expect("calibration", self.calibration, CalibrationConfig, "a CalibrationConfig")
