"""Dollars and hours of a time. Pure arithmetic."""

from __future__ import annotations

from autofit.spec.configuration import Configuration
from autofit.spec.estimate import CostEstimate, EpochEstimate, RunCost, TimeEstimate
from autofit.spec.hardware import Cluster
from autofit.spec.job import RunLength, Workload
from autofit.timing.batches import step_tokens

SECONDS_PER_HOUR = 3600


def estimate_cost(
    time: TimeEstimate, cluster: Cluster, workload: Workload, configuration: Configuration
) -> CostEstimate:
    """Price the tokens of a step by the hours of all devices that make it."""
    dollars = cluster.device.dollars_per_hour
    tokens = step_tokens(workload, configuration)
    if time.step_seconds is None:
        return CostEstimate(
            dollars_per_million_tokens=None, device_hours_per_million_tokens=None, dollars_per_device_hour=dollars
        )
    hours = time.step_seconds / SECONDS_PER_HOUR * configuration.num_processes / tokens * 1e6
    return CostEstimate(
        dollars_per_million_tokens=None if dollars is None else hours * dollars,
        device_hours_per_million_tokens=hours,
        dollars_per_device_hour=dollars,
    )


def run_cost(
    run: RunLength, time: TimeEstimate, cost: CostEstimate, epoch: EpochEstimate | None, num_devices: int
) -> RunCost:
    """Say how long a run takes and what it costs: its steps, without loading, evaluation or saving.

    Args:
        run: tokens to train, padding not counted, or epochs.
        time: of a step.
        cost: its price.
        epoch: of the data; needed for a number of epochs.
        num_devices: that are paid for.
    """
    if run.tokens is not None:
        tokens, speed = run.tokens, time.tokens_per_second
        seconds = None if speed is None else tokens / speed
    else:
        assert epoch is not None, "epochs are asked for only where the data is known"
        assert run.epochs is not None, "a run has a length"
        tokens = run.epochs * epoch.tokens
        seconds = None if epoch.seconds is None else run.epochs * epoch.seconds
    hours = None if seconds is None else seconds / SECONDS_PER_HOUR
    device_hours = None if hours is None else hours * num_devices
    price = cost.dollars_per_device_hour
    dollars = None if device_hours is None or price is None else device_hours * price
    return RunCost(tokens=tokens, hours=hours, device_hours=device_hours, dollars=dollars)
