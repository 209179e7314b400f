"""Splits a loop's global batch as planned: its DataLoader's batch at `Accelerator.prepare`, and how many accumulate.

The script goes on counting in its own batches: `len()` of its loader answers in them, so that what it computes of that
and of its own accumulation (steps, a schedule, warm-up) stays what it was. Iteration gives the planned micro-batches,
and accelerate's own look-ahead still finds the last one of an epoch, where it synchronises.
"""

from __future__ import annotations

from math import ceil
from typing import Any

from autofit.runtime.session import Session

KEPT_ARGUMENTS = (
    "num_workers", "collate_fn", "pin_memory", "drop_last", "timeout", "worker_init_fn", "multiprocessing_context",
    "generator", "prefetch_factor", "persistent_workers", "pin_memory_device", "in_order",
)  # fmt: skip
"""What a DataLoader takes beside its data set, sampler and batch. Source: torch/utils/data/dataloader.py 2.13."""


def splits_anew(session: Session) -> bool:
    """Tell whether the plan splits the script's own loop otherwise than it does itself."""
    loop, configuration = session.plan.inputs.job.script_loop, session.plan.configuration
    return (
        loop is not None
        and session.sets_values
        and loop.per_device_train_batch_size != configuration.per_device_train_batch_size
    )


def set_accumulation(session: Session, accelerator: Any) -> None:
    """Let an Accelerator accumulate as planned; the setter is accelerate's own."""
    if not splits_anew(session):
        return
    planned, own = session.plan.configuration.gradient_accumulation_steps, accelerator.gradient_accumulation_steps
    accelerator.gradient_accumulation_steps = planned
    changes = {"gradient_accumulation_steps": [str(own), str(planned)]} if own != planned else {}
    session.log.record("applied", to="Accelerator", changes=changes)


class Batches:
    """Follows the DataLoaders that a script prepares, to give the one it trains on the planned batch."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._num_loaders = 0
        self.num_own_batches: int | None = None
        """Of an epoch on this rank, as the script's own DataLoader has them; None: it does not know."""
        self.loader: Any = None
        """The prepared one that the script trains on."""

    def planned(self, given: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[int, Any]]:
        """Return what to prepare in place of what was given, and of it the script's training loader by its place."""
        from torch.utils.data import DataLoader

        loop = self._session.plan.inputs.job.script_loop
        replaced, own = list(given), {}
        for place, each in enumerate(given):
            if not isinstance(each, DataLoader):
                continue
            if loop is not None and self._num_loaders == loop.train_loader:
                own[place] = each
                if splits_anew(self._session):
                    replaced[place] = self._rebatched(each)
            self._num_loaders += 1
        return tuple(replaced), own

    def _rebatched(self, loader: Any) -> Any:
        """Make the script's loader anew with the planned batch."""
        from torch.utils.data import DataLoader

        batch_size = self._session.plan.configuration.per_device_train_batch_size
        changes = {"batch_size": [str(loader.batch_size), str(batch_size)]}
        self._session.log.record("applied", to="DataLoader", changes=changes)
        kept = {name: getattr(loader, name) for name in KEPT_ARGUMENTS if hasattr(loader, name)}
        return DataLoader(loader.dataset, batch_size=batch_size, sampler=loader.sampler, **kept)

    def take(self, own: Any, prepared: Any, accelerator: Any) -> None:
        """Note how many batches the script counts, and let its prepared loader answer so."""
        self.loader, self.num_own_batches = prepared, num_batches_of_rank(own, accelerator)
        if splits_anew(self._session) and self.num_own_batches is not None:
            answer_length(prepared.base_dataloader, self.num_own_batches)

    def num_steps(self) -> tuple[int, int] | None:
        """Return the optimizer steps of an epoch, as the script counts them and as they will be; None: not known."""
        loop = self._session.plan.inputs.job.script_loop
        sampler: Any = getattr(self.loader, "batch_sampler", None)
        if loop is None or loop.accumulates_by_hand or self.num_own_batches is None or not hasattr(sampler, "__len__"):
            return None
        planned = self._session.plan.configuration.gradient_accumulation_steps
        own = ceil(self.num_own_batches / loop.gradient_accumulation_steps)
        return own, ceil(len(sampler) / planned)


def num_batches_of_rank(loader: Any, accelerator: Any) -> int | None:
    """Count the batches that accelerate deals to this rank, as `prepare` would.

    Source: accelerate 1.15 data_loader.py, `prepare_data_loader`, `BatchSamplerShard.__len__`.
    """
    from accelerate.data_loader import BatchSamplerShard

    sampler = loader.batch_sampler
    if not hasattr(sampler, "__len__"):
        return None
    if accelerator.num_processes == 1:
        return len(sampler)
    shard = BatchSamplerShard(
        sampler,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        even_batches=accelerator.even_batches,
    )
    return len(shard)


def answer_length(loader: Any, length: int) -> None:
    """Let a DataLoader answer `len()` with a number; nothing that iterates it asks.

    Source: torch/utils/data/dataloader.py 2.13, `_BaseDataLoaderIter`, which asks for that of iterable data alone.
    """
    kind = type(loader)
    loader.__class__ = type(kind.__name__, (kind,), {"__len__": lambda _self: length})
