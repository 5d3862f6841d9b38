"""Drop-in mixture-of-experts layers and what training them needs."""

from robust_moe_kernels.modules.attack_mode import attack_mode
from robust_moe_kernels.modules.balance import BALANCE_LOSSES
from robust_moe_kernels.modules.gates import GATES, ConvGapGate, FixedGate, GapFcGate, TwoConvGate
from robust_moe_kernels.modules.general_path import general_path
from robust_moe_kernels.modules.linking import link_layers
from robust_moe_kernels.modules.mlp_layer import FusedMLPMoE
from robust_moe_kernels.modules.model import (
    balance_loss,
    check_finite,
    moe_layers,
    replace_blocks,
    replace_mlps,
)
from robust_moe_kernels.modules.moe_layer import FusedBlockMoE, FusedConvMoE
from robust_moe_kernels.modules.momentum import Momentum
from robust_moe_kernels.modules.over_ranks import batch_over_ranks
from robust_moe_kernels.modules.pruning import prune_experts
from robust_moe_kernels.modules.ranks import mean_over_ranks, rank_count, sum_over_ranks
from robust_moe_kernels.modules.route_control import (
    AllExperts,
    DropTop,
    FixedRoutes,
    RandomRoutes,
    SoftGradient,
    SwapTop,
    last_routes,
    only_expert,
    rerouted,
)
from robust_moe_kernels.modules.route_options import DrawnReroute, Reroute, RouteOptions
from robust_moe_kernels.modules.routed_layer import MoELayer
from robust_moe_kernels.modules.routing_record import RoutingRecord
from robust_moe_kernels.modules.sharded import whole_weights
from robust_moe_kernels.modules.shared_launches import shared_launches
from robust_moe_kernels.modules.token_gates import TOKEN_GATES, AdaptiveClusteringGate, LinearGate, NoisyTopKGate

__all__ = [
    "BALANCE_LOSSES",
    "GATES",
    "TOKEN_GATES",
    "AdaptiveClusteringGate",
    "AllExperts",
    "ConvGapGate",
    "DrawnReroute",
    "DropTop",
    "FixedGate",
    "FixedRoutes",
    "FusedBlockMoE",
    "FusedConvMoE",
    "FusedMLPMoE",
    "GapFcGate",
    "LinearGate",
    "MoELayer",
    "Momentum",
    "NoisyTopKGate",
    "RandomRoutes",
    "Reroute",
    "RouteOptions",
    "RoutingRecord",
    "SoftGradient",
    "SwapTop",
    "TwoConvGate",
    "attack_mode",
    "balance_loss",
    "batch_over_ranks",
    "check_finite",
    "general_path",
    "last_routes",
    "link_layers",
    "mean_over_ranks",
    "moe_layers",
    "only_expert",
    "prune_experts",
    "rank_count",
    "replace_blocks",
    "replace_mlps",
    "rerouted",
    "shared_launches",
    "sum_over_ranks",
    "whole_weights",
]
