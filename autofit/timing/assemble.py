"""Puts a step's time together: kernels, optimizer and collectives, with bounds that hold whatever overlaps."""

from __future__ import annotations

from dataclasses import dataclass, field

from autofit.spec.configuration import Configuration
from autofit.spec.deepspeed import bucket_settings
from autofit.spec.estimate import CostEstimate, TimeEstimate
from autofit.spec.hardware import Cluster
from autofit.spec.job import Workload
from autofit.spec.profile import RegimeProfile
from autofit.timing.batches import micro_batch_shape, step_tokens
from autofit.timing.collectives import step_traffic_bytes
from autofit.timing.kernels import MicroStepTime, micro_step_time
from autofit.timing.optimizer import paged_bytes, update_bytes
from autofit.timing.parameters import ParameterTotals, parameter_totals
from autofit.timing.rates import NOMINAL_RATES, Rates, known, missing_figures, rates_of

UNKNOWN = TimeEstimate(
    step_seconds=None,
    step_seconds_lower=None,
    step_seconds_upper=None,
    tokens_per_second=None,
    tokens_per_second_lower=None,
    tokens_per_second_upper=None,
    terms={},
)


def estimate_time(
    profile: RegimeProfile, configuration: Configuration, cluster: Cluster, workload: Workload
) -> TimeEstimate:
    """Estimate the time of one optimizer step; every figure is None where the hardware's are not known."""
    return TimeModel(profile, cluster, workload).time(configuration)


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
    hours = time.step_seconds / 3600 * configuration.num_processes / tokens * 1e6
    return CostEstimate(
        dollars_per_million_tokens=None if dollars is None else hours * dollars,
        device_hours_per_million_tokens=hours,
        dollars_per_device_hour=dollars,
    )


@dataclass(slots=True)
class TimeModel:
    """The times of one profile on one cluster, with each micro-batch's kernels added up once."""

    profile: RegimeProfile
    cluster: Cluster
    workload: Workload
    _rates: Rates = field(init=False)
    _totals: ParameterTotals = field(init=False)
    _micro_steps: dict[tuple[Rates, float, float], MicroStepTime] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._rates = rates_of(self.profile.regime, self.cluster)
        self._totals = parameter_totals(self.profile)

    def time(self, configuration: Configuration) -> TimeEstimate:
        """Estimate one configuration."""
        if self.missing(configuration):
            return UNKNOWN
        tokens = step_tokens(self.workload, configuration)
        step = self._step(configuration, self._rates)
        return TimeEstimate(
            step_seconds=step.expected_seconds,
            step_seconds_lower=step.lower_seconds,
            step_seconds_upper=step.upper_seconds,
            tokens_per_second=tokens / step.expected_seconds,
            tokens_per_second_lower=tokens / step.upper_seconds,
            tokens_per_second_upper=tokens / step.lower_seconds,
            terms=step.terms,
        )

    def missing(self, configuration: Configuration) -> tuple[str, ...]:
        """Say which figures of the hardware are not known, and so why there is no time."""
        return missing_figures(configuration, self._rates, self.cluster)

    def relative_work(self, configuration: Configuration) -> float:
        """Return a number without unit that orders configurations where times are not known.

        It is the time on a nominal device whose ratios of arithmetic to memory to network are assumed, and that
        communicates with the cores it computes with, so that nothing is hidden.
        """
        step = self._step(configuration, NOMINAL_RATES)
        return step.expected_seconds + step.hidden_communication_seconds

    def _step(self, configuration: Configuration, rates: Rates) -> StepTime:
        micro_step = self._micro_step(*micro_batch_shape(self.workload, configuration), rates)
        overlaps = bucket_settings(configuration, self.profile.hidden_size).overlap_comm
        return step_time(self._totals, configuration, rates, micro_step, overlaps_collectives=overlaps)

    def _micro_step(self, num_sequences: float, sequence_tokens: float, rates: Rates) -> MicroStepTime:
        key = (rates, num_sequences, sequence_tokens)
        if key not in self._micro_steps:
            self._micro_steps[key] = micro_step_time(self.profile, num_sequences, sequence_tokens, rates)
        return self._micro_steps[key]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """One optimizer step by the resource that each part of it occupies."""

    micro_step: MicroStepTime
    num_micro_steps: int
    optimizer_seconds: float
    paging_seconds: float
    communication_seconds: float
    hidden_communication_seconds: float
    """What of the communication goes on behind kernels."""

    @property
    def terms(self) -> dict[str, float]:
        """Seconds by what they are spent on; their sum is the upper bound."""
        num, micro = self.num_micro_steps, self.micro_step
        seconds = {
            "matmul": num * micro.matmul_seconds,
            "memory": num * micro.memory_seconds,
            "dequantization": num * micro.dequantization_seconds,
            "launch": num * micro.launch_seconds,
            "optimizer": self.optimizer_seconds,
            "paging": self.paging_seconds,
            "communication": self.communication_seconds,
        }
        return {name: value for name, value in seconds.items() if value}

    @property
    def lower_seconds(self) -> float:
        """Everything overlaps, no page was evicted: the busiest of arithmetic, memory, host and network.

        Source: jax-ml/scaling-book roofline.md, T_lower = max of the resources.
        """
        num, micro = self.num_micro_steps, self.micro_step
        memory = num * (micro.memory_seconds + micro.dequantization_seconds) + self.optimizer_seconds
        return max(num * micro.matmul_seconds, memory, num * micro.launch_seconds, self.communication_seconds)

    @property
    def upper_seconds(self) -> float:
        """Nothing overlaps, every page was evicted.

        Source: jax-ml/scaling-book roofline.md, T_upper = sum of the resources.
        """
        return sum(self.terms.values())

    @property
    def expected_seconds(self) -> float:
        """Kernels one after the other, and of the communication what cannot go on behind them."""
        exposed = self.communication_seconds - self.hidden_communication_seconds
        return self.num_micro_steps * self.micro_step.seconds + self.optimizer_seconds + self.paging_seconds + exposed


