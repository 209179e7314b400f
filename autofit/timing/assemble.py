"""Puts a step's time together: kernels, optimizer, host and collectives, with bounds that hold whatever overlaps."""

from __future__ import annotations

from dataclasses import dataclass, field

from autofit.spec.configuration import Configuration
from autofit.spec.deepspeed import bucket_settings
from autofit.spec.estimate import TimeEstimate
from autofit.spec.hardware import Cluster
from autofit.spec.job import Workload
from autofit.spec.profile import RegimeProfile
from autofit.timing.batches import micro_batch_shape, step_tokens
from autofit.timing.collectives import TrafficSeconds, step_traffic, traffic_seconds
from autofit.timing.hooks import HookSeconds, hook_seconds
from autofit.timing.kernels import MicroStepTime, MicroStepWork, micro_step_time, micro_step_work
from autofit.timing.offload import host_traffic
from autofit.timing.optimizer import NOT_TIMED, UPDATES, host_update_seconds, paged_bytes, update_bytes
from autofit.timing.parameters import ParameterTotals, parameter_totals
from autofit.timing.rates import (
    ARITHMETIC_SPREAD,
    COLLECTIVE_SPREAD,
    LAUNCH_SPREAD,
    MEMORY_SPREAD,
    Rates,
    known,
    missing_figures,
    nominal_rates,
    peak_flops_per_second,
    product_dtype,
    rates_of,
)

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


