"""Says what was found in a script, and where it says so, for the user to check."""

from __future__ import annotations

from collections.abc import Iterator

from autofit.spec.discovered import Discovered, FoundAdapter, FoundEvaluation, FoundLengths
from autofit.spec.hardware import Cluster


def found_words(discovered: Discovered, cluster: Cluster) -> dict[str, str]:
    """Say what was read from the script and where, for the user to check."""
    said = discovered.arguments
    adapter = discovered.adapter
    found = {
        "model": f"{discovered.model_name} ({discovered.config['architectures'][0]}), {said_at(discovered, 'model')}",
        "method": "no adapter, so full fine-tuning" if adapter is None else _adapter_words(adapter),
        "global batch": f"{said['per_device_train_batch_size']} sequences a device x "
        f"{said['gradient_accumulation_steps']} accumulation steps x {cluster.num_devices} devices, "
        f"{said_at(discovered, 'arguments')}",
        "trainer": f"{discovered.trainer}, {said_at(discovered, 'trainer')}",
        "precision": _precision_words(discovered),
        "attention": discovered.attention,
    }
    if lengths := discovered.lengths:
        found["sequence"] = _sequence_words(lengths)
        found["batching"] = _BATCHING_WORDS[lengths.batching]
        if lengths.image_tokens:
            found["images"] = f"{lengths.image_tokens} tokens of a sequence at most"
    if discovered.evaluation is not None:
        found["evaluation"] = _evaluation_words(discovered.evaluation)
    if discovered.loss != "stock":
        found["loss"] = f"{_LOSS_WORDS[discovered.loss]}; beside it ZeRO-3 and FSDP are not modelled, and not tried"
    for name in ("tokenizer", "collator"):
        if getattr(discovered, name):
            found[name] = getattr(discovered, name)
    if discovered.device_map is not None:
        found["device_map"] = f"the script's {discovered.device_map}, which the plan replaces"
    if quantization := discovered.quantization:
        found["quantization"] = f"{quantization.bits} bits, {quantization.quant_type}"
    if said.get("optim"):
        found["optimizer"] = str(said["optim"])
    if said.get("fixed_checkpointing") is not None:
        found["checkpointing"] = f"{'on' if said['fixed_checkpointing'] else 'off'}, as the script's arguments say"
    if said.get("deepspeed"):
        found["deepspeed"] = "the script's own DeepSpeed settings; the plan replaces them (--deepspeed FILE keeps them)"
    found = dict(_with_origins(found, discovered))
    return {"guessed": _guess_words(discovered), **found} if discovered.is_guess else found


SAY_WHERE = ("model", "global batch", "trainer")
"""What is said with its place in any case."""
PLACES = {
    "method": "method",
    "precision": "arguments",
    "attention": "model",
    "loss": "trainer",
    "quantization": "model",
    "optimizer": "arguments",
    "checkpointing": "arguments",
    "device_map": "model",
}
"""By what else is said: the call of the script that decides it. The others are seen in its data and its objects."""


def _guess_words(discovered: Discovered) -> str:
    """Say that nothing here is certain, and why."""
    if not discovered.not_run:
        return "the script was read, not run (--no-discover): check each line"
    return f"the script could not be run here, so its source was read instead: check each line. {discovered.not_run}"


def _with_origins(found: dict[str, str], discovered: Discovered) -> Iterator[tuple[str, str]]:
    """Say of each fact where it stands, and of what was read in no place that nothing says it.

    A loop makes its optimizer by a call that nobody sees.
    """
    for name, words in found.items():
        place = None if discovered.is_loop and name == "optimizer" else discovered.where.get(PLACES.get(name, ""))
        if name in SAY_WHERE:
            yield name, words
        elif discovered.is_guess:
            yield name, f"{words}, {said_at(discovered, name)}"
        else:
            yield name, words if place is None else f"{words}, {place}"


def _evaluation_words(evaluation: FoundEvaluation) -> str:
    size = "a set that does not say its size" if evaluation.num_sequences is None else f"{evaluation.num_sequences}"
    batch = (
        "a batch that is not said" if evaluation.batch_sequences is None else f"{evaluation.batch_sequences} a batch"
    )
    kept = ", all logits kept for compute_metrics" if evaluation.keeps_predictions else ""
    steps = "" if evaluation.accumulation_steps is None else f", {evaluation.accumulation_steps} batches on the device"
    return f"of {size} sequences, {batch}{kept}{steps}{', generating' if evaluation.generates else ''}"


_BATCHING_WORDS = {
    "equal": "all sequences of a batch as long as each other",
    "padded": "padded to the longest of a batch, with a mask",
    "padding_free": "the sequences of a batch one after the other in one row",
    "packed": "packed into rows, and the rows of a batch one after the other",
}
_LOSS_WORDS = {"liger": "Liger's kernels", "chunked": "trl's fused head, which never holds all logits"}


def _sequence_words(lengths: FoundLengths) -> str:
    if lengths.num_samples_seen == 0:
        return f"{lengths.sequence_tokens} tokens, which the source names; no data was looked at"
    of = "an unknown number" if lengths.num_samples is None else str(lengths.num_samples)
    seen = f"of {lengths.num_samples_seen} of {of} samples"
    if lengths.num_rows_per_sequence == 1:
        return f"{lengths.sequence_tokens} tokens, the widest batch {seen}"
    each = lengths.sequence_tokens // lengths.num_rows_per_sequence
    return f"pairs of {each} + {each} tokens, planned as sequences of {lengths.sequence_tokens}, the longest {seen}"


def _adapter_words(adapter: FoundAdapter) -> str:
    targets = ", ".join(adapter.target_modules)
    kind = adapter.peft_type if adapter.kind == "lora" else f"{adapter.peft_type} ({adapter.kind})"
    return f"{kind} r={adapter.r} alpha={adapter.lora_alpha} dropout={adapter.lora_dropout} on {targets}"


def _precision_words(discovered: Discovered) -> str:
    autocast = next((name for name in ("bf16", "fp16") if discovered.arguments.get(name)), "no")
    return f"{autocast} mixed precision, weights loaded as {discovered.weights_dtype or 'the checkpoint has them'}"


def said_at(discovered: Discovered, fact: str) -> str:
    """Name the line that decides a fact; where none does, a library's default does."""
    return f"{discovered.where[fact]}" if fact in discovered.where else "by transformers' defaults"
