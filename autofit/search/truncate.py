"""What cutting sequences at other lengths would save and lose."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from msgspec.structs import replace

from autofit.errors import InputError
from autofit.search.evaluate import Evaluator
from autofit.spec.configuration import Configuration
from autofit.spec.estimate import Truncation
from autofit.spec.hardware import Cluster
from autofit.spec.job import Job, Workload
from autofit.timing import estimate_cost
from autofit.timing.batches import estimate_epoch, usual_cuts

NUM_SHORTER, NUM_LONGER = 5, 2
"""Lengths that are compared with the planned one."""


def truncations(
    job: Job, cluster: Cluster, configuration: Configuration, evaluator: Evaluator
) -> tuple[Truncation, ...]:
    """Evaluate a configuration for the usual lengths around the one that was planned; none where data has no lengths.

    Nothing else is changed: shorter sequences may allow a larger micro-batch too, which only a plan for them can say.
    A length that takes another code path than was traced is left out.
    """
    lengths, now = job.workload.lengths, job.workload.sequence_tokens
    if lengths is None:
        return ()
    bound = max(now, min(lengths.max_tokens, job.model.max_positions or lengths.max_tokens))
    cuts = _around([cut for cut in usual_cuts(lengths) if cut <= bound], now)
    found = (_truncation(replace(job.workload, sequence_tokens=cut), cluster, configuration, evaluator) for cut in cuts)
    return tuple(each for each in found if each is not None)


def _around(cuts: Sequence[int], now: int) -> list[int]:
    at = bisect_left(cuts, now)
    longer = [cut for cut in cuts[at:] if cut > now]
    return [*cuts[max(0, at - NUM_SHORTER) : at], now, *longer[:NUM_LONGER]]


def _truncation(
    workload: Workload, cluster: Cluster, configuration: Configuration, evaluator: Evaluator
) -> Truncation | None:
    assert workload.lengths is not None, "asked for only where they are known"
    cut = workload.sequence_tokens
    try:
        evaluated = evaluator.for_length(cut).evaluate(configuration)
    except InputError:
        return None
    cost = estimate_cost(evaluated.time, cluster, workload, configuration)
    epoch = estimate_epoch(evaluated.time, cost, workload, configuration)
    return Truncation(
        sequence_tokens=cut,
        sequences_cut_fraction=workload.lengths.share_above(cut),
        tokens_lost_fraction=workload.lengths.share_lost(cut),
        peak_allocated_bytes=evaluated.memory.peak_allocated_bytes,
        epoch_seconds=epoch.seconds if epoch else None,
        epoch_dollars=epoch.dollars if epoch else None,
    )
