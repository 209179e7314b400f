"""What is to be trained: the model, how much of it at a time, and what the user has fixed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from autofit.spec.configuration import Attention, Lora, Method, Optim, Sharding

Origin = Literal["catalogue", "folder", "config file", "hub", "script"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """An architecture, as its `config.json` describes it. No weights."""

    name: str
    """Hub id, or the path that was given."""
    config: dict[str, Any]
    """The content of config.json; `model_type` and `architectures` are always there."""
    origin: Origin
    num_params: int | None = None
    """Published number of parameters, where the catalogue has it."""
    source: str = ""
    """Where the config was taken from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Tokens of one optimizer step. The planner never changes either number."""

    sequence_tokens: int
    """Tokens in every sequence of a micro-batch, padding included."""
    global_batch_sequences: int
    """Sequences in one optimizer step over all devices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Restrictions:
    """What the user allows. An empty tuple leaves a dimension free; more than one value is a choice."""

    methods: tuple[Method, ...] = ()
    precision: Literal["auto", "bf16", "fp16", "fp32", "pure-bf16"] = "auto"
    """`bf16`/`fp16`: mixed precision; `pure-bf16`: weights, gradients and Adam's state all in bf16."""
    optims: tuple[Optim, ...] = ()
    shardings: tuple[Sharding, ...] = ()
    micro_batch_sequences: tuple[int, ...] = ()
    gradient_checkpointing: bool | None = None
    attention: Attention = "sdpa"
    lora: Lora = field(default_factory=Lora)
    """The adapter to train where the method is lora or qlora."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One training job."""

    model: Model
    workload: Workload
    restrictions: Restrictions
    script: str | None = None
    """Path of the training script; None when only planning."""
    script_arguments: tuple[str, ...] = ()
    found: dict[str, str] = field(default_factory=dict)
    """What discovery read from the script, and where: for the user to check."""
