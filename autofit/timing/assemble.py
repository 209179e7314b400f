"""Puts a step's time together: kernels, optimizer, host and collectives, with bounds that hold whatever overlaps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from autofit.spec.configuration import Batching, Configuration, Optim
from autofit.spec.deepspeed import bucket_settings
from autofit.spec.estimate import TimeEstimate
from autofit.spec.hardware import Cluster
from autofit.spec.job import Workload
from autofit.spec.profile import RegimeProfile
from autofit.timing.batches import IN_STEP, micro_batch_shape, step_tokens
from autofit.timing.collectives import TrafficSeconds, step_traffic, traffic_seconds
from autofit.timing.copies import CopySeconds, copied_bytes, copy_seconds
from autofit.timing.hooks import HookSeconds, hook_seconds
from autofit.timing.kernels import (
    Amount,
    MicroStepTime,
    MicroStepWork,
    Seconds,
    micro_step_time,
    micro_step_times,
    micro_step_work,
)
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

Split = tuple[int, int]
"""Micro-batch and accumulation steps."""

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
    _known_passes: dict[tuple[Rates, int, Batching, bool, tuple[Split, ...]], Passes] = field(
        init=False, default_factory=dict
    )

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
        return step.expected_seconds + step.hidden_seconds * (1 - step.engine.traffic.occupied_fraction)

    def seconds(self, configuration: Configuration, optims: Sequence[Optim], splits: tuple[Split, ...]) -> Seconds:
        """Return `time(...).step_seconds` of every optimizer with every split of the batch, NaN where it is not known.

        The passes do not depend on the optimizer, and the rest on the split by the number of micro-steps alone.

        Args:
            configuration: all else.
            optims: one row for each.
            splits: one column for each.
        """
        each = [replace(configuration, optim=optim) for optim in optims]
        is_known = [not self.missing(one) for one in each]
        found = np.full((len(optims), len(splits)), np.nan)
        if any(is_known):
            timed = list(compress(each, is_known))
            found[is_known] = self._expected(timed, splits, self._rates_of(configuration))[0]
        return found

    def relative_works(
        self, configuration: Configuration, optims: Sequence[Optim], splits: tuple[Split, ...]
    ) -> Seconds:
        """Return `relative_work` of every optimizer with every split of the batch; see `seconds`."""
        each = [replace(configuration, optim=optim) for optim in optims]
        expected, hidden, traffic = self._expected(each, splits, self._nominal)
        return expected + hidden * (1 - traffic.occupied_fraction)

    def _expected(
        self, each: Sequence[Configuration], splits: tuple[Split, ...], rates: Rates
    ) -> tuple[Seconds, Seconds, TrafficSeconds]:
        """Return seconds of configurations that differ in the optimizer, those that are hidden, and of what."""
        engine, passes = self._engine(each[0], rates), self._passes(each[0], splits, rates)
        hooks = engine.hooks
        forward = _larger(
            passes.forward_seconds + engine.forward_device_seconds,
            passes.forward_launch_seconds + hooks.forward_seconds,
        )
        backward = _larger(
            passes.backward_seconds + engine.backward_device_seconds,
            passes.backward_launch_seconds + hooks.backward_seconds,
        )
        updates = [self._update(one, rates) for one in each]
        update = np.array([_update_seconds(**one) for one in updates])[:, None]
        hidden = engine.hidden_seconds(forward, backward, passes.num_micro_steps)
        expected = engine.expected_seconds(forward, backward, passes.num_micro_steps, update)
        return expected, hidden, engine.traffic

    def _rates_of(self, configuration: Configuration) -> Rates:
        key = configuration.tf32, configuration.num_processes
        if key not in self._rates:
            self._rates[key] = rates_of(self.profile.regime, self.cluster, tf32=key[0], num_devices=key[1])
        return self._rates[key]

    def _step(self, configuration: Configuration, rates: Rates) -> StepTime:
        return StepTime(
            micro_step=self._micro_step(*micro_batch_shape(self.workload, configuration), rates),
            num_micro_steps=configuration.gradient_accumulation_steps,
            engine=self._engine(configuration, rates),
        )

    def _engine(self, configuration: Configuration, rates: Rates) -> EngineTime:
        settings = bucket_settings(configuration, self.profile.hidden_size)
        traffic = step_traffic(self._totals, configuration, settings)
        moved, link = host_traffic(self._totals, configuration), rates.host_bytes_per_second
        return EngineTime(
            traffic=traffic_seconds(traffic, configuration, rates.fabric, known(rates.memory_bytes_per_second)),
            hooks=hook_seconds(self._totals, configuration),
            copies=copy_seconds(copied_bytes(self._totals, configuration), known(rates.memory_bytes_per_second)),
            forward_host_seconds=moved.forward_bytes / known(link) if moved.forward_bytes else 0.0,
            backward_host_seconds=moved.backward_bytes / known(link) if moved.backward_bytes else 0.0,
            step_host_seconds=moved.step_bytes / known(link) if moved.step_bytes else 0.0,
            **self._update(configuration, rates),
        )

    def _update(self, configuration: Configuration, rates: Rates) -> dict[str, float]:
        """Return the times that depend on the optimizer."""
        paged = paged_bytes(self._totals, configuration)
        on_node = rates.fabric.num_devices_per_node
        return {
            "optimizer_seconds": update_bytes(self._totals, configuration) / known(rates.memory_bytes_per_second),
            "host_update_seconds": host_update_seconds(self._totals, configuration, on_node),
            "paging_seconds": paged / known(rates.host_bytes_per_second) if paged else 0.0,
        }

    def _passes(self, configuration: Configuration, splits: tuple[Split, ...], rates: Rates) -> Passes:
        """Return forward and backward of every split, once for all engines that wait for each other alike."""
        waits = self.workload.lengths is not None and configuration.sharding in IN_STEP
        key = rates, configuration.num_processes, configuration.batching, waits, splits
        if key not in self._known_passes:
            shapes = [self._shape(configuration, split) for split in splits]
            forward, backward = micro_step_times(self._work, shapes, rates)
            self._known_passes[key] = Passes(
                forward_seconds=forward.device_seconds,
                backward_seconds=backward.device_seconds,
                forward_launch_seconds=forward.launch_seconds,
                backward_launch_seconds=backward.launch_seconds,
                num_micro_steps=np.array([float(num_micro_steps) for _, num_micro_steps in splits]),
            )
        return self._known_passes[key]

    def _shape(self, configuration: Configuration, split: Split) -> tuple[float, float]:
        if self.workload.lengths is None:
            return split[0], self.workload.sequence_tokens
        micro_batch, num_micro_steps = split
        one = replace(
            configuration, per_device_train_batch_size=micro_batch, gradient_accumulation_steps=num_micro_steps
        )
        return micro_batch_shape(self.workload, one)

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


class Passes(Struct, frozen=True, kw_only=True):
    """Forward and backward of a micro-batch, for each split of the batch."""

    forward_seconds: Seconds
    """Of the device's kernels."""
    backward_seconds: Seconds
    forward_launch_seconds: float
    """What the host needs to issue them."""
    backward_launch_seconds: float
    num_micro_steps: Seconds
    """Without unit."""