@dataclass(slots=True)
class TimeModel:
    """The times of one profile on one cluster, with what configurations share worked out once."""

    profile: RegimeProfile
    cluster: Cluster
    workload: Workload
    _work: MicroStepWork = field(init=False)
    _totals: ParameterTotals = field(init=False)
    _rates: dict[tuple[bool, int], Rates] = field(init=False, default_factory=dict)
    """By whether fp32 products may use TF32, and the number of devices."""
    _nominal: Rates = field(init=False)
    _micro_steps: dict[tuple[Rates, float, float], MicroStepTime] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._work = micro_step_work(self.profile)
        self._totals = parameter_totals(self.profile)
        self._nominal = nominal_rates(self.cluster)

    def time(self, configuration: Configuration) -> TimeEstimate:
        """Estimate one configuration."""
        if self.missing(configuration):
            return UNKNOWN
        tokens = step_tokens(self.workload, configuration)
        step = self._step(configuration, self._rates_of(configuration))
        return TimeEstimate(
            step_seconds=step.expected_seconds,
            step_seconds_lower=step.lower_seconds,
            step_seconds_upper=step.upper_seconds,
            tokens_per_second=tokens / step.expected_seconds,
            tokens_per_second_lower=tokens / step.upper_seconds,
            tokens_per_second_upper=tokens / step.lower_seconds,
            terms=step.terms,
            model_flops_utilization_fraction=self._utilization(configuration, step),
        )

    def missing(self, configuration: Configuration) -> tuple[str, ...]:
        """Say which figures are not known, and so why there is no time."""
        found = missing_figures(configuration, self._rates_of(configuration), self.cluster)
        if configuration.optim in NOT_TIMED:
            return (*found, NOT_TIMED[configuration.optim])
        if configuration.optim not in UPDATES:
            return (*found, f"what a step of {configuration.optim} moves")
        if configuration.sequence_parallel_size > 1:
            return (*found, "how long processes that share sequences take to exchange tokens for heads")
        return found

    def relative_work(self, configuration: Configuration) -> float:
        """Return a number without unit that orders configurations where times are not known.

        It is the time on a nominal device whose ratios of arithmetic to memory to network are assumed, and that
        communicates with the cores it computes with, so that nothing is hidden.
        """
        step = self._step(configuration, self._nominal)
        return step.expected_seconds + step.hidden_seconds * (1 - step.traffic.occupied_fraction)

    def _rates_of(self, configuration: Configuration) -> Rates:
        key = configuration.tf32, configuration.num_processes
        if key not in self._rates:
            self._rates[key] = rates_of(self.profile.regime, self.cluster, tf32=key[0], num_devices=key[1])
        return self._rates[key]

    def _step(self, configuration: Configuration, rates: Rates) -> StepTime:
        micro_step = self._micro_step(*micro_batch_shape(self.workload, configuration), rates)
        settings = bucket_settings(configuration, self.profile.hidden_size)
        traffic = step_traffic(self._totals, configuration, settings)
        moved, link = host_traffic(self._totals, configuration), rates.host_bytes_per_second
        paged = paged_bytes(self._totals, configuration)
        return StepTime(
            micro_step=micro_step,
            num_micro_steps=configuration.gradient_accumulation_steps,
            traffic=traffic_seconds(traffic, configuration, rates.fabric),
            hooks=hook_seconds(self._totals, configuration),
            optimizer_seconds=update_bytes(self._totals, configuration) / known(rates.memory_bytes_per_second),
            host_update_seconds=host_update_seconds(self._totals, configuration, rates.fabric.num_devices_per_node),
            paging_seconds=paged / known(link) if paged else 0.0,
            forward_host_seconds=moved.forward_bytes / known(link) if moved.forward_bytes else 0.0,
            backward_host_seconds=moved.backward_bytes / known(link) if moved.backward_bytes else 0.0,
            step_host_seconds=moved.step_bytes / known(link) if moved.step_bytes else 0.0,
        )

    def _micro_step(self, num_sequences: float, sequence_tokens: float, rates: Rates) -> MicroStepTime:
        key = (rates, num_sequences, sequence_tokens)
        if key not in self._micro_steps:
            self._micro_steps[key] = micro_step_time(self._work, num_sequences, sequence_tokens, rates)
        return self._micro_steps[key]

    def _utilization(self, configuration: Configuration, step: StepTime) -> float | None:
        """Return the model's FLOPs over what the device could do at its data sheet's dense peak in the same time.

        Counted as PaLM does (arXiv 2204.02311, appendix B): recomputation is no work of the model, and attention is the
        whole square. Of frozen weights no gradient is counted, which the 6 N of that formula has.
        """
        dtype = product_dtype(self.profile.regime, tf32=configuration.tf32)
        peak = peak_flops_per_second(self.cluster.device, dtype)
        if peak is None:
            return None
        return step.num_micro_steps * step.micro_step.model_flops / step.expected_seconds / peak


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """One optimizer step by the resource that each part of it occupies."""

    micro_step: MicroStepTime
    num_micro_steps: int
    traffic: TrafficSeconds
    hooks: HookSeconds
    optimizer_seconds: float
    host_update_seconds: float
    """Of offloaded parameters, on the host's processors."""
    paging_seconds: float
    forward_host_seconds: float
    backward_host_seconds: float
    step_host_seconds: float

    @property
    def launch_seconds(self) -> float:
        """What the host needs for a micro-step, to issue operations and to run the engine's hooks."""
        return self.micro_step.total("launch_seconds") + self.hooks.forward_seconds + self.hooks.backward_seconds

    @property
    def forward_seconds(self) -> float:
        """The host runs ahead of the device, so the slower of the two sets the pace."""
        each = self.micro_step.forward
        return max(each.device_seconds, each.launch_seconds + self.hooks.forward_seconds)

    @property
    def backward_seconds(self) -> float:
        """As in forward."""
        each = self.micro_step.backward
        return max(each.device_seconds, each.launch_seconds + self.hooks.backward_seconds)

    @property
    def communication_seconds(self) -> float:
        """All collectives."""
        traffic, num = self.traffic, self.num_micro_steps
        every = num * (traffic.forward_seconds + traffic.backward_seconds)
        return every + traffic.last_backward_seconds + traffic.step_seconds

    @property
    def offload_seconds(self) -> float:
        """All that crosses the link to the host for offload."""
        return self.num_micro_steps * (self.forward_host_seconds + self.backward_host_seconds) + self.step_host_seconds

    @property
    def hidden_seconds(self) -> float:
        """What of collectives, and of shards that come from the host for them, goes on behind kernels.

        A layer's weights come while the layer before computes, and its gradients leave while the next one does; the
        first and the last of them have nothing to hide behind.
        Source: Li et al. 2020 (PyTorch Distributed), section 3.2.3; Zhao et al. 2023 (PyTorch FSDP), section 3.3;
        deepspeed/runtime/zero/config.py, `overlap_comm`.
        """
        traffic, num = self.traffic, self.num_micro_steps
        if not traffic.overlaps:
            return 0.0
        forward = traffic.forward_seconds + self.forward_host_seconds
        backward = traffic.backward_seconds + self.backward_host_seconds
        last = backward + traffic.last_backward_seconds
        in_forward, in_backward, share = self.forward_seconds, self.backward_seconds, traffic.hidden_fraction
        hidden = num * min(share * forward, in_forward) + (num - 1) * min(share * backward, in_backward)
        return hidden + min(share * last, in_backward)

    @property
    def terms(self) -> dict[str, float]:
        """Seconds by what they are spent on, as if nothing overlapped."""
        num, micro = self.num_micro_steps, self.micro_step
        seconds = {
            "matmul": num * (micro.total("product_seconds") + micro.total("product_bytes_seconds")),
            "attention": num * micro.total("attention_seconds"),
            "memory": num * micro.total("memory_seconds"),
            "dequantization": num * micro.total("dequantization_seconds"),
            "launch": num * self.launch_seconds,
            "optimizer": self.optimizer_seconds + self.host_update_seconds,
            "paging": self.paging_seconds,
            "offload": self.offload_seconds + num * micro.total("host_link_seconds"),
            "communication": self.communication_seconds,
        }
        return {name: value for name, value in seconds.items() if value}

    @property
    def resources(self) -> tuple[tuple[float, tuple[float, float]], ...]:
        """Seconds that each resource is busy, with the spread of its published rates.

        They are the tensor cores, the device's memory, its host's processors issuing work, and updating what is
        offloaded, the link to the host, and the network.
        """
        num, micro = self.num_micro_steps, self.micro_step
        return (
            (num * micro.total("arithmetic_seconds"), ARITHMETIC_SPREAD),
            (num * micro.total("bytes_seconds") + self.optimizer_seconds, MEMORY_SPREAD),
            (num * self.launch_seconds, LAUNCH_SPREAD),
            (self.host_update_seconds, MEMORY_SPREAD),
            (self.offload_seconds + num * micro.total("host_link_seconds"), MEMORY_SPREAD),
            (self.communication_seconds, COLLECTIVE_SPREAD),
        )

    @property
    def lower_seconds(self) -> float:
        """Everything overlaps, no page was evicted, and every rate is the best that was published.

        Source: jax-ml/scaling-book roofline.md, T_lower = max of the resources.
        """
        return max(seconds * spread[0] for seconds, spread in self.resources)

    @property
    def upper_seconds(self) -> float:
        """Nothing overlaps, every page was evicted, and every rate is the worst that was published.

        Source: jax-ml/scaling-book roofline.md, T_upper = sum of the resources.
        """
        return sum(seconds * spread[1] for seconds, spread in self.resources) + self.paging_seconds

    @property
    def expected_seconds(self) -> float:
        """Kernels one after the other, and of what goes on beside them what cannot hide.

        A collective that is hidden still keeps multiprocessors from the kernels it hides behind.
        """
        hidden = self.hidden_seconds
        beside = self.communication_seconds + self.offload_seconds - hidden
        beside += hidden * self.traffic.occupied_fraction
        update = self.optimizer_seconds + self.host_update_seconds + self.paging_seconds
        return self.num_micro_steps * (self.forward_seconds + self.backward_seconds) + update + beside
