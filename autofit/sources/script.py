"""Discovery: runs a training script up to its first step in a child process, and makes a job of what it was to do."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

import msgspec

from autofit.errors import InputError
from autofit.memory.optimizers import OPTIMIZERS
from autofit.spec.configuration import Attention, Lora, Method, Optim
from autofit.spec.discovered import Discovered, FoundAdapter
from autofit.spec.hardware import Cluster
from autofit.spec.job import Job, Model, Restrictions, Workload

CHILD_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONSAFEPATH": "1",
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "WANDB_MODE": "disabled",
    "COMET_MODE": "disabled",
    "CLEARML_OFFLINE_MODE": "1",
    "NEPTUNE_MODE": "debug",
}
"""Hides GPUs, and keeps trackers from starting a run."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""A launcher's: with them, the script would wait for other ranks."""
NUM_LINES_SHOWN = 12
_INSTEAD = "plan without running it: autofit plan --model ... --seq-len ... --global-batch ... --gpus ..."


@dataclass(frozen=True, slots=True, kw_only=True)
class Overrides:
    """What the user says beside the script; what is None or empty is the script's to say."""

    model: Model | None = None
    sequence_tokens: int | None = None
    global_batch_sequences: int | None = None
    restrictions: Restrictions = field(default_factory=Restrictions)


def discover(
    script: Path,
    arguments: Sequence[str] = (),
    *,
    time_limit_seconds: float = 120,
    allow_hub: bool = False,
    environment: Mapping[str, str] | None = None,
) -> Discovered:
    """Run a script up to the point where training would begin, and return what it is about to train.

    Args:
        script: the user's training script.
        arguments: what the user passes to it.
        time_limit_seconds: how long it may take to get there.
        allow_hub: whether the script may download from the Hub meanwhile.
        environment: the script's environment; this process's own by default.

    Raises:
        InputError: it cannot be read, fails, takes too long, or does not train with transformers' Trainer.
    """
    if not script.is_file():
        raise InputError(f"there is no script {str(script)!r}.", to_fix="give the path of a Python script")
    given = dict(os.environ if environment is None else environment)
    with tempfile.TemporaryDirectory(prefix="autofit-") as folder:
        out, log = Path(folder) / "discovered.json", Path(folder) / "output.txt"
        command = [sys.executable, "-m", "autofit.runtime.discover", str(out), str(script.resolve()), *arguments]
        exit_code = _run(command, log, child_environment(given, allow_hub=allow_hub), time_limit_seconds)
        if out.is_file():
            return msgspec.json.decode(out.read_bytes(), type=Discovered)
        raise _failure(script, exit_code, log.read_text(encoding="utf-8", errors="replace"), time_limit_seconds)


def child_environment(given: Mapping[str, str], *, allow_hub: bool) -> dict[str, str]:
    """Return the environment a script is discovered in."""
    kept = {name: value for name, value in given.items() if name not in LAUNCHER_VARIABLES}
    return {**kept, **CHILD_ENVIRONMENT, **({} if allow_hub else OFFLINE)}


