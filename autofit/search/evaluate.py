"""Memory and time of many configurations of one job, with what they share worked out once."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import compress
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
from msgspec import Struct
from msgspec.structs import replace

from autofit.errors import InputError
from autofit.memory.alloc_conf import expandable_segments_problem
from autofit.memory.assemble import MemoryModel
from autofit.memory.uncertainty import interval, run_kind
from autofit.search.ahead import Ahead
from autofit.search.allowed import Mask
from autofit.search.calibrated import calibrated_memory, calibrated_time, calibration_for, uncalibrated
from autofit.search.space import Block, Split
from autofit.spec.calibration import Calibration, Uncalibrated
from autofit.spec.configuration import Configuration, Optim
from autofit.spec.estimate import STAGES, MemoryEstimate, Stage, StageName, TimeEstimate
from autofit.spec.hardware import Cluster
from autofit.spec.job import Workload
from autofit.spec.profile import ProfileSet, Regime, RegimeProfile
from autofit.spec.regimes import regime_of
from autofit.timing import TimeModel

HEADROOM_FRACTION = 0.03
"""Share of a device's memory that a plan leaves free.

An underestimate costs a run, an overestimate a little speed. Source: assumed; three times the error aimed at for
allocated memory, and room for what no trace holds: an evaluation, another process on the device.
"""

Misfit = Literal["none", "device memory", "host memory", "fragmentation"] | StageName
"""What of a configuration does not fit; `fragmentation`: its tensors would, but not as the allocator lays them out."""
MISFITS: tuple[Misfit, ...] = ("none", "device memory", "host memory", "fragmentation", *STAGES)


class MemoryEstimator(Protocol):
    """Estimates the memory of one configuration, as `autofit.memory.assemble.estimate_memory` does."""

    def __call__(
        self,
        profile: RegimeProfile,
        configuration: Configuration,
        cluster: Cluster,
        workload: Workload,
        *,
        replays: bool = False,
    ) -> MemoryEstimate:
        """Estimate; `replays` asks for the reserved figure, which takes longer."""
        ...


_Looked = tuple[tuple[Configuration, Misfit], dict[Configuration, MemoryEstimate]]
"""How a configuration fits, and what was replayed to see that."""


class Evaluated(Struct, frozen=True, kw_only=True):
    """A configuration with what it needs and takes."""

    configuration: Configuration
    memory: MemoryEstimate
    time: TimeEstimate
    misfit: Misfit

    @property
    def fits(self) -> bool:
        """Whether it may be chosen."""
        return self.misfit == "none"

    @property
    def needed_bytes(self) -> int:
        """What decides whether it fits."""
        return self.memory.needed_bytes


class EvaluatedBlock(Struct, frozen=True, kw_only=True, eq=False):
    """What is left of a block, one figure for each of its configurations."""

    number: int
    """Its place among the blocks."""
    optim: npt.NDArray[np.intp]
    split: npt.NDArray[np.intp]
    needed_bytes: npt.NDArray[np.int64]
    risky_bytes: npt.NDArray[np.int64]
    misfit: npt.NDArray[np.int8]
    seconds: npt.NDArray[np.float64]


def usable_bytes(budget_bytes: int) -> int:
    """Return what of a device's memory a plan may need."""
    return int(budget_bytes * (1 - HEADROOM_FRACTION))


def leaves_headroom(memory: MemoryEstimate) -> bool:
    """Tell whether a device holds a configuration with room to spare."""
    return memory.needed_bytes <= usable_bytes(memory.budget_bytes)


def misfit_of(memory: MemoryEstimate, cluster: Cluster) -> Misfit:
    """Say whether device and, where it is known, host hold a configuration, with room to spare on the device."""
    if not leaves_headroom(memory):
        return "device memory"
    host = cluster.host_memory_bytes
    return "host memory" if host is not None and (memory.host_bytes or 0) > host else "none"


def stage_misfit(memory: MemoryEstimate, cluster: Cluster, held: Iterable[StageName]) -> StageName | None:
    """Name the first of some stages that is known not to fit, on the device beside its context or on a node's host."""
    context = 0 if memory.process_bytes is None else memory.process_bytes - (memory.peak_reserved_bytes or 0)
    on_device, on_host = usable_bytes(memory.budget_bytes) - context, cluster.host_memory_bytes
    for name in held if memory.stages else ():
        stage: Stage | None = getattr(memory.stages, name)
        if stage is None:
            continue
        if stage.device_bytes > on_device or (on_host is not None and (stage.host_bytes or 0) > on_host):
            return name
    return None


EvalBatch = Literal["given", "free", "least"]


