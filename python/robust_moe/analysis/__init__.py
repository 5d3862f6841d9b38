"""Certification and analysis: certified radii, the constants behind them, estimates, smoothing, the mixture's Jacobian.

Sound: :mod:`bounds`, :mod:`reach`, :mod:`lipschitz`, :mod:`enclosure` and what joins them, :func:`certify_mixture`.
True with a stated probability: :class:`Smoothed`. Not sound, and named so: :func:`estimate_lipschitz`,
:func:`estimate_radius`. Besides: the most robust single path of a mixture as a dense network, :mod:`paths`;
:func:`model_cost` counts the multiply-adds and parameters of one image.
"""

from robust_moe.analysis.bounds import (
    dual_radius,
    dual_radius_any_standard,
    hard_router_radius,
    mixture_margin,
    mixture_slope,
    moe_radius,
)
from robust_moe.analysis.certify import Certificate, certify_mixture, network_graphs
from robust_moe.analysis.cost import ModelCost, model_cost
from robust_moe.analysis.empirical import estimate_lipschitz, estimate_radius
from robust_moe.analysis.enclosure import Box, ball, gradient_bounds, layer_bounds, linear_bounds
from robust_moe.analysis.graph import Graph, lower
from robust_moe.analysis.jacobian import MixtureJacobian, mixture_jacobian
from robust_moe.analysis.lipschitz import (
    Probabilities,
    class_margins,
    enclose_probabilities,
    lipschitz_constants,
    norm_product,
    pair_rows,
)
from robust_moe.analysis.paths import expert_losses, extract_path, robust_path
from robust_moe.analysis.reach import router_reach
from robust_moe.analysis.smoothing import ABSTAIN, Smoothed, SmoothedCertificate, clopper_pearson_lower
from robust_moe.analysis.time_limit import OutOfTime, TimeLimit

__all__ = [
    "ABSTAIN",
    "Box",
    "Certificate",
    "Graph",
    "MixtureJacobian",
    "ModelCost",
    "OutOfTime",
    "Probabilities",
    "Smoothed",
    "SmoothedCertificate",
    "TimeLimit",
    "ball",
    "certify_mixture",
    "class_margins",
    "clopper_pearson_lower",
    "dual_radius",
    "dual_radius_any_standard",
    "enclose_probabilities",
    "estimate_lipschitz",
    "estimate_radius",
    "expert_losses",
    "extract_path",
    "gradient_bounds",
    "hard_router_radius",
    "layer_bounds",
    "linear_bounds",
    "lipschitz_constants",
    "lower",
    "mixture_jacobian",
    "mixture_margin",
    "mixture_slope",
    "model_cost",
    "moe_radius",
    "network_graphs",
    "norm_product",
    "pair_rows",
    "robust_path",
    "router_reach",
]
