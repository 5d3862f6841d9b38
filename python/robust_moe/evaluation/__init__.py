"""Evaluation: attacks in turn under one scorer, sanity checks, result files, figures."""

from robust_moe.evaluation.plots import plot_comparison, plot_routing, plot_training
from robust_moe.evaluation.results import make_results, make_samples, wilson_interval, write_results
from robust_moe.evaluation.sanity import Flag
from robust_moe.evaluation.scorer import EvalResult, LayerRouting, evaluate, predict, routing_shares
from robust_moe.evaluation.stages import Stage, SuiteResult, identity, plan
from robust_moe.evaluation.store import Journal, ResumeError
from robust_moe.evaluation.suite import run_suite
from robust_moe.evaluation.tables import attack_table, results_table

__all__ = [
    "EvalResult",
    "Flag",
    "Journal",
    "LayerRouting",
    "ResumeError",
    "Stage",
    "SuiteResult",
    "attack_table",
    "evaluate",
    "identity",
    "make_results",
    "make_samples",
    "plan",
    "plot_comparison",
    "plot_routing",
    "plot_training",
    "predict",
    "results_table",
    "routing_shares",
    "run_suite",
    "wilson_interval",
    "write_results",
]
