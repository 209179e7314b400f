"""Every configuration of a space with what it needs and takes, as columns of numbers.

A configuration is a path with an engine, an optimizer and a split of the batch. Bytes and seconds of a block, which is
a path with an engine, come as one array over optimizers and splits; see `MemoryModel.needs` and `TimeModel.seconds`
for what is worked out once in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec import Struct
from msgspec.structs import replace

from autofit.errors import InputError
from autofit.search.ahead import Ahead
from autofit.search.allowed import Allowed, Mask
from autofit.search.evaluate import MISFITS, EvaluatedBlock, Evaluator, Misfit, usable_bytes
from autofit.search.space import Block
from autofit.spec.configuration import Configuration, Lora
from autofit.spec.profile import Regime

Rows = npt.NDArray[np.intp]
"""Places of configurations in a table."""
Values = npt.NDArray[Any]


class Table(Struct, frozen=True, kw_only=True, eq=False):
    """Configurations as rows. None of the columns is ever written to."""

    blocks: tuple[Block, ...]
    block: npt.NDArray[np.int32]
    optim: npt.NDArray[np.int16]
    split: npt.NDArray[np.int16]
    needed_bytes: npt.NDArray[np.int64]
    """On each device, without a replay: what decides whether it fits."""
    risky_bytes: npt.NDArray[np.int64]
    """The same if it is off by as much as any published run of its kind was."""
    misfit: npt.NDArray[np.int8]
    """A place in `MISFITS`."""
    seconds: npt.NDArray[np.float64]
    """Of a step; where any is not known, relative work without a unit for all."""
    knows_time: bool
    usable_bytes: int
    """What of a device a plan may need."""
    budget_bytes: int
    """What a device has."""
    unmodelled: Counter[str]
    """Allowed configurations that turned out not to be modelled, by the reason; they are not in the table."""
    num_untraced: int
    """Allowed configurations whose code path was not traced; they are not in the table."""

    def __len__(self) -> int:
        return len(self.block)

    @property
    def fits(self) -> Mask:
        """Whether each may be chosen."""
        fits: Mask = self.misfit == 0
        return fits

    def configuration(self, row: int) -> Configuration:
        """Return the configuration of a row."""
        block: Block = self.blocks[int(self.block[row])]
        return block.configuration(int(self.optim[row]), int(self.split[row]))

    def misfit_of(self, row: int) -> Misfit:
        """Say what of a row does not fit."""
        return MISFITS[int(self.misfit[row])]

    def by_block(self, value: Callable[[Block], Any]) -> Values:
        """Return a column of what depends on the block alone."""
        return np.array([value(block) for block in self.blocks])[self.block]

    def by_optim(self, value: Callable[[str], Any]) -> Values:
        """Return a column of what depends on the optimizer alone."""
        return _of_parts(self.blocks, self.block, self.optim, lambda block: [value(each) for each in block.optims])

    def by_split(self, place: int) -> Values:
        """Return a column of micro-batches (0) or accumulation steps (1)."""
        return _of_parts(self.blocks, self.block, self.split, lambda block: [each[place] for each in block.splits])

    def knob(self, name: str) -> Values:
        """Return a column of a field of `Configuration`, or of what decides several of them: precision, adapter."""
        if name == "adapter":
            return self.by_block(lambda block: adapter_name(block.path.lora))
        if name == "quantization":
            return self.by_block(lambda block: "" if block.path.quantization is None else block.path.quantization.name)
        if name == "precision":
            return self.by_block(lambda block: block.path.precision)
        if name == "optim":
            return self.by_optim(str)
        if name == "per_device_train_batch_size":
            return self.by_split(0)
        return self.by_block(lambda block: getattr(block.first, name))

    def marked(self, rows: Mask, misfit: Misfit) -> Table:
        """Return a table in which some rows do not fit."""
        return replace(self, misfit=np.where(rows, np.int8(MISFITS.index(misfit)), self.misfit))


def adapter_name(lora: Lora | None) -> str:
    """Name an adapter by what makes two differ; nothing where there is none."""
    if lora is None:
        return ""
    return f"{lora.kind} r={lora.r}, alpha={lora.lora_alpha} on {'+'.join(lora.target_modules)}"


def _evaluated(left: Allowed, evaluator: Evaluator, num_cores: int) -> dict[int, EvaluatedBlock | str]:
    """Evaluate the blocks that were traced, or say what of one is not modelled.

    Those of one code path share most, so that one process evaluates them.
    """
    by_path: dict[Regime, list[int]] = {}
    for number, block in enumerate(left.blocks):
        profile = evaluator.profile(block.first)
        if profile is not None:
            evaluator.refuse_length(block.first)
            by_path.setdefault(profile.regime, []).append(number)

    def evaluated(path: Regime) -> dict[int, EvaluatedBlock | str]:
        return {number: _block_or_name(left, number, evaluator) for number in by_path[path]}

    with Ahead(evaluated, by_path, num_cores) as ahead:
        return {number: each for path in by_path for number, each in (ahead.get(path) or evaluated(path)).items()}


def _block_or_name(left: Allowed, number: int, evaluator: Evaluator) -> EvaluatedBlock | str:
    try:
        return evaluator.evaluate_block(number, left.blocks[number], left.masks[number])
    except InputError as error:
        return error.message.removesuffix(" is not modelled.")


def _of_parts(
    blocks: Sequence[Block],
    block: npt.NDArray[np.int32],
    part: npt.NDArray[np.int16],
    values: Callable[[Block], list[Any]],
) -> Values:
    """Look up, for each row, what its block has at a place."""
    each = [values(one) for one in blocks]
    begins = np.cumsum([0, *map(len, each)])[:-1]
    return np.array([value for one in each for value in one])[begins[block] + part]


def tabulate(left: Allowed, evaluator: Evaluator, *, num_cores: int = 1) -> Table:
    """Evaluate all that is left of a space and whose code path was traced.

    Args:
        left: the space.
        evaluator: what evaluates.
        num_cores: how many processes may work; with more than 1 this one is copied, see `autofit.search.ahead`.

    Raises:
        InputError: a length takes a code path that was not traced.
    """
    unmodelled: Counter[str] = Counter()
    num_untraced = 0
    found: list[EvaluatedBlock] = []
    evaluated = _evaluated(left, evaluator, num_cores)
    for number, mask in enumerate(left.masks):
        block = evaluated.get(number)
        if block is None:
            num_untraced += int(mask.sum())
        elif isinstance(block, str):
            unmodelled[block] += int(mask.sum())
        else:
            found.append(block)
    knows_time = not any(np.isnan(each.seconds).any() for each in found)
    if not knows_time:
        found = [
            replace(each, seconds=evaluator.relative_works(left.blocks[each.number], left.masks[each.number]))
            for each in found
        ]

    def column(name: str, kind: npt.DTypeLike) -> Values:
        return np.concatenate([np.empty(0, kind), *(getattr(each, name) for each in found)], dtype=kind)

    numbers = [np.full(len(each.optim), each.number) for each in found]
    return Table(
        blocks=left.blocks,
        block=np.concatenate([np.empty(0, np.int32), *numbers], dtype=np.int32),
        optim=column("optim", np.int16),
        split=column("split", np.int16),
        needed_bytes=column("needed_bytes", np.int64),
        risky_bytes=column("risky_bytes", np.int64),
        misfit=column("misfit", np.int8),
        seconds=column("seconds", np.float64),
        knows_time=knows_time,
        usable_bytes=usable_bytes(evaluator.budget_bytes),
        budget_bytes=evaluator.budget_bytes,
        unmodelled=unmodelled,
        num_untraced=num_untraced,
    )
