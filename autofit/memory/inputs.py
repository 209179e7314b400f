"""What a micro-batch's inputs take on the device, and how much of it is in the tape."""

from __future__ import annotations

from autofit.spec.profile import MONOMIALS, RegimeProfile

TOKEN_ID_BYTES = 8
NUM_INPUT_TENSORS = {"equal": (2, 1), "padded": (3, 2), "packed": (3, 2)}
"""Ids, labels, and a mask or positions; of these, as many as the trace makes itself (ids are its labels)."""


def input_bytes(profile: RegimeProfile, micro_batch: int, sequence_tokens: int) -> int:
    """Return the bytes of one micro-batch's inputs."""
    if profile.input_bytes is not None:
        powers = (micro_batch**i * sequence_tokens**j for i, j in MONOMIALS)
        return int(sum(coefficient * power for coefficient, power in zip(profile.input_bytes, powers, strict=True)))
    return NUM_INPUT_TENSORS[profile.regime.batching][0] * micro_batch * sequence_tokens * TOKEN_ID_BYTES


def traced_input_bytes(profile: RegimeProfile, micro_batch: int, sequence_tokens: int) -> int:
    """Return how many of them are in the tape: with images all."""
    if profile.input_bytes is not None:
        return input_bytes(profile, micro_batch, sequence_tokens)
    return NUM_INPUT_TENSORS[profile.regime.batching][1] * micro_batch * sequence_tokens * TOKEN_ID_BYTES


def further_inputs(profile: RegimeProfile, micro_batch: int, sequence_tokens: int, num_micro_steps: int) -> list[int]:
    """Return the bytes of the micro-batches that wait beside the one that runs, where they are more than token ids.

    Trainer moves those of all micro-steps to the device before the first. The data loader has the next one ready on the
    host, which is a CPU rank's own memory.
    Source: transformers/trainer.py 5.23, get_batch_samples; accelerate/data_loader.py 1.15, DataLoaderShard.__iter__.
    """
    if profile.input_bytes is None:
        return []
    num_waiting = num_micro_steps - (0 if profile.regime.device == "cpu" else 1)
    return [input_bytes(profile, micro_batch, sequence_tokens)] * num_waiting


def untraced_bytes(profile: RegimeProfile, micro_batch: int, sequence_tokens: int, num_micro_steps: int) -> int:
    """Return the bytes of all micro-steps' inputs besides those in the tape, on a CPU rank with the loader's next."""
    if profile.input_bytes is not None:
        return sum(further_inputs(profile, micro_batch, sequence_tokens, num_micro_steps))
    each = input_bytes(profile, micro_batch, sequence_tokens)
    num_held = num_micro_steps + (1 if profile.regime.device == "cpu" else 0)
    return each * num_held - traced_input_bytes(profile, micro_batch, sequence_tokens)


def later_inputs(
    profile: RegimeProfile, micro_batch: int, sequence_tokens: int, num_micro_steps: int
) -> tuple[int, int]:
    """Return what a CPU rank holds of inputs besides the untraced: in the update, and when the next step's are fetched.

    The loop holds the traced ones too until it has those of the next step. Of a GPU, token ids are not worth counting.
    Source: transformers/trainer.py 5.23, _run_epoch (`batch_samples`).
    """
    if profile.regime.device != "cpu":
        return 0, 0
    traced = traced_input_bytes(profile, micro_batch, sequence_tokens)
    return traced, traced + num_micro_steps * input_bytes(profile, micro_batch, sequence_tokens)
