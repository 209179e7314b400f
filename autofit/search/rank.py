"""Which of the configurations that fit is chosen, and what is tried if it does not fit after all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import get_args

import numpy as np
import numpy.typing as npt

from autofit.search.table import Rows, Table, Values
from autofit.spec.configuration import Attention, Batching, Configuration, Loss, Method, Offload, Optim, Sharding
from autofit.spec.job import Objective

TIE_FRACTION = 0.01
"""Configurations this close in cost count as equal, and the simpler one is taken."""
SAFETY_FRACTION = 0.05
"""How much dearer than the cheapest a configuration may be that fits even if its memory is as far off as that of any
published run of its kind; no other is taken for it.

So much the time model does not tell apart: of 36 groups of published runs that differ in their configuration alone, in
97 % the one it chooses is within 5 % of the fastest (docs/measurements.md, "Speed").
"""
MAX_RUNGS = 5
MIN_DESCENT_FRACTION = 0.05
"""How much less a rung needs than the one before, unless it is the only one: a smaller step would not be worth the
minutes that loading the model again takes."""
METHODS_FIRST: tuple[Method, ...] = ("full", "freeze", "lora", "qlora")
SIMPLEST_FIRST: tuple[Sharding, ...] = ("none", "ddp", "zero1", "zero2", "zero3", "fsdp2", "fsdp1")
PLAINEST_FIRST: tuple[Optim, ...] = (
    "adamw_torch_fused",
    "adamw_torch",
    "adamw_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
)


class Ranking:
    """Orders a table's configurations as an objective wants them.

    What is ranked by is the time of all devices that are used: seconds where every configuration has them, relative
    work where one has not. All configurations of a search train the same tokens on devices of one price. For the
    objective `time` it is the time alone.

    Args:
        table: the configurations.
        objective: what decides.
    """

    def __init__(self, table: Table, objective: Objective) -> None:
        self._table, self._objective = table, objective
        self.spent: npt.NDArray[np.float64] = table.seconds * table.by_block(lambda block: block.first.num_processes)
        """The time of all devices that are used."""
        self.cost: npt.NDArray[np.float64] = table.seconds if objective == "time" else self.spent

    def cheapest(self, rows: Rows) -> int:
        """Return the cheapest; among those within a tie of it, the one with the fewest moving parts.

        What fits whatever its memory may be off goes before what does not, as long as it costs hardly more.
        """
        cost, table = self.cost, self._table
        near = rows[cost[rows] <= cost[rows].min() * (1 + SAFETY_FRACTION)]
        safe = near[table.risky_bytes[near] <= table.budget_bytes]
        among = safe if safe.size else rows
        tied = among[cost[among] <= cost[among].min() * (1 + TIE_FRACTION)]
        return int(tied[np.lexsort([key[tied] for key in self._complexity[::-1]])[0]])

    def best(self, rows: Rows) -> int:
        """Return what the objective chooses; within a tie of it the cheapest, and of equally cheap ones the simplest.

        `cost` and `time` are one where all configurations run on the same devices.
        """
        if self._objective == "memory":
            needed = self._table.needed_bytes[rows]
            return self.cheapest(rows[needed <= needed.min() * (1 + TIE_FRACTION)])
        if self._objective == "quality":
            order = self._approximations[rows]
            return self.cheapest(rows[order == order.min()])
        return self.cheapest(rows)

    def ladder(self, chosen: int, rows: Rows) -> list[int]:
        """Return what to try next, each time with less memory: at most five rungs down to the least that is needed.

        Between the chosen configuration and the smallest one the rungs are spaced evenly in proportion, and each is the
        cheapest configuration that needs no more than its share. The method never changes: that is the user's choice.

        Args:
            chosen: where the ladder begins.
            rows: configurations of its method that need less and fit.
        """
        if not rows.size:
            return []
        needed = self._table.needed_bytes
        lowest_bytes = int(needed[rows].min())
        rungs = [chosen]
        for level in _levels(int(needed[chosen]), lowest_bytes):
            rung = self.cheapest(rows[needed[rows] <= level])
            if needed[rung] <= needed[rungs[-1]] * (1 - MIN_DESCENT_FRACTION):
                rungs.append(rung)
        return rungs[1:] or [self.cheapest(rows[needed[rows] == lowest_bytes])]

    @cached_property
    def _complexity(self) -> list[Values]:
        """What can go wrong in a configuration, the most telling first; last comes the memory that is left.

        No adapter and no quantisation is simpler than another: that which was named first goes first.
        """
        table = self._table
        adapters = list(dict.fromkeys(block.path.lora for block in table.blocks))
        quantizations = list(dict.fromkeys(block.path.quantization for block in table.blocks))
        return [
            table.by_block(lambda block: _place(block.first.method, METHODS_FIRST)),
            table.by_block(lambda block: int(rounds_updates(block.first))),
            table.by_block(lambda block: _place(block.first.sharding, SIMPLEST_FIRST)),
            table.by_block(lambda block: _place(block.first.offload, get_args(Offload))),
            table.by_block(lambda block: block.first.num_replicas),
            table.by_block(lambda block: _place(block.first.attention, get_args(Attention))),
            table.by_block(lambda block: _place(block.first.loss, get_args(Loss))),
            table.by_block(lambda block: quantizations.index(block.path.quantization)),
            table.by_block(lambda block: adapters.index(block.path.lora)),
            table.by_block(lambda block: int(block.first.gradient_checkpointing)),
            table.by_optim(lambda optim: _place(optim, PLAINEST_FIRST)),
            table.by_block(lambda block: _place(block.first.batching, get_args(Batching))),
            table.needed_bytes,
            table.by_split(1),
        ]

    @cached_property
    def _approximations(self) -> Values:
        """`approximations` as one number."""
        of_block = self._table.by_block(lambda block: _number(approximations(block.first)[:3]))
        return of_block * 10 + self._table.by_optim(_state_order)


def approximations(configuration: Configuration) -> tuple[int, int, int, int]:
    """Order configurations by what they leave out of training every weight in full precision, the most telling first.

    How much of the model trains, and on weights of how many bits; whether updates are added to 16-bit weights, where
    small ones round away; and to how many bits the optimizer's state is rounded. No measured quality is behind it: it
    is an order, and says nothing about by how much. Adapters are not ordered, nor codes of as many bits.
    """
    return (
        _place(configuration.method, METHODS_FIRST),
        0 if configuration.quantization is None or configuration.quantization.is_int8 else 1,
        int(rounds_updates(configuration)),
        _state_order(configuration.optim),
    )


def _state_order(optim: str) -> int:
    return 2 if "4bit" in optim else 1 if "8bit" in optim else 0


def _number(digits: Sequence[int]) -> int:
    return sum(digit * 10**place for place, digit in enumerate(reversed(digits)))


def rounds_updates(configuration: Configuration) -> bool:
    """Tell whether what trains is kept in 16 bits alone: DeepSpeed and FSDP keep fp32 beside it in mixed precision.

    peft makes adapters fp32 unless everything is to be 16-bit. Source: peft/tuners/tuners_utils.py 0.21,
    cast_adapter_dtype; see autofit.memory.engines and autofit.memory.fsdp_units for the engines.
    """
    keeps_fp32 = configuration.mixed_precision != "no" and (configuration.uses_deepspeed or configuration.uses_fsdp)
    return configuration.lora is None and configuration.weights_dtype != "float32" and not keeps_fp32


def _place(value: str, order: Sequence[str]) -> int:
    """Return a value's place in an order; what is not in it was asked for, and comes after all that is."""
    return order.index(value) if value in order else len(order)


def _levels(highest_bytes: int, lowest_bytes: int) -> list[float]:
    """Space bytes evenly in proportion, the last at the lowest."""
    ratio = lowest_bytes / highest_bytes
    num_levels = max(1, min(MAX_RUNGS, int(math.log(ratio) / math.log(1 - MIN_DESCENT_FRACTION))))
    levels = [highest_bytes * ratio ** (step / num_levels) for step in range(1, num_levels)]
    return [*levels, lowest_bytes]