class EngineTime(Struct, frozen=True, kw_only=True):
    """What one optimizer step takes beside forward and backward, whatever its micro-batches are."""

    traffic: TrafficSeconds
    hooks: HookSeconds
    copies: CopySeconds
    optimizer_seconds: float
    host_update_seconds: float
    """Of offloaded parameters, on the host's processors."""
    paging_seconds: float
    forward_host_seconds: float
    backward_host_seconds: float
    step_host_seconds: float

    @property
    def update_seconds(self) -> float:
        """The optimizer's step."""
        return _update_seconds(self.optimizer_seconds, self.host_update_seconds, self.paging_seconds)

    @property
    def forward_device_seconds(self) -> float:
        """What the engine adds to the device's kernels in a forward pass."""
        return self.hooks.forward_waited_seconds + self.copies.forward_seconds

    @property
    def backward_device_seconds(self) -> float:
        """As in forward."""
        return self.hooks.backward_waited_seconds + self.copies.backward_seconds

    def communication_seconds(self, num_micro_steps: Amount) -> Amount:
        """All collectives."""
        traffic = self.traffic
        every = num_micro_steps * (traffic.forward_seconds + traffic.backward_seconds)
        return every + traffic.last_backward_seconds + traffic.step_seconds

    def offload_seconds(self, num_micro_steps: Amount) -> Amount:
        """All that crosses the link to the host for offload."""
        return num_micro_steps * (self.forward_host_seconds + self.backward_host_seconds) + self.step_host_seconds

    def hidden_seconds(self, forward_seconds: Amount, backward_seconds: Amount, num_micro_steps: Amount) -> Amount:
        """What of collectives, and of shards that come from the host for them, goes on behind kernels.

        A layer's weights come while the layer before computes, and its gradients leave while the next one does; the
        first and the last of them have nothing to hide behind.
        Source: Li et al. 2020 (PyTorch Distributed), section 3.2.3; Zhao et al. 2023 (PyTorch FSDP), section 3.3;
        deepspeed/runtime/zero/config.py, `overlap_comm`.
        """
        traffic = self.traffic
        if not traffic.overlaps:
            return 0.0 * num_micro_steps
        forward = traffic.forward_seconds + self.forward_host_seconds
        backward = traffic.backward_seconds + self.backward_host_seconds
        last = backward + traffic.last_backward_seconds
        share = traffic.hidden_fraction
        hidden = (num_micro_steps - 1) * _smaller(share * backward, backward_seconds)
        room = traffic.forward_room_fraction * forward_seconds
        hidden = hidden + num_micro_steps * _smaller(share * forward, room)
        return hidden + _smaller(share * last, backward_seconds)

    def expected_seconds(
        self, forward_seconds: Amount, backward_seconds: Amount, num_micro_steps: Amount, update_seconds: Amount
    ) -> Amount:
        """Kernels one after the other, and of what goes on beside them what cannot hide.

        A collective that is hidden still keeps multiprocessors from the kernels it hides behind.
        """
        hidden = self.hidden_seconds(forward_seconds, backward_seconds, num_micro_steps)
        beside = self.communication_seconds(num_micro_steps) + self.offload_seconds(num_micro_steps) - hidden
        beside = beside + hidden * self.traffic.occupied_fraction
        beside = beside + self.copies.some_seconds(num_micro_steps)
        return num_micro_steps * (forward_seconds + backward_seconds) + update_seconds + beside