class Evaluator:
    """Evaluates configurations of one workload on one cluster.

    Args:
        cluster: what they run on.
        workload: what they train.
        profiles: traced steps, by regime.
        micro_batches: every micro-batch that will be asked for.
        estimate_memory: takes the place of the memory model; for tests.
        held_stages: what has to fit besides the steady steps.
        eval_batch: whether evaluations keep the batch that they are given, or may run on no more than training's
            micro-batch: where it is too large, or at once.
    """

    def __init__(
        self,
        cluster: Cluster,
        workload: Workload,
        profiles: ProfileSet,
        micro_batches: Sequence[int],
        estimate_memory: MemoryEstimator | None = None,
        *,
        held_stages: tuple[StageName, ...] = STAGES,
        eval_batch: EvalBatch = "given",
    ) -> None:
        self._cluster, self._workload, self._profiles = cluster, workload, profiles
        self._held_stages, self._eval_batch = held_stages, eval_batch
        # A model that has such modules has been traced with them.
        self._fp32_modules = frozenset(each.fp32_modules_beside for each in profiles if each.fp32_modules_beside)
        self._micro_batches = tuple(sorted(set(micro_batches)))
        self._estimate_memory = estimate_memory
        self._times: dict[tuple[Regime, int], TimeModel] = {}
        self._memories: dict[Regime, MemoryModel] = {}
        self._replays: dict[Configuration, MemoryEstimate] = {}
        self._trainings: dict[Configuration, MemoryEstimate] = {}
        self._found: dict[Configuration, tuple[Configuration, Misfit]] = {}
        self._ahead: Ahead[Configuration, _Looked] | None = None

    def for_length(self, sequence_tokens: int) -> Evaluator:
        """Return an evaluator of the same configurations for sequences cut at another length."""
        workload = replace(self._workload, sequence_tokens=sequence_tokens)
        return Evaluator(
            self._cluster,
            workload,
            self._profiles,
            self._micro_batches,
            self._estimate_memory,
            held_stages=self._held_stages,
            eval_batch=self._eval_batch,
        )

    @property
    def frees_evaluation(self) -> bool:
        """Whether evaluations may run on a smaller batch than they are given."""
        return self._eval_batch != "given"

    @property
    def can_grow_segments(self) -> bool:
        """Whether the devices can have `expandable_segments`, as far as this machine tells."""
        is_wsl = "microsoft" in platform.release().lower()
        problem = expandable_segments_problem(self._cluster.device, is_linux=sys.platform == "linux", is_wsl=is_wsl)
        return problem is None

    @property
    def budget_bytes(self) -> int:
        """What each device has."""
        return self._cluster.device.memory_bytes

    def refuse_length(self, configuration: Configuration) -> None:
        """Refuse a length that the profile of a configuration's code path does not hold for.

        Raises:
            InputError: it does not.
        """
        refuse_length(self._profiles[self._regime(configuration)], self._workload.sequence_tokens)

    def profile(self, configuration: Configuration) -> RegimeProfile | None:
        """Return the profile of a configuration's code path, None where it was not traced."""
        return self._profiles.get(self._regime(configuration))

    def versions(self, configuration: Configuration) -> Mapping[str, str]:
        """Return the releases that a configuration's code path was traced under."""
        return self._known_profile(configuration).versions

    def evaluate(self, configuration: Configuration) -> Evaluated:
        """Estimate memory and time of a configuration whose profile is there."""
        memory = self._memory(configuration, replays=False)
        return Evaluated(
            configuration=configuration,
            memory=memory,
            time=self._time(configuration),
            misfit=misfit_of(memory, self._cluster_of(configuration)),
        )

    def evaluate_block(self, number: int, block: Block, mask: Mask) -> EvaluatedBlock:
        """Evaluate what is left of a block whose profile is there.

        Raises:
            InputError: it is not modelled.
        """
        optim, split = np.nonzero(mask)
        device, host = self._needs(block, mask)
        misfit = np.zeros(len(optim), dtype=np.int8)
        available = self._cluster.host_memory_bytes
        if available is not None:
            misfit[host > available] = MISFITS.index("host memory")
        misfit[device > usable_bytes(self.budget_bytes)] = MISFITS.index("device memory")
        return EvaluatedBlock(
            number=number,
            optim=optim,
            split=split,
            needed_bytes=device,
            risky_bytes=(device * self._risk(block.first)).astype(np.int64),
            misfit=misfit,
            seconds=self._seconds(block, mask),
        )

    def _seconds(self, block: Block, mask: Mask) -> npt.NDArray[np.float64]:
        calibration = self.calibration(block.first)
        factor = 1.0 if calibration is None else calibration.time.factor
        return self._by_split(block, mask, self._time_model(block.first).seconds) * factor

    def relative_works(self, block: Block, mask: Mask) -> npt.NDArray[np.float64]:
        """Return what orders the configurations left of a block where a time is not known."""
        return self._by_split(block, mask, self._time_model(block.first).relative_works)

    def _needs(self, block: Block, mask: Mask) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the bytes of device and host of what is left of a block.

        A calibration corrects phases, each by what is in it: with one every configuration is estimated by itself.
        """
        if self._estimate_memory is not None or self.calibration(block.first) is not None:
            estimates = [
                self._memory(block.configuration(optim, split), replays=False) for optim, split in np.argwhere(mask)
            ]
            return (
                np.array([each.needed_bytes for each in estimates], dtype=np.int64),
                np.array([each.host_bytes or 0 for each in estimates], dtype=np.int64),
            )
        rows: Mask = np.any(mask, axis=1)
        optims = list(compress(block.optims, rows.tolist()))
        cluster = self._cluster_of(block.first)
        needs = self._memory_model(block.first).needs(block.first, cluster, optims, block.splits)
        return needs.device_bytes[mask[rows]], needs.host_bytes[mask[rows]]

    def _by_split(
        self,
        block: Block,
        mask: Mask,
        seconds: Callable[[Configuration, Sequence[Optim], tuple[Split, ...]], npt.NDArray[np.float64]],
    ) -> npt.NDArray[np.float64]:
        rows: Mask = np.any(mask, axis=1)
        return seconds(block.first, list(compress(block.optims, rows.tolist())), block.splits)[mask[rows]]

    def _risk(self, configuration: Configuration) -> float:
        """Return by how much memory may be more than was predicted, if a run is as far off as any of its kind was."""
        kind = run_kind(self._regime(configuration), is_sharded=configuration.num_processes > 1)
        found = interval("process" if self._cluster.device.kind == "cuda" else "peak_allocated", kind)
        return 1.0 if found is None else found.high

    def replay(self, configuration: Configuration) -> MemoryEstimate:
        """Estimate memory with every allocation sent through torch's allocator policy: exact, and slow."""
        if configuration not in self._replays:
            self._remember(configuration, self._memory(configuration, replays=True))
        return self._replays[configuration]

    def as_it_fits(self, configuration: Configuration) -> tuple[Configuration, Misfit]:
        """Return a configuration as it fits when replayed, or what of it does not fit.

        As it is; or with what changes no result: evaluations on training's micro-batch, and segments that grow.
        """
        if configuration not in self._found:
            looked = None if self._ahead is None else self._ahead.get(configuration)
            found, replays = looked or (self._as_it_fits(configuration), {})
            for replayed, memory in replays.items():
                self._remember(replayed, memory)
            self._found[configuration] = found
        return self._found[configuration]

    @contextmanager
    def looking_ahead(self, configurations: Iterable[Configuration], num_cores: int) -> Iterator[None]:
        """Look on other cores how these fit, in the order in which that will be asked; it may be asked of others too.

        Args:
            configurations: what is likely to be asked.
            num_cores: how many processes may work, this one among them.
        """
        with Ahead(self._look, configurations, num_cores) as self._ahead:
            yield
        self._ahead = None

    def _look(self, configuration: Configuration) -> _Looked:
        known, self._replays = self._replays, {}
        found, replays = self._as_it_fits(configuration), self._replays
        self._replays = known
        return found, replays

    def _remember(self, configuration: Configuration, memory: MemoryEstimate) -> None:
        self._replays[configuration] = self._trainings[configuration.training_alone] = memory

    def _as_it_fits(self, configuration: Configuration) -> tuple[Configuration, Misfit]:
        if self._eval_batch == "least":
            configuration = self.evaluating_less(configuration)
        if self.can_grow_segments and self.is_fragmented(configuration):
            configuration = replace(configuration, expandable_segments=True)
        misfit = self.replayed_misfit(configuration)
        if misfit == "evaluation":
            configuration = self.evaluating_less(configuration)
            misfit = self.replayed_misfit(configuration)
        if misfit == "fragmentation" and self.can_grow_segments:  # which is asked last: stages do not depend on it
            configuration = replace(configuration, expandable_segments=True)
            misfit = self.replayed_misfit(configuration)
        return configuration, misfit

    def evaluating_less(self, configuration: Configuration) -> Configuration:
        """Return a configuration that evaluates on no more than training's micro-batch, where nobody fixed that."""
        if not self.frees_evaluation:
            return configuration
        smaller = min(configuration.per_device_train_batch_size, configuration.per_device_eval_batch_size)
        return replace(configuration, evaluation=replace(configuration.evaluation, per_device_eval_batch_size=smaller))

    def is_fragmented(self, configuration: Configuration) -> bool:
        """Tell whether replaying every allocation shows soon that a configuration does not fit.

        False also where only `replayed_misfit` tells.
        """
        if self._estimate_memory is not None or self.calibration(configuration) is not None:
            return False
        cluster = self._cluster_of(configuration)
        model = self._memory_model(configuration)
        return not model.suffices(configuration, cluster, usable_bytes(cluster.device.memory_bytes))

    def replayed_misfit(self, configuration: Configuration) -> Misfit:
        """Say what does not fit when every allocation is replayed, and which of the stages that have to."""
        memory = self.replay(configuration)
        stage = stage_misfit(memory, self._cluster_of(configuration), self._held_stages)
        if stage is not None:
            return stage
        return "none" if leaves_headroom(memory) else "fragmentation"

    def calibration(self, configuration: Configuration) -> Calibration | None:
        """Return the calibration that a configuration's figures are made with."""
        if self._cluster.calibration is None:
            return None
        return calibration_for(self._cluster, self._known_profile(configuration))

    def uncalibrated(self, configuration: Configuration) -> Uncalibrated | None:
        """Return the figures of a configuration without its calibration, replayed; None where it has none."""
        if self.calibration(configuration) is None:
            return None
        time = self._time_model(configuration).time(configuration)
        return uncalibrated(self._plain_memory(configuration, replays=True), time)

    def _time(self, configuration: Configuration) -> TimeEstimate:
        time, calibration = self._time_model(configuration).time(configuration), self.calibration(configuration)
        return time if calibration is None else calibrated_time(time, calibration)

    def known_replay(self, configuration: Configuration) -> MemoryEstimate | None:
        """Return what a replay of the same training said, whatever was evaluated, if there was one.

        With segments that grow, if that was replayed: without them it did not fit.
        """
        training = configuration.training_alone
        growing = replace(training, expandable_segments=True)
        return self._trainings.get(growing) or self._trainings.get(training)

    def _memory(self, configuration: Configuration, *, replays: bool) -> MemoryEstimate:
        memory, calibration = self._plain_memory(configuration, replays=replays), self.calibration(configuration)
        return memory if calibration is None else calibrated_memory(memory, calibration)

    def _plain_memory(self, configuration: Configuration, *, replays: bool) -> MemoryEstimate:
        cluster = self._cluster_of(configuration)
        if self._estimate_memory is not None:
            profile = self._known_profile(configuration)
            return self._estimate_memory(profile, configuration, cluster, self._workload, replays=replays)
        return self._memory_model(configuration).estimate(configuration, cluster, replays=replays)

    def missing_figures(self, configuration: Configuration) -> tuple[str, ...]:
        """Say which figures of the hardware a configuration's time lacks."""
        return self._time_model(configuration).missing(configuration)

    def _cluster_of(self, configuration: Configuration) -> Cluster:
        """The part of the cluster that a configuration runs on."""
        return self._cluster.using(configuration.num_processes)

    def _regime(self, configuration: Configuration) -> Regime:
        return regime_of(configuration, self._cluster.device, self._fp32_modules)

    def _known_profile(self, configuration: Configuration) -> RegimeProfile:
        self.refuse_length(configuration)
        return self._profiles[self._regime(configuration)]

    def _time_model(self, configuration: Configuration) -> TimeModel:
        key = self._regime(configuration), configuration.num_processes
        if key not in self._times:
            cluster = self._cluster_of(configuration)
            self._times[key] = TimeModel(self._known_profile(configuration), cluster, self._workload)
        return self._times[key]

    def _memory_model(self, configuration: Configuration) -> MemoryModel:
        regime = self._regime(configuration)
        if regime not in self._memories:
            profile = self._known_profile(configuration)
            self._memories[regime] = MemoryModel(profile, self._workload.sequence_tokens, self._micro_batches)
        return self._memories[regime]


def refuse_length(profile: RegimeProfile, sequence_tokens: int) -> None:
    """Refuse a length that the tape does not hold for.

    Raises:
        InputError: the sequences are longer or shorter than the profile's code path.
    """
    longest = profile.max_sequence_tokens
    if profile.holds_for(sequence_tokens):
        return
    allowed = f"at least {profile.min_sequence_tokens}" + ("" if longest is None else f" and at most {longest}")
    if profile.multiple_tokens > 1:
        allowed += f" and a multiple of {profile.multiple_tokens}"
    raise InputError(
        f"sequences of {sequence_tokens} tokens take a code path of {profile.model} that was not traced.",
        to_fix=f"choose a length of {allowed} tokens",
    )