def _run(command: Sequence[str], log: Path, environment: Mapping[str, str], time_limit_seconds: float) -> int | None:
    """Run the child in the user's working directory; return its exit code, None if it was out of time.

    Its whole process group is ended with it: workers that a script starts would outlive it.
    """
    with log.open("wb") as file:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=dict(environment), start_new_session=True
        )
        try:
            return child.wait(timeout=time_limit_seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end_group(child)


def _end_group(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _failure(script: Path, exit_code: int | None, output: str, time_limit_seconds: float) -> InputError:
    """Say how the script ended before it began to train, with the last it printed."""
    if exit_code is None:
        how = f"did not begin to train within {time_limit_seconds:g} s"
    elif exit_code == 0:
        how = "ended without calling Trainer.train()"
    elif exit_code < 0:
        how = f"was ended by signal {signal.Signals(-exit_code).name} before it began to train"
    else:
        how = f"failed (exit code {exit_code}) before it began to train"
    last = output.rstrip().splitlines()[-NUM_LINES_SHOWN:]
    shown = "".join(f"\n    {line}" for line in last)
    offline = "the Hub was not allowed: --allow-hub; or " if "offline" in output.casefold() else ""
    return InputError(
        f"{str(script)!r} {how}." + (f" It printed last:{shown}" if last else ""),
        to_fix=f"{offline}correct the script, pass the arguments it needs, or {_INSTEAD}",
    )


def job_from_discovery(
    discovered: Discovered,
    cluster: Cluster,
    overrides: Overrides | None = None,
    *,
    script: Path | None = None,
    arguments: Sequence[str] = (),
) -> Job:
    """Return the job a script is, run by `accelerate launch` on every device of a cluster.

    What changes the result of training (method, adapter, precision, optimizer, global batch) is the script's, unless
    the user says otherwise; what changes only memory and speed is the planner's.

    Raises:
        InputError: the script does something that cannot be planned for.
    """
    wishes = overrides or Overrides()
    return Job(
        model=wishes.model or _model(discovered),
        workload=Workload(
            sequence_tokens=wishes.sequence_tokens or _sequence_tokens(discovered),
            global_batch_sequences=wishes.global_batch_sequences or _global_batch(discovered, cluster),
        ),
        restrictions=_restrictions(discovered, wishes.restrictions),
        script=None if script is None else str(script),
        script_arguments=tuple(arguments),
        found=_found(discovered, cluster),
    )


def _model(discovered: Discovered) -> Model:
    return Model(
        name=discovered.model_name, config=discovered.config, origin="script", source=_said(discovered, "model")
    )


def _sequence_tokens(discovered: Discovered) -> int:
    if discovered.lengths is None:
        raise InputError(
            "the script's batches have no input_ids, so their length is not known.", to_fix="give --seq-len"
        )
    return discovered.lengths.sequence_tokens


def _global_batch(discovered: Discovered, cluster: Cluster) -> int:
    """Return what the script trains on in one step: each device its own batches."""
    said = discovered.arguments
    return int(said["per_device_train_batch_size"] * said["gradient_accumulation_steps"] * cluster.num_devices)


def _restrictions(discovered: Discovered, wishes: Restrictions) -> Restrictions:
    """Return the user's wishes, with the script's own choices where the user has none."""
    said = discovered.arguments
    if said.get("torch_compile"):
        raise InputError(
            "the script sets torch_compile=True: what its fused kernels keep and allocate is not modelled.",
            to_fix="plan and train without torch_compile",
        )
    default = Restrictions()
    return replace(
        wishes,
        methods=wishes.methods or (_method(discovered),),
        precision=_precision(said) if wishes.precision == default.precision else wishes.precision,
        optims=wishes.optims or _optims(said.get("optim")),
        attention=_attention(discovered) if wishes.attention == default.attention else wishes.attention,
        lora=_lora(discovered.adapter) if discovered.adapter and wishes.lora == default.lora else wishes.lora,
        image_tokens=wishes.image_tokens or (discovered.lengths.image_tokens if discovered.lengths else 0),
        loss="liger" if said.get("use_liger_kernel") and wishes.loss == default.loss else wishes.loss,
    )


def _precision(said: Mapping[str, object]) -> Literal["auto", "bf16", "fp16"]:
    """Return the mixed precision the script switches on; where it says nothing, the planner is free."""
    if said.get("bf16"):
        return "bf16"
    return "fp16" if said.get("fp16") else "auto"


def _method(discovered: Discovered) -> Method:
    quantization = discovered.quantization
    if quantization is None:
        return "full" if discovered.adapter is None else "lora"
    if discovered.adapter is None:
        raise InputError(
            "the script loads a quantised model and puts no adapter on it, which transformers' Trainer refuses.",
            to_fix="put a LoRA adapter on it, load it unquantised, or give --method",
        )
    if (quantization.bits, quantization.quant_type) != (4, "nf4"):
        raise InputError(
            f"the script quantises to {quantization.bits} bits, {quantization.quant_type}; planned for is 4-bit nf4.",
            to_fix="use nf4, or give --method",
        )
    return "qlora"


def _optims(said: str | None) -> tuple[Optim, ...]:
    """Return the script's optimizer; transformers' default is no choice, and leaves the planner free."""
    if said is None or said.startswith("adamw_torch"):
        return ()
    known = {"adamw_bnb_8bit": "adamw_8bit", "paged_adamw": "paged_adamw_32bit"}
    optim = known.get(said, said)
    if optim not in OPTIMIZERS:
        raise InputError(
            f"the script trains with optim={said!r}, which is not planned for.",
            to_fix=f"use one of {', '.join(OPTIMIZERS)}, or give --optim",
        )
    return (optim,)


def _attention(discovered: Discovered) -> Attention:
    if discovered.attention not in get_args(Attention):
        raise InputError(
            f"the script's attention is {discovered.attention!r}, which is not planned for.",
            to_fix=f"use one of {', '.join(get_args(Attention))}, or give --attention",
        )
    return discovered.attention  # type: ignore[return-value]


def _lora(adapter: FoundAdapter) -> Lora:
    if adapter.unplanned or adapter.r is None or adapter.lora_alpha is None:
        raise InputError(
            f"the script's adapter has {', '.join(adapter.unplanned)}, which is not planned for.",
            to_fix="use plain LoRA on whole groups of modules",
        )
    return Lora(
        r=adapter.r,
        lora_alpha=adapter.lora_alpha,
        lora_dropout=adapter.lora_dropout or 0.0,
        target_modules=adapter.target_modules,
    )


def _found(discovered: Discovered, cluster: Cluster) -> dict[str, str]:
    """Say what was read from the script and where, for the user to check."""
    said = discovered.arguments
    adapter = discovered.adapter
    found = {
        "model": f"{discovered.model_name} ({discovered.config['architectures'][0]}), {_said(discovered, 'model')}",
        "method": "no adapter, so full fine-tuning" if adapter is None else _adapter_words(adapter),
        "global batch": f"{said['per_device_train_batch_size']} sequences a device x "
        f"{said['gradient_accumulation_steps']} accumulation steps x {cluster.num_devices} devices, "
        f"{_said(discovered, 'arguments')}",
        "trainer": f"{discovered.trainer}, {_said(discovered, 'trainer')}",
        "precision": _precision_words(said, discovered.weights_dtype),
        "attention": discovered.attention,
    }
    if lengths := discovered.lengths:
        of = "an unknown number" if lengths.num_samples is None else str(lengths.num_samples)
        found["sequence"] = (
            f"{lengths.sequence_tokens} tokens, the widest batch of {lengths.num_samples_seen} of {of} samples"
        )
        if lengths.image_tokens:
            found["images"] = f"{lengths.image_tokens} tokens of a sequence at most"
    if quantization := discovered.quantization:
        found["quantization"] = f"{quantization.bits} bits, {quantization.quant_type}"
    if said.get("optim"):
        found["optimizer"] = str(said["optim"])
    if said.get("deepspeed"):
        found["deepspeed"] = "the script's own DeepSpeed settings, which the plan replaces"
    return found


def _adapter_words(adapter: FoundAdapter) -> str:
    targets = ", ".join(adapter.target_modules)
    return f"{adapter.peft_type} r={adapter.r} alpha={adapter.lora_alpha} dropout={adapter.lora_dropout} on {targets}"


def _precision_words(said: Mapping[str, object], weights_dtype: str | None) -> str:
    autocast = _precision(said).replace("auto", "no")
    return f"{autocast} mixed precision, weights loaded as {weights_dtype or 'the checkpoint has them'}"


def _said(discovered: Discovered, fact: str) -> str:
    return f"{discovered.where[fact]}" if fact in discovered.where else "by transformers' defaults"