def _update_seconds(optimizer_seconds: float, host_update_seconds: float, paging_seconds: float) -> float:
    return optimizer_seconds + host_update_seconds + paging_seconds


def _larger(amount: Amount, bound: float) -> Amount:
    larger: Amount = np.maximum(amount, bound)
    return larger


def _smaller(bound: float, amount: Amount) -> Amount:
    smaller: Amount = np.minimum(bound, amount)
    return smaller


class StepTime(Struct, frozen=True, kw_only=True):
    """One optimizer step by the resource that each part of it occupies."""

    micro_step: MicroStepTime
    num_micro_steps: int
    engine: EngineTime

    @property
    def launch_seconds(self) -> float:
        """What the host needs for a micro-step, to issue operations and to run the engine's hooks."""
        hooks = self.engine.hooks
        return self.micro_step.total("launch_seconds") + hooks.forward_seconds + hooks.backward_seconds

    @property
    def forward_seconds(self) -> float:
        """The host runs ahead of the device, so the slower of the two sets the pace, where it may."""
        each, hooks = self.micro_step.forward, self.engine.hooks
        device_seconds = each.device_seconds + self.engine.forward_device_seconds
        return max(device_seconds, each.launch_seconds + hooks.forward_seconds)

    @property
    def backward_seconds(self) -> float:
        """As in forward."""
        each, hooks = self.micro_step.backward, self.engine.hooks
        device_seconds = each.device_seconds + self.engine.backward_device_seconds
        return max(device_seconds, each.launch_seconds + hooks.backward_seconds)

    @property
    def communication_seconds(self) -> float:
        """All collectives."""
        return self.engine.communication_seconds(float(self.num_micro_steps))

    @property
    def offload_seconds(self) -> float:
        """All that crosses the link to the host for offload."""
        return self.engine.offload_seconds(float(self.num_micro_steps))

    @property
    def hidden_seconds(self) -> float:
        """What goes on behind kernels; see `EngineTime`."""
        num = float(self.num_micro_steps)
        return float(self.engine.hidden_seconds(self.forward_seconds, self.backward_seconds, num))

    @property
    def copy_seconds(self) -> float:
        """All copies of weights and gradients, and adding these up."""
        return float(self.engine.copies.seconds(float(self.num_micro_steps)))

    @property
    def expected_seconds(self) -> float:
        """Kernels, and what cannot hide behind them; see `EngineTime`."""
        num, update = float(self.num_micro_steps), self.engine.update_seconds
        return float(self.engine.expected_seconds(self.forward_seconds, self.backward_seconds, num, update))

    @property
    def terms(self) -> dict[str, float]:
        """Seconds by what they are spent on, as if nothing overlapped."""
        num, micro = self.num_micro_steps, self.micro_step
        seconds = {
            "matmul": num * (micro.total("product_seconds") + micro.total("product_bytes_seconds")),
            "attention": num * micro.total("attention_seconds"),
            "memory": num * micro.total("memory_seconds") + self.copy_seconds,
            "dequantization": num * micro.total("dequantization_seconds"),
            "launch": num * self.launch_seconds,
            "optimizer": self.engine.optimizer_seconds + self.engine.host_update_seconds,
            "paging": self.engine.paging_seconds,
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
            (num * micro.total("bytes_seconds") + self.copy_seconds + self.engine.optimizer_seconds, MEMORY_SPREAD),
            (num * self.launch_seconds, LAUNCH_SPREAD),
            (self.engine.host_update_seconds, MEMORY_SPREAD),
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
        return sum(seconds * spread[1] for seconds, spread in self.resources) + self.engine.paging_seconds
