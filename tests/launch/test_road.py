"""The three roads by which a plan reaches a script: which is taken, what is refused, and what is then in effect."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import autofit
from autofit import cli
from autofit.errors import AutofitError, InputError
from autofit.launch import Conduct, launch
from autofit.launch.evidence import read_events
from autofit.launch.road import choose_road, flags_of, method_words
from autofit.plan import Plan
from autofit.sources.script import discover
from autofit.writers import render_files, write_files
from tests.plans import a_configuration, a_plan, with_script_settings
from tests.scripts import LEAVE_GLOO, write_tiny_llama

HF_SCRIPT = """
import json
import sys
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, HfArgumentParser, Trainer, TrainingArguments


@dataclass
class ModelArguments:
    model: str
    dtype: str = "float32"


given, args = HfArgumentParser((ModelArguments, TrainingArguments)).parse_args_into_dataclasses()
model = AutoModelForCausalLM.from_pretrained(given.model, dtype=getattr(torch, given.dtype))
generator = torch.Generator().manual_seed(0)
rows = [torch.randint(0, 256, (32,), generator=generator) for _ in range(64)]
trainer = Trainer(model=model, args=args, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
trainer.train()
if args.process_index == 0:
    said = {
        "rows": args.per_device_train_batch_size,
        "accumulation": args.gradient_accumulation_steps,
        "checkpoints": any(getattr(module, "gradient_checkpointing", False) for module in model.modules()),
        "reentrant": (args.activation_checkpointing_kwargs or {}).get("use_reentrant"),
        "dtype": str(model.dtype),
        "optim": type(trainer.optimizer.optimizer).__name__,
        "ranks": args.world_size,
        "hooks": "autofit" in sys.modules,
    }
    json.dump(said, open("said.json", "w"))
"""
API_SCRIPT = """
import sys
import torch
from transformers import Trainer
import autofit

plan = autofit.current_plan()
generator = torch.Generator().manual_seed(0)
rows = [torch.randint(0, 256, (32,), generator=generator) for _ in range(64)]
trainer = Trainer(
    model=plan.load_model(sys.argv[1]),
    args=plan.training_arguments(output_dir=sys.argv[2], max_steps=2, report_to="none", save_strategy="no"),
    train_dataset=[{"input_ids": row, "labels": row} for row in rows],
)
trainer.train()
trainer.save_model()
"""
LOOP_SCRIPT = """
import sys
import torch
import autofit

plan = autofit.current_plan()
accelerator = plan.accelerator()
model = plan.load_model(sys.argv[1])
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
rows = torch.randint(0, 256, (16, 32), generator=torch.Generator().manual_seed(0))
loader = torch.utils.data.DataLoader(rows, batch_size=plan.per_device_train_batch_size)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
steps = 0
for ids in loader:
    with accelerator.accumulate(model):
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    steps += accelerator.sync_gradients
checkpoints = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
if accelerator.is_main_process:
    print("ranks", accelerator.num_processes, "steps", steps, "checkpoints", checkpoints, accelerator.mixed_precision)
"""


def settled(plan: Plan, **of_script: str) -> Plan:
    """Return a plan whose script does by itself what is given, and otherwise what is planned."""
    configuration = plan.configuration
    usual = {
        "weights_dtype": configuration.weights_dtype,
        "attention": configuration.attention,
        "method": method_words(configuration),
    }
    return with_script_settings(plan, usual | of_script)


def test_one_function_decides_the_road() -> None:
    """Hooks unless the script asks for the plan itself; what a script has not is refused with what to do."""
    plain, asking, parsing = "import torch", API_SCRIPT, HF_SCRIPT
    assert (choose_road(None, plain), choose_road(None, asking), choose_road(None, parsing)) == (
        "hooks",
        "api",
        "hooks",
    )
    assert choose_road("flags", parsing) == "flags"
    for asked, source in (("flags", plain), ("api", plain), ("hooks", asking), ("flags", asking), ("rails", plain)):
        with pytest.raises(InputError) as caught:
            choose_road(asked, source)
        assert caught.value.to_fix


def test_a_planned_value_without_a_flag_is_refused_in_words() -> None:
    """Attention has no flag in this script, nor has an adapter; a dtype has one; what the script does needs none."""
    plan = a_plan(a_configuration(method="lora", attention="eager"))
    with pytest.raises(InputError, match="attention, eager, has no flag"):
        flags_of(settled(plan, attention="sdpa"), HF_SCRIPT, [])
    with pytest.raises(InputError, match="adapter, True, has no flag"):
        flags_of(settled(plan, method="full fine-tuning"), HF_SCRIPT, [])
    with pytest.raises(InputError, match="no flag takes its adapter away"):
        flags_of(settled(a_plan(), method="an adapter of r=8, alpha=16, dropout=0"), HF_SCRIPT, [])
    with pytest.raises(InputError, match=r"from settings\.yaml"):
        flags_of(settled(plan), HF_SCRIPT, ["settings.yaml"])
    flags = flags_of(settled(plan, weights_dtype="float32"), HF_SCRIPT, [])
    assert flags[flags.index("--dtype") + 1] == "bfloat16"
    assert "--dtype" not in flags_of(settled(plan), HF_SCRIPT, [])


def test_trls_own_flags_set_an_adapter() -> None:
    """What TRL's ModelConfig parses from the flags of a QLoRA plan is the plan's adapter and quantisation."""
    from transformers import HfArgumentParser
    from trl import ModelConfig, SFTConfig

    alone = a_configuration(method="qlora", num_processes=1, sharding="none")
    plan = settled(a_plan(alone), method="full fine-tuning", weights_dtype="float32")
    flags = flags_of(plan, "from trl import ModelConfig, TrlParser", [])
    parsed, arguments = HfArgumentParser((ModelConfig, SFTConfig)).parse_args_into_dataclasses(
        [*flags, "--output_dir", "o"]
    )
    assert (parsed.use_peft, parsed.lora_r, parsed.lora_alpha, parsed.load_in_4bit) == (True, 8, 16, True)
    assert parsed.lora_target_modules in {"all-linear", ("all-linear",)} or parsed.lora_target_modules == ["all-linear"]
    assert parsed.dtype == "bfloat16"
    assert arguments.gradient_accumulation_steps == 2


@pytest.mark.slow
def test_flags_put_the_plan_into_effect_without_hooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An HfArgumentParser script started with appended flags trains as planned, and autofit is not in its process."""
    monkeypatch.chdir(tmp_path)
    model = write_tiny_llama(tmp_path / "model")
    (tmp_path / "train.py").write_text(HF_SCRIPT + "\nimport time\ntime.sleep(0.1)  # for gloo\n")
    planned = a_configuration(gradient_checkpointing=True, use_reentrant=True, weights_dtype="bfloat16")
    outcome = launch(
        settled(a_plan(planned), weights_dtype="float32"),
        tmp_path / "run",
        tmp_path / "train.py",
        ["--model", str(model), "--output_dir", "out", "--max_steps", "2", "--report_to", "none"],
        stream=io.BytesIO(),  # type: ignore[arg-type]
        conduct=Conduct(road="flags"),
    )
    assert (outcome.exit_code, outcome.summary["memory"]["ranks"]) == (0, [])
    assert "nothing was verified" in outcome.summary["reason"]
    said = json.loads((tmp_path / "said.json").read_text())
    assert said == {
        "rows": 2,
        "accumulation": 2,
        "checkpoints": True,
        "reentrant": True,
        "dtype": "torch.bfloat16",
        "optim": "AdamW",
        "ranks": 2,
        "hooks": False,
    }


@pytest.mark.slow
def test_a_script_that_asks_for_its_plan_is_verified_and_not_meddled_with(tmp_path: Path) -> None:
    """Under autofit launch a script that calls current_plan() verifies clean on both ranks, nothing having been set for
    it, and the adapter that it saved loads back with plain peft.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = write_tiny_llama(tmp_path / "model")
    (tmp_path / "train.py").write_text(API_SCRIPT)
    planned = a_configuration(method="lora", gradient_checkpointing=True)
    outcome = launch(
        a_plan(planned),
        tmp_path / "run",
        tmp_path / "train.py",
        [str(model), str(tmp_path / "out")],
        stream=io.BytesIO(),  # type: ignore[arg-type]
    )
    events = read_events(outcome.run_folder)
    assert sum(event.kind == "verified" for event in events) == 4
    assert not [event for event in events if event.kind == "applied" and event.detail["changes"]]
    assert outcome.summary["memory"]["measured_peak_allocated_bytes"] > 0
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path / "out")
    assert loaded.peft_config["default"].r == 8


@pytest.mark.slow
def test_the_current_plan_works_under_plain_accelerate(tmp_path: Path) -> None:
    """With the plan's path in AUTOFIT_PLAN and accelerate's own launch, a loop of one's own trains as planned."""
    model = write_tiny_llama(tmp_path / "model")
    (tmp_path / "train.py").write_text(LOOP_SCRIPT + LEAVE_GLOO)
    plan = a_plan(a_configuration(gradient_checkpointing=True))
    write_files(render_files(plan, tmp_path / "run"), tmp_path / "run")
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        tmp_path / "run" / "accelerate.yaml",
    ]
    environment = os.environ | {"AUTOFIT_PLAN": str(tmp_path / "run" / "plan.json"), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, tmp_path / "train.py", model], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ranks 2 steps 2 checkpoints True bf16" in done.stdout


