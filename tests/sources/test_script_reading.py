"""A script that is only read: what its source says plainly is found and called a guess, and nothing is run."""

import json
from pathlib import Path

import pytest

from autofit.errors import InputError
from autofit.sources.hardware import parse_cluster
from autofit.sources.models import resolve_model
from autofit.sources.script_job import Overrides, job_from_discovery
from autofit.sources.script_reading import read_script
from autofit.spec.configuration import Lora
from autofit.spec.discovered import FoundLengths

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CLUSTER = parse_cluster("2xA100-80G")
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
CONSTANTS = f"""
raise SystemExit("this must never be run")
MODEL = "{SMOLLM2}"
BLOCK_SIZE = 384
model = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True))
model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
args = TrainingArguments("out", per_device_train_batch_size=3, gradient_accumulation_steps=2, bf16=True,
                         optim="paged_adamw_8bit")
Trainer(model=model, args=args).train()
"""


def test_constants_are_read_with_their_lines(tmp_path):
    """Model, length, batch, accumulation, precision, adapter and quantisation stand in the source, unrun."""
    script = tmp_path / "train.py"
    script.write_text(CONSTANTS)
    found = read_script(script, find_model=resolve_model)
    job = job_from_discovery(found, CLUSTER, script=script)
    assert job.model.name == SMOLLM2
    assert found.where["model"] == "read in train.py:5"
    assert (job.workload.sequence_tokens, job.workload.global_batch_sequences) == (384, 12)
    assert (job.restrictions.methods, job.restrictions.precision) == (("qlora",), "bf16")
    assert job.restrictions.lora == Lora(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=("q_proj", "v_proj"))
    assert job.restrictions.optims == ("paged_adamw_8bit",)
    assert next(iter(job.found)) == "guessed"


@pytest.mark.parametrize("form", ["flags", "yaml", "json"])
def test_what_is_passed_goes_before_the_source(tmp_path, form):
    """Flags of HfArgumentParser's kind, and the top level of a YAML or JSON file, say what the script would train."""
    said = {"model_name_or_path": SMOLLM2, "block_size": 64, "per_device_train_batch_size": 5}
    if form == "flags":
        arguments = [word for name, value in said.items() for word in (f"--{name}", str(value))]
    else:
        (tmp_path / f"c.{form}").write_text(json.dumps(said))  # JSON is YAML too
        arguments = [str(tmp_path / f"c.{form}")]
    job = job_from_discovery(read_script(EXAMPLES / "run_clm.py", arguments, find_model=resolve_model), CLUSTER)
    assert job.model.name == SMOLLM2
    assert (job.workload.sequence_tokens, job.workload.global_batch_sequences) == (64, 10)


def test_trls_defaults_are_known(tmp_path):
    """trl trains in bf16 unless told otherwise, and its loss never holds all logits; packing is said by a literal."""
    script = tmp_path / "sft.py"
    script.write_text(
        f'SFTTrainer(model=AutoModelForCausalLM.from_pretrained("{SMOLLM2}"), '
        'args=SFTConfig("out", max_length=512, packing=True)).train()'
    )
    found = read_script(script, find_model=resolve_model)
    assert found.lengths == FoundLengths(sequence_tokens=512, num_samples_seen=0, num_samples=None, batching="packed")
    assert (found.loss, found.arguments["bf16"]) == ("chunked", True)


def test_the_users_model_and_length_go_before_all(tmp_path):
    """--model and --seq-len answer what the source does not say; without them that is said."""
    script = tmp_path / "train.py"
    script.write_text("Trainer(model=build(), args=TrainingArguments('out')).train()")
    with pytest.raises(InputError, match="does not say which model"):
        read_script(script, find_model=resolve_model)
    model = resolve_model(SMOLLM2)
    found = read_script(script, find_model=resolve_model, model=model)
    with pytest.raises(InputError, match="--seq-len"):
        job_from_discovery(found, CLUSTER, Overrides(model=model))
    job = job_from_discovery(found, CLUSTER, Overrides(model=model, sequence_tokens=128))
    assert job.workload.global_batch_sequences == 16


def test_what_is_no_python_is_refused(tmp_path):
    """A syntax error is an input error with the line."""
    script = tmp_path / "train.py"
    script.write_text("def f(:\n")
    with pytest.raises(InputError, match="line 1"):
        read_script(script, find_model=resolve_model)


def test_a_loop_of_ones_own_is_read_as_one(tmp_path):
    """Batch, accumulation and optimizer of the example's loop are the defaults of its options, with their lines."""
    found = read_script(
        EXAMPLES / "accelerate_loop.py", ["--model", SMOLLM2, "--batch-size=3"], find_model=resolve_model
    )
    said = found.arguments
    assert found.is_loop
    assert (said["per_device_train_batch_size"], said["gradient_accumulation_steps"], said["optim"]) == (
        3,
        2,
        "adamw_torch",
    )
    line = next(
        number
        for number, text in enumerate((EXAMPLES / "accelerate_loop.py").read_text().splitlines(), start=1)
        if '"--gradient-accumulation-steps"' in text
    )
    assert found.where["arguments"] == f"the batch as --batch-size says, accumulation read in accelerate_loop.py:{line}"
    job = job_from_discovery(found, CLUSTER, Overrides(sequence_tokens=128))
    assert (job.workload.global_batch_sequences, job.restrictions.micro_batch_sequences) == (12, (3,))
