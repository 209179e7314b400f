"""Prints the table of docs/decisions.md: typical jobs, and the plan for each. Arguments: numbers of rows, or none."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from msgspec import Struct, field

from autofit import api
from autofit.errors import AutofitError
from autofit.plan import Plan
from autofit.search.words import describe
from autofit.units import GIB, format_three_digits


class TypicalJob(Struct, frozen=True, kw_only=True):
    """A job that people ask about, as `autofit plan` takes it."""

    words: str
    model: str
    gpus: str
    seq_len: int
    global_batch: int
    wishes: dict[str, Any] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """The command that prints the whole plan."""
        wishes = "".join(f" --{name.replace('_', '-')} {value}" for name, value in self.wishes.items())
        return (
            f"autofit plan --model {self.model} --seq-len {self.seq_len} --global-batch {self.global_batch} "
            f"--gpus {self.gpus}{wishes}"
        )


LLAMA_8B, LLAMA_70B = "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-70B"
JOBS = (
    TypicalJob(
        words="LoRA of a 7B on one 24 GB card",
        model="meta-llama/Llama-2-7b-hf",
        gpus="1xRTX4090-24G",
        seq_len=2048,
        global_batch=32,
        wishes={"method": "lora"},
    ),
    TypicalJob(
        words="an 8B on one 24 GB card, whatever fits",
        model=LLAMA_8B,
        gpus="1xRTX4090-24G",
        seq_len=4096,
        global_batch=32,
    ),
    TypicalJob(
        words="QLoRA of a 70B on one 48 GB card",
        model=LLAMA_70B,
        gpus="1xRTXA6000-48G",
        seq_len=1024,
        global_batch=16,
        wishes={"method": "qlora"},
    ),
    *(
        TypicalJob(
            words=f"full fine-tuning of an 8B on {number} A100",
            model=LLAMA_8B,
            gpus=f"{number}xA100-80G",
            seq_len=4096,
            global_batch=64,
            wishes={"method": "full"},
        )
        for number in (2, 4, 8)
    ),
    TypicalJob(
        words="full fine-tuning of a 70B on two nodes of 8 H100",
        model=LLAMA_70B,
        gpus="2x8xH100-80G:inter_node_gb_s=400",
        seq_len=4096,
        global_batch=64,
        wishes={"method": "full"},
    ),
    TypicalJob(
        words="LoRA of a 70B on 8 H100",
        model=LLAMA_70B,
        gpus="8xH100-80G",
        seq_len=4096,
        global_batch=64,
        wishes={"method": "lora"},
    ),
    TypicalJob(
        words="a 0.5B with 152k words on 16 GB",
        model="Qwen/Qwen2.5-0.5B",
        gpus="1xT4-16G",
        seq_len=2048,
        global_batch=32,
        wishes={"method": "full"},
    ),
    TypicalJob(
        words="LoRA of routed experts (Mixtral 8x7B) on 4 A100",
        model="mistralai/Mixtral-8x7B-v0.1",
        gpus="4xA100-80G",
        seq_len=2048,
        global_batch=32,
        wishes={"method": "lora", "lora_target_modules": "q_proj,k_proj,v_proj,o_proj"},
    ),
    TypicalJob(
        words="128k tokens: LoRA of an 8B on 8 H100",
        model=LLAMA_8B,
        gpus="8xH100-80G",
        seq_len=131072,
        global_batch=8,
        wishes={"method": "lora", "loss": "liger"},
    ),
    TypicalJob(
        words="full fine-tuning of an encoder (BERT-large) on 16 GB",
        model="google-bert/bert-large-uncased",
        gpus="1xT4-16G",
        seq_len=512,
        global_batch=64,
        wishes={"method": "full"},
    ),
)


def main(arguments: Sequence[str]) -> None:
    """Print the rows asked for, or the whole table."""
    numbers = [int(argument) for argument in arguments] or range(1, len(JOBS) + 1)
    print("| | job | plan | needs, GiB | tokens/s | $ a million tokens |")
    print("| ---: | --- | --- | ---: | ---: | ---: |")
    for number in numbers:
        print(f"| {number} | {' | '.join(cells(JOBS[number - 1]))} |", flush=True)


def cells(job: TypicalJob) -> Iterator[str]:
    """Yield the cells of a job: what it is, and the plan or the refusal."""
    yield f"{job.words}, {job.seq_len:,} tokens"
    try:
        made = planned(job)
    except AutofitError as refusal:
        yield from (refusal.message.splitlines()[0], "", "", "")
        return
    yield plan_words(made)
    yield f"{made.memory.needed_bytes / GIB:.1f} of {made.memory.budget_bytes / GIB:.1f}"
    speed, dollars = made.time.tokens_per_second, made.cost.dollars_per_million_tokens
    yield "?" if speed is None else f"{speed:,.0f}"
    yield "?" if dollars is None else format_three_digits(dollars)


def planned(job: TypicalJob) -> Plan:
    """Plan a job."""
    return api.make_plan(
        model=job.model, gpus=job.gpus, seq_len=job.seq_len, global_batch=job.global_batch, **job.wishes
    )


def plan_words(made: Plan) -> str:
    """Name what was chosen, in a line."""
    extra = ", expandable segments" if made.configuration.expandable_segments else ""
    return describe(made.configuration) + extra


if __name__ == "__main__":
    main(sys.argv[1:])
