"""Which of the configurations that fit is chosen, and what is tried if it does not fit after all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import get_args

from autofit.search.evaluate import Evaluated
from autofit.spec.configuration import Batching, Configuration, Method, Optim, Sharding
from autofit.spec.job import Objective

TIE_FRACTION = 0.01
"""Configurations this close in cost count as equal, and the simpler one is taken: no time model tells them apart."""
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

Cost = Callable[[Evaluated], float]


def cost_of(evaluated: Sequence[Evaluated], objective: Objective) -> Cost:
    """Return what is ranked by: seconds where every configuration has them, relative work where one has not.

    All configurations of a search train the same tokens on devices of one price: what is paid for is the time of all
    that are used. For the objective `time` it is the time alone.
    """
    knows_time = all(each.time.step_seconds is not None for each in evaluated)

    def cost(each: Evaluated) -> float:
        seconds = each.time.step_seconds or 0.0 if knows_time else each.relative_work
        return seconds if objective == "time" else seconds * each.configuration.num_processes

    return cost


def cheapest(evaluated: Sequence[Evaluated], cost: Cost) -> Evaluated:
    """Return the cheapest; among those within a tie of it, the one with the fewest moving parts."""
    least = min(cost(each) for each in evaluated)
    return min((each for each in evaluated if cost(each) <= least * (1 + TIE_FRACTION)), key=complexity)


def best(evaluated: Sequence[Evaluated], objective: Objective, cost: Cost) -> Evaluated:
    """Return what an objective chooses; within a tie of it the cheapest, and of equally cheap ones the simplest.

    `cost` and `time` are one where all configurations run on the same devices.
    """
    if objective == "memory":
        least = min(each.needed_bytes for each in evaluated)
        return cheapest([each for each in evaluated if each.needed_bytes <= least * (1 + TIE_FRACTION)], cost)
    if objective == "quality":
        least_approximate = min(approximations(each.configuration) for each in evaluated)
        return cheapest([e for e in evaluated if approximations(e.configuration) == least_approximate], cost)
    return cheapest(evaluated, cost)


def approximations(configuration: Configuration) -> tuple[int, int, int]:
    """Order configurations by what they leave out of training every weight in full precision, the most telling first.

    How much of the model trains, and on weights of how many bits; whether updates are added to 16-bit weights, where
    small ones round away; and to how many bits the optimizer's state is rounded. No measured quality is behind it: it
    is an order, and says nothing about by how much.
    """
    state = 2 if "4bit" in configuration.optim else 1 if "8bit" in configuration.optim else 0
    return _place(configuration.method, METHODS_FIRST), int(rounds_updates(configuration)), state


def rounds_updates(configuration: Configuration) -> bool:
    """Tell whether what trains is kept in 16 bits alone: DeepSpeed and FSDP keep fp32 beside it in mixed precision.

    peft makes adapters fp32 unless everything is to be 16-bit. Source: peft/tuners/tuners_utils.py 0.21,
    cast_adapter_dtype; see autofit.memory.engines and autofit.memory.fsdp for the engines.
    """
    keeps_fp32 = configuration.mixed_precision != "no" and (configuration.uses_deepspeed or configuration.uses_fsdp)
    return configuration.lora is None and configuration.weights_dtype != "float32" and not keeps_fp32


def complexity(each: Evaluated) -> tuple[int, ...]:
    """Order configurations by what can go wrong in them; last comes the memory that is left."""
    configuration = each.configuration
    return (
        _place(configuration.method, METHODS_FIRST),
        _place(configuration.sharding, SIMPLEST_FIRST),
        int(configuration.gradient_checkpointing),
        _place(configuration.optim, PLAINEST_FIRST),
        _place(configuration.batching, get_args(Batching)),
        each.needed_bytes,
        configuration.gradient_accumulation_steps,
    )


def _place(value: str, order: Sequence[str]) -> int:
    """Return a value's place in an order; what is not in it was asked for, and comes after all that is."""
    return order.index(value) if value in order else len(order)


def ladder(chosen: Evaluated, evaluated: Sequence[Evaluated], cost: Cost) -> tuple[Evaluated, ...]:
    """Return what to try next, each time with less memory: at most five rungs down to the least that the method needs.

    Between the chosen configuration and the smallest one the rungs are spaced evenly in proportion, and each is the
    cheapest configuration that needs no more than its share. The method never changes: that is the user's choice.
    """
    same_method = [each for each in evaluated if each.configuration.method == chosen.configuration.method]
    smaller = [each for each in same_method if each.needed_bytes < chosen.needed_bytes]
    if not smaller:
        return ()
    lowest_bytes = min(each.needed_bytes for each in smaller)
    rungs = [chosen]
    for level in _levels(chosen.needed_bytes, lowest_bytes):
        rung = cheapest([each for each in smaller if each.needed_bytes <= level], cost)
        if rung.needed_bytes <= rungs[-1].needed_bytes * (1 - MIN_DESCENT_FRACTION):
            rungs.append(rung)
    last_resort = cheapest([each for each in smaller if each.needed_bytes == lowest_bytes], cost)
    return tuple(rungs[1:]) or (last_resort,)


def _levels(highest_bytes: int, lowest_bytes: int) -> list[float]:
    """Space bytes evenly in proportion, the last at the lowest."""
    ratio = lowest_bytes / highest_bytes
    num_levels = max(1, min(MAX_RUNGS, int(math.log(ratio) / math.log(1 - MIN_DESCENT_FRACTION))))
    levels = [highest_bytes * ratio ** (step / num_levels) for step in range(1, num_levels)]
    return [*levels, lowest_bytes]
