"""The training engine: loop, checkpoints, metrics.

The loop is imported when it is asked for: Lightning Fabric takes longer to import than all else here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from robust_moe.engine.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from robust_moe.engine.cost import epochs_within, passes_of_run
from robust_moe.engine.ema import WeightAverage
from robust_moe.engine.log import MetricLog, read_metrics
from robust_moe.engine.progress import Reporter
from robust_moe.lazy import lazily

if TYPE_CHECKING:
    from robust_moe.engine.processes import LostProcessError
    from robust_moe.engine.trainer import Trainer, TrainResult

__all__ = [
    "CheckpointError",
    "LostProcessError",
    "MetricLog",
    "Reporter",
    "TrainResult",
    "Trainer",
    "WeightAverage",
    "epochs_within",
    "load_checkpoint",
    "passes_of_run",
    "read_metrics",
    "save_checkpoint",
]

_TRAINING = {"LostProcessError": "processes", "TrainResult": "trainer", "Trainer": "trainer"}
__getattr__ = lazily(__name__, _TRAINING)
