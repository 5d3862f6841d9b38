"""Evaluation: attacks in turn under one scorer, sanity checks, result files, figures.

What draws is imported when it is asked for: matplotlib takes as long to import as all else here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from robust_moe.evaluation.accuracy import EvalResult, accuracy, routing_shares
from robust_moe.evaluation.backdoor import backdoor_report
from robust_moe.evaluation.curve import curve_radii, error_curve
from robust_moe.evaluation.moe import evaluate_moe, run_moe
from robust_moe.evaluation.outcome import Flag, Stage, StageResult, SuiteResult
from robust_moe.evaluation.presets import PRESETS, PresetEvaluation, preset_stages
from robust_moe.evaluation.pruning import keep_highest, pruning_curve
from robust_moe.evaluation.results import (
    make_results,
    make_samples,
    read_results,
    samples_file,
    wilson_interval,
    write_results,
)
from robust_moe.evaluation.robustbench import robustbench_json
from robust_moe.evaluation.sanity import curve_flag
from robust_moe.evaluation.scorer import LayerRouting, predict
from robust_moe.evaluation.staged import StagedEvaluation, Task
from robust_moe.evaluation.stages import identity, plan
from robust_moe.evaluation.store import Journal, ResumeError
from robust_moe.evaluation.suite import run_suite, with_stages
from robust_moe.evaluation.tables import attack_table, results_table
from robust_moe.evaluation.vmoe import vmoe_curve
from robust_moe.lazy import lazily

if TYPE_CHECKING:
    from robust_moe.evaluation.html_report import write_report
    from robust_moe.evaluation.plots import plot_comparison, plot_routing, plot_training

__all__ = [
    "PRESETS",
    "EvalResult",
    "Flag",
    "Journal",
    "LayerRouting",
    "PresetEvaluation",
    "ResumeError",
    "Stage",
    "StageResult",
    "StagedEvaluation",
    "SuiteResult",
    "Task",
    "accuracy",
    "attack_table",
    "backdoor_report",
    "curve_flag",
    "curve_radii",
    "error_curve",
    "evaluate_moe",
    "identity",
    "keep_highest",
    "make_results",
    "make_samples",
    "plan",
    "plot_comparison",
    "plot_routing",
    "plot_training",
    "predict",
    "preset_stages",
    "pruning_curve",
    "read_results",
    "results_table",
    "robustbench_json",
    "routing_shares",
    "run_moe",
    "run_suite",
    "samples_file",
    "vmoe_curve",
    "wilson_interval",
    "with_stages",
    "write_report",
    "write_results",
]

_DRAWING = {
    "plot_comparison": "plots",
    "plot_routing": "plots",
    "plot_training": "plots",
    "write_report": "html_report",
}
__getattr__ = lazily(__name__, _DRAWING)
