"""Plans and estimates from Python: the keywords are the options of the command line, which calls the same functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autofit.errors import InputError, NothingFitsError
from autofit.options import EveryWish, Wishes, one_of_each, restrictions, wishes_of

if TYPE_CHECKING:
    from autofit.plan import Plan
    from autofit.spec.hardware import Cluster
    from autofit.spec.job import Job, Model
    from autofit.spec.profile import ProfileSet, Regime

Progress = Callable[[str, int, int], None]
Display = Callable[[], AbstractContextManager[Progress]]
"""Opens what shows a trace while it runs."""


@contextmanager
def silent() -> Iterator[Progress]:
    """Show nothing."""
    yield lambda _name, _done, _total: None


def make_plan(
    *, model: str | Path, gpus: str, seq_len: int, global_batch: int, allow_hub: bool = False, **wishes: Any
) -> Plan:
    """Find the cheapest configuration that fits, as `autofit plan` does.

    Args:
        model: Hub id from the offline catalogue, a local folder, or a config.json.
        gpus: as `--gpus` takes it, for instance `2xA100-80G`.
        seq_len: tokens in every sequence.
        global_batch: sequences in one optimizer step.
        allow_hub: whether a config.json may be downloaded.
        wishes: the other options of `autofit plan`, with underscores.

    Raises:
        InputError: something given cannot be used; `message` says what, `to_fix` what to do.
        NothingFitsError: no configuration fits.
    """
    job, cluster = planned_job(
        model=model,
        gpus=gpus,
        seq_len=seq_len,
        global_batch=global_batch,
        wishes=wishes_of(Wishes, wishes),
        allow_hub=allow_hub,
    )
    return solve_job(job, cluster)


def estimate(
    *,
    model: str | Path,
    gpus: str,
    seq_len: int,
    gradient_accumulation_steps: int = 1,
    allow_hub: bool = False,
    **wishes: Any,
) -> Plan:
    """Estimate one configuration, as `autofit estimate` does: `.memory`, `.time` and `.cost` of what is returned.

    Args:
        model: Hub id from the offline catalogue, a local folder, or a config.json.
        gpus: as `--gpus` takes it, for instance `2xA100-80G`.
        seq_len: tokens in every sequence.
        gradient_accumulation_steps: micro-batches in one step.
        allow_hub: whether a config.json may be downloaded.
        wishes: the other options of `autofit estimate`, with underscores: `method="lora"`, `lora_r=8` ...

    Raises:
        InputError: something given cannot be used; `message` says what, `to_fix` what to do.
    """
    job, cluster = estimated_job(
        model=model,
        gpus=gpus,
        seq_len=seq_len,
        gradient_accumulation_steps=gradient_accumulation_steps,
        wishes=wishes_of(EveryWish, wishes),
        allow_hub=allow_hub,
    )
    return estimate_job(job, cluster)


def planned_job(
    *, model: str | Path, gpus: str, seq_len: int, global_batch: int, wishes: Wishes, allow_hub: bool
) -> tuple[Job, Cluster]:
    """Read what is to be planned."""
    from autofit.sources.hardware import parse_cluster
    from autofit.sources.models import resolve_model
    from autofit.spec.job import Job, Workload

    cluster = parse_cluster(gpus)
    job = Job(
        model=resolve_model(str(model), allow_hub=allow_hub),
        workload=Workload(sequence_tokens=seq_len, global_batch_sequences=global_batch),
        restrictions=restrictions(wishes),
    )
    return job, cluster


def estimated_job(
    *,
    model: str | Path,
    gpus: str,
    seq_len: int,
    gradient_accumulation_steps: int,
    wishes: EveryWish,
    allow_hub: bool,
) -> tuple[Job, Cluster]:
    """Read what is to be estimated: a job that leaves one configuration."""
    from autofit.sources.hardware import parse_cluster
    from autofit.sources.models import resolve_model
    from autofit.spec.job import Job, Workload

    cluster = parse_cluster(gpus)
    chosen = restrictions(one_of_each(wishes))
    num_groups = max(1, cluster.num_devices // chosen.sequence_parallel_size)
    sequences = chosen.micro_batch_sequences[0] * gradient_accumulation_steps * num_groups
    job = Job(
        model=resolve_model(str(model), allow_hub=allow_hub),
        workload=Workload(sequence_tokens=seq_len, global_batch_sequences=sequences),
        restrictions=chosen,
    )
    return job, cluster


def solve_job(job: Job, cluster: Cluster, display: Display = silent) -> Plan:
    """Plan a job; where nothing fits, look further before saying what would help.

    Raises:
        NothingFitsError: nothing fits.
    """
    from autofit.search.solve import explaining_regimes, required_regimes, solve

    profiles = profiles_of(job.model, required_regimes(job, cluster), display)
    try:
        return solve(job, cluster, profiles)
    except NothingFitsError as refusal:
        try:
            more = profiles_of(job.model, explaining_regimes(job, cluster), display)
        except InputError:
            raise refusal from None
    return solve(job, cluster, {**profiles, **more})


def estimate_job(job: Job, cluster: Cluster, display: Display = silent) -> Plan:
    """Estimate the one configuration that a job leaves.

    Raises:
        InputError: it leaves several, or one that cannot run or is not modelled.
    """
    from autofit.memory.limits import refuse_unmodelled
    from autofit.search.solve import estimate as estimate_one
    from autofit.search.solve import required_regimes
    from autofit.search.space import candidates

    found = candidates(job, cluster)
    if len(found) > 1:
        names = ", ".join(dict.fromkeys(each.sharding for each in found))
        raise InputError(f"what is asked for leaves several shardings: {names}.", to_fix="give --sharding")
    (configuration,) = found
    refuse_unmodelled(configuration)
    profiles = profiles_of(job.model, required_regimes(job, cluster), display)
    return estimate_one(job, cluster, profiles, configuration)


def profiles_of(model: Model, regimes: Sequence[Regime], display: Display = silent) -> ProfileSet:
    """Take the stored profiles of a model, or trace what has none and show that."""
    from autofit.sources.profiles import profiles_for, stored_profiles

    stored = stored_profiles(model, regimes)
    if len(stored) == len(regimes):
        return stored
    with display() as progress:
        return profiles_for(model, regimes, progress=progress)