def test_options_without_effect_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What would change a plan, beside one, and `--probe` where no hook could end the script: nothing is started."""
    script = tmp_path / "train.py"
    script.write_text(HF_SCRIPT)
    for options, words in (
        (["--plan", "plan.json", "--override"], "--override has no effect with --plan"),
        (["--plan", "plan.json", "--method", "lora"], "--method has no effect with --plan"),
        (["--plan", "plan.json", "--seq-len", "8"], "--seq-len has no effect with --plan"),
        (["--gpus", "2xCPU-1G", "--probe", "--road", "flags"], "--probe needs hooks"),
    ):
        assert cli.run(["launch", str(script), *options]) == 2
        assert words in capsys.readouterr().err


def test_the_current_plan_says_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a launch, with a wrong path, or for a plan without its folder: an InputError that says what to do."""
    monkeypatch.delenv("AUTOFIT_PLAN", raising=False)
    with pytest.raises(InputError, match="no current plan"):
        autofit.current_plan()
    with pytest.raises(InputError, match="cannot read the plan"):
        autofit.current_plan(tmp_path / "nothing.json")
    (tmp_path / "plan.json").write_text(render_files(a_plan(), tmp_path)["plan.json"])
    with pytest.raises(InputError, match=r"training_arguments\.json"):
        autofit.current_plan(tmp_path)


