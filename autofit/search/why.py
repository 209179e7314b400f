"""Why each knob of a plan has its value: what every other value would really need and cost, each replayed."""

from __future__ import annotations

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from autofit.plan import Plan
from autofit.search.allowed import allowed
from autofit.search.evaluate import Misfit
from autofit.search.rank import Ranking
from autofit.search.settle import evaluator_of, nearest_row, settled
from autofit.search.table import Table, tabulate
from autofit.search.words import rivals, spelt
from autofit.spec.configuration import Configuration
from autofit.spec.profile import ProfileSet


class Rival(Struct, frozen=True, kw_only=True):
    """Another value of a knob, everything else chosen best for it."""

    value: str
    configuration: Configuration
    """The best that fits when replayed; where nothing does, what needs least."""
    needed_bytes: int
    """On each device, as the plan of this configuration alone would say."""
    step_seconds: float | None
    """None: not known of this hardware."""
    excess_fraction: float
    """By how much more device time a token takes than with the plan, or work where times are not known."""
    misfit: Misfit
    """What of it does not fit; `none`: all does."""


class Knob(Struct, frozen=True, kw_only=True):
    """A knob of a plan with its value and the others that were allowed."""

    name: str
    value: str
    rivals: tuple[Rival, ...]


def knobs(plan: Plan, profiles: ProfileSet, *, num_cores: int = 1) -> tuple[Knob, ...]:
    """Set beside each knob of a plan what its other values come to; nothing where it is none of its own search.

    Args:
        plan: what was chosen, by whatever release and at whatever prices.
        profiles: of the code paths of its search.
        num_cores: how many processes may work; with more than 1 this one is copied, see `autofit.search.ahead`.

    Raises:
        InputError: the job leaves nothing to choose from on this cluster.
    """
    job, cluster = plan.inputs.job, plan.inputs.cluster
    left = allowed(job, cluster)
    evaluator = evaluator_of(job, cluster, profiles, left.blocks)
    table = tabulate(left, evaluator, num_cores=num_cores)
    chosen = _row_of(plan.configuration, table)
    if chosen is None:
        return ()
    ranking = Ranking(table, job.restrictions.objective)
    asked = [(name, mine, value, rows) for name, mine, others in rivals(chosen, table) for value, rows in others]
    fitting = (rows[table.fits[rows]] for *_, rows in asked)
    expected = [table.configuration(ranking.best(rows)) for rows in fitting if rows.size]
    found: dict[tuple[str, str], list[Rival]] = {}
    with evaluator.looking_ahead(expected, num_cores):
        for name, mine, value, rows in asked:
            marked, best = settled(table, rows, evaluator, ranking)
            row = nearest_row(marked, rows) if best is None else best.row
            configuration = table.configuration(row) if best is None else best.configuration
            rival = Rival(
                value=spelt(value),
                configuration=configuration,
                needed_bytes=evaluator.replay(configuration).needed_bytes,
                step_seconds=evaluator.evaluate(configuration).time.step_seconds,
                excess_fraction=float(ranking.spent[row] / ranking.spent[chosen]) - 1,
                misfit=marked.misfit_of(row),
            )
            found.setdefault((name, spelt(mine)), []).append(rival)
    return tuple(Knob(name=name, value=value, rivals=tuple(each)) for (name, value), each in found.items())


def _row_of(configuration: Configuration, table: Table) -> int | None:
    """Find a configuration, but for what is settled after the search: evaluations and segments that grow."""
    sought = _as_searched(configuration)
    for row in np.flatnonzero(table.by_split(0) == configuration.per_device_train_batch_size).tolist():
        if _as_searched(table.configuration(row)) == sought:
            return int(row)
    return None


def _as_searched(configuration: Configuration) -> Configuration:
    return replace(configuration.training_alone, expandable_segments=False)
