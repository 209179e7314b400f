"""What `Trainer.evaluate` needs above the weights: one forward pass, and the predictions that it keeps.

Source: transformers/trainer.py 5.23, evaluation_loop and prediction_step; trainer_pt_utils.py, EvalLoopContainer.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from msgspec import Struct, field

from autofit.memory.inputs import TOKEN_ID_BYTES, input_bytes, traced_input_bytes
from autofit.memory.tape import BIRTH_FIELDS, phase_peaks, size_table
from autofit.spec.profile import RegimeProfile, Segment
from autofit.units import BYTES_PER_ELEMENT

HALF_BYTES = 2
NUM_BATCHES_AHEAD = 1
"""accelerate's data loader moves the next batch to the device before it hands out this one.
Source: accelerate/data_loader.py 1.15, DataLoaderShard.__iter__."""


class EngineForward(Struct, frozen=True):
    """What an engine does around a forward pass: what it gathers, and what it hands on."""

    moments: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    """Of a traced segment: the most before it begins, and what is there while it runs."""
    left: int = 0
    """What stays when the pass is done."""
    halves_outputs: bool = False
    """Whether outputs are handed on in 16 bits."""

    def highest(self, segment: int, own_bytes: int) -> int:
        """The most that a segment and what is gathered for it hold."""
        before, during = self.moments.get(segment, (0, 0))
        return max(before, during + own_bytes)


PLAIN_FORWARD = EngineForward()


def evaluation_bytes(
    profile: RegimeProfile,
    micro_batch: int,
    sequence_tokens: int,
    *,
    keeps_logits: bool,
    num_batches: int,
    num_processes: int = 1,
    engine: EngineForward = PLAIN_FORWARD,
) -> int:
    """Return the most bytes alive in an evaluation, besides the weights and what training left on the device.

    Predictions are gathered from every process, and each batch's are concatenated to those before: the old, the new and
    their concatenation are alive together, twice what is kept in the end. A process's own are gone by then: they are
    there beside what is gathered of one batch.

    Args:
        profile: of a regime that evaluates, which is exact; or of a training step, whose forward pass gives a bound.
        micro_batch: `per_device_eval_batch_size`.
        sequence_tokens: tokens of every sequence.
        keeps_logits: whether predictions are kept; they are if there is a `compute_metrics`, unless
            `prediction_loss_only` is set.
        num_batches: of a process, or `eval_accumulation_steps` where that is set and smaller.
        num_processes: that predictions are gathered from.
        engine: what it does around a forward pass.
    """
    forward = forward_bytes(profile, micro_batch, sequence_tokens, engine)
    inputs = input_bytes(profile, micro_batch, sequence_tokens)
    waiting = NUM_BATCHES_AHEAD * inputs + inputs - traced_input_bytes(profile, micro_batch, sequence_tokens)
    if not keeps_logits:
        return forward + waiting
    logits = prediction_bytes(profile, micro_batch, sequence_tokens, engine) * num_processes
    labels = micro_batch * sequence_tokens * TOKEN_ID_BYTES * num_processes
    kept = logits + labels
    before = num_batches - 1
    last = kept if before > 1 else 0  # the batch before is still a variable of the loop; the first is what is kept
    newest = kept if before else 0
    gathered = before * kept + logits // num_processes + kept if num_processes > 1 else 0
    concatenated = max(gathered, num_batches * (logits * (2 if before else 1) + labels))
    as_arrays = num_batches * (logits * _array_factor(profile, engine) + labels) + newest
    return waiting + max(before * kept + last + forward, engine.left + max(concatenated + inputs, as_arrays))


def forward_bytes(
    profile: RegimeProfile, micro_batch: int, sequence_tokens: int, engine: EngineForward = PLAIN_FORWARD
) -> int:
    """Return the peak of one forward pass without gradients, with what is gathered for it.

    From a training step's tape it is a bound: within a layer all that backward would need is counted, between layers
    only what goes on to the next, and what autocast keeps: the weights that it has cast, of those that train.
    """
    if profile.regime.evaluates:
        return int(max(peak.kept[0] for peak in phase_peaks(profile, [micro_batch], sequence_tokens)))
    sizes = size_table(profile, [micro_batch], sequence_tokens)[:, 0]
    fleeting = _fleeting_sizes(profile)
    highest = held = 0
    for number, segment in enumerate(profile.segments):
        if segment.kind != "forward":
            break
        peak, left = _own_bytes(segment, number, sizes, fleeting)
        highest = max(highest, held + engine.highest(number, peak))
        cached = _own_bytes(segment, number, _fixed_sizes(profile), fleeting)[1]
        held += left if segment.layer is None else profile.repeats(segment) * cached
    return highest


def prediction_bytes(
    profile: RegimeProfile, micro_batch: int, sequence_tokens: int, engine: EngineForward = PLAIN_FORWARD
) -> int:
    """Return the bytes of one batch's predictions on one process.

    They die in the last segment of a tape that evaluates. From a training step's tape they are taken to be logits: in
    fp32 under autocast, as accelerate converts them; in 16 bits where the engine halves them; else in the weights'
    dtype.
    """
    if profile.regime.evaluates:
        sizes = size_table(profile, [micro_batch], sequence_tokens)[:, 0]
        return int(sum(sizes[event[0]] for event in profile.segments[-1].events if len(event) > BIRTH_FIELDS))
    dtype = profile.regime.weights_dtype if profile.regime.autocast == "no" else "float32"
    element = HALF_BYTES if engine.halves_outputs else BYTES_PER_ELEMENT[dtype]
    return micro_batch * sequence_tokens * profile.vocab_size * element


def _array_factor(profile: RegimeProfile, engine: EngineForward) -> int:
    """How often the predictions are there when they become arrays: a CPU, which moves nothing, copies bf16 to fp32.

    Source: transformers/trainer_pt_utils.py 5.23, nested_numpify.
    """
    regime = profile.regime
    are_halves = engine.halves_outputs or (regime.autocast == "no" and regime.weights_dtype == "bfloat16")
    return 3 if regime.device == "cpu" and are_halves else 1


def _fixed_sizes(profile: RegimeProfile) -> np.ndarray:
    """The sizes that no batch changes, 0 for all others: what a layer leaves of them, autocast has cast."""
    return np.asarray([0 if any(size[1:]) else int(size[0]) for size in profile.sizes])


def _fleeting_sizes(profile: RegimeProfile) -> set[int]:
    """Sizes of autocast's copies of frozen weights: kept for backward alone, not for the next use.

    Source: torch v2.13 aten/src/ATen/autocast_mode.cpp, cached_cast (`arg.requires_grad()`).
    """
    if profile.regime.autocast == "no":
        return set()
    kept = {tensor.num_elements * HALF_BYTES for tensor in profile.tensors if tensor.trains}
    return {n for n, size in enumerate(_fixed_sizes(profile)) if size and size not in kept}


def _own_bytes(segment: Segment, number: int, sizes: np.ndarray, fleeting: set[int]) -> tuple[int, int]:
    """The most that a segment's own tensors hold, and what they hold at its end; deaths of others' are not counted.

    What is fleeting is gone when the next tensor is there.
    """
    alive = highest = gone_next = 0
    for event in segment.events:
        if len(event) == BIRTH_FIELDS:
            alive += int(sizes[event[0]])
            highest = max(highest, alive)
            alive -= gone_next
            gone_next = int(sizes[event[0]]) if event[0] in fleeting else 0
        elif event[2] == number and event[0] not in fleeting:
            alive -= int(sizes[event[0]])
    return highest, alive - gone_next
