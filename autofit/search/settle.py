"""What of a table's configurations really fits: every allocation replayed, and every stage that has to be held."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct

from autofit.search.evaluate import EvalBatch, Evaluator, MemoryEstimator
from autofit.search.rank import Ranking
from autofit.search.space import Block
from autofit.search.table import Rows, Table
from autofit.search.words import describe
from autofit.spec.configuration import Configuration
from autofit.spec.hardware import Cluster
from autofit.spec.job import Job, Restrictions
from autofit.spec.profile import ProfileSet


def evaluator_of(
    job: Job,
    cluster: Cluster,
    profiles: ProfileSet,
    blocks: Iterable[Block],
    estimate_memory: MemoryEstimator | None = None,
) -> Evaluator:
    """Return what evaluates all configurations of a job's blocks."""
    micro_batches = {micro_batch for block in blocks for micro_batch, _ in block.splits}
    asked = job.restrictions
    return Evaluator(
        cluster,
        job.workload,
        profiles,
        tuple(micro_batches),
        estimate_memory,
        held_stages=asked.held_stages,
        eval_batch=_eval_batch(asked),
    )


def _eval_batch(asked: Restrictions) -> EvalBatch:
    if asked.evaluation.per_device_eval_batch_size is not None:
        return "given"
    return "least" if asked.objective == "memory" else "free"


def nearest_row(table: Table, rows: Rows) -> int:
    """Return what needs least; of several, by its name."""
    needed = table.needed_bytes[rows]
    least: list[int] = rows[needed == needed.min()].tolist()
    return min(least, key=lambda row: describe(table.configuration(row)))


class Settled(Struct, frozen=True):
    """What fits, and where it is in the table."""

    row: int
    configuration: Configuration
    """The row's, or that one with segments that grow."""


def settled(table: Table, rows: Rows, evaluator: Evaluator, ranking: Ranking) -> tuple[Table, Settled | None]:
    """Find the best of some rows that still fits when every allocation is replayed.

    One that does not fit is marked, with what fares no better: where it is fragmentation, those of its method that need
    as much or more; where it is a stage, those of its block, which all load the same.
    What the allocator cannot do without has to leave as much of the device free as tensors have.
    """
    methods = table.knob("method")
    while (fitting := rows[table.fits[rows]]).size:
        row = ranking.best(fitting)
        configuration, misfit = evaluator.as_it_fits(table.configuration(row))
        if misfit == "none":
            return table, Settled(row, configuration)
        fares_no_better = methods == methods[row] if misfit == "fragmentation" else table.block == table.block[row]
        if misfit != "loading":
            fares_no_better &= table.needed_bytes >= table.needed_bytes[row]
        table = table.marked(table.fits & fares_no_better, misfit)
    return table, None
