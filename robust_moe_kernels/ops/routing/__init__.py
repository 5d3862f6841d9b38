"""Routing: pairs sorted by expert."""

from robust_moe_kernels.ops.routing.op import ROUTING, Route, expect_route, sort_by_expert

__all__ = ["ROUTING", "Route", "expect_route", "sort_by_expert"]