@pytest.mark.slow
def test_a_script_that_asks_for_its_plan_can_be_planned_for(tmp_path: Path) -> None:
    """While it is looked at, it gets its own words back: what it trains, and its global batch, are found."""
    model = write_tiny_llama(tmp_path / "model")
    (tmp_path / "train.py").write_text(API_SCRIPT.replace("max_steps=2", "max_steps=2, per_device_train_batch_size=3"))
    found = discover(tmp_path / "train.py", [str(model), str(tmp_path / "out")])
    assert found.config["hidden_size"] == 64
    assert found.arguments["per_device_train_batch_size"] == 3
    assert found.lengths is not None
    assert found.lengths.sequence_tokens == 32


def test_what_the_plan_decides_cannot_be_given_beside_it(tmp_path: Path) -> None:
    """A field that the plan decides is refused with both values; the others are taken."""
    alone = a_plan(a_configuration(num_processes=1, sharding="none"))
    write_files(render_files(alone, tmp_path / "run"), tmp_path / "run")
    plan = autofit.current_plan(tmp_path / "run")
    with pytest.raises(AutofitError, match="per_device_train_batch_size=9 was given, and the plan says 2"):
        plan.training_arguments(output_dir="out", per_device_train_batch_size=9)
    made: Any = plan.training_arguments(output_dir=str(tmp_path / "out"), learning_rate=0.25, ddp_timeout=7)
    assert (made.learning_rate, made.per_device_train_batch_size, made.ddp_timeout) == (0.25, 2, 7)


def test_importing_autofit_for_its_plan_is_light() -> None:
    """Asking the package for current_plan loads none of the training stack."""
    program = "import sys, autofit; autofit.current_plan; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "peft", "accelerate", "deepspeed"} & {*loaded}
