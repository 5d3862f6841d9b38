"""Scoring, result files and figures."""

from robust_moe.evaluation.plots import plot_comparison, plot_routing, plot_training
from robust_moe.evaluation.results import make_results, results_table, wilson_interval, write_results
from robust_moe.evaluation.scorer import EvalResult, LayerRouting, evaluate, predict, routing_shares

__all__ = [
    "EvalResult",
    "LayerRouting",
    "evaluate",
    "make_results",
    "plot_comparison",
    "plot_routing",
    "plot_training",
    "predict",
    "results_table",
    "routing_shares",
    "wilson_interval",
    "write_results",
]
