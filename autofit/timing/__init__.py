"""Seconds and dollars: a traced profile under one configuration on one cluster. Pure arithmetic."""

from autofit.timing.assemble import TimeModel, estimate_time
from autofit.timing.cost import estimate_cost, run_cost

__all__ = ["TimeModel", "estimate_cost", "estimate_time", "run_cost"]