def step_time(
    totals: ParameterTotals,
    configuration: Configuration,
    rates: Rates,
    micro_step: MicroStepTime,
    *,
    overlaps_collectives: bool,
) -> StepTime:
    """Time one optimizer step; whatever rate it needs is known.

    Args:
        totals: of the model's parameters.
        configuration: what is timed.
        rates: of the device and its links.
        micro_step: of one micro-batch.
        overlaps_collectives: DeepSpeed's `overlap_comm`.
    """
    traffic, paged = step_traffic_bytes(totals, configuration), paged_bytes(totals, configuration)
    communication = traffic / known(rates.collective_bytes_per_second) if traffic else 0.0
    cover = _cover_seconds(configuration, micro_step, overlaps_collectives=overlaps_collectives)
    return StepTime(
        micro_step=micro_step,
        num_micro_steps=configuration.gradient_accumulation_steps,
        optimizer_seconds=update_bytes(totals, configuration) / known(rates.memory_bytes_per_second),
        paging_seconds=paged / known(rates.host_bytes_per_second) if paged else 0.0,
        communication_seconds=communication,
        hidden_communication_seconds=min(communication, cover),
    )


def _cover_seconds(configuration: Configuration, micro_step: MicroStepTime, *, overlaps_collectives: bool) -> float:
    """Return how long kernels run that communication can hide behind.

    DDP reduces buckets while the last backward goes on; DeepSpeed overlaps only where `overlap_comm` is on, and then
    stage 3 gathers and reduces during all of forward and backward.
    Source: Li et al. 2020 (PyTorch Distributed), section 3.2.3; deepspeed/runtime/zero/config.py.
    """
    if configuration.sharding == "ddp":
        return micro_step.backward_seconds
    if configuration.uses_deepspeed and overlaps_collectives:
        return configuration.gradient_accumulation_steps * micro_step.device_seconds
    return 0.0
