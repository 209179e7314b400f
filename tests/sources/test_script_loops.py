"""A loop of the script's own with accelerate counts itself: batch, accumulation, optimizer and precision are found."""

import pytest

from autofit.errors import InputError
from autofit.runtime.discover.loop_source import LoopSource, read_loop
from autofit.sources.hardware import parse_cluster
from autofit.sources.script import discover
from autofit.sources.script_job import Overrides, job_from_discovery
from autofit.spec.discovered import Discovered, FoundLengths, FoundLoop
from autofit.spec.job import Restrictions, ScriptLoop

pytestmark = pytest.mark.slow
CLUSTER = parse_cluster("2xCPU-8G")
HEAD = """
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
config = LlamaConfig(**sizes, pad_token_id=0)
rows = [{"input_ids": torch.ones(12, dtype=torch.int64), "labels": torch.ones(12, dtype=torch.int64)}] * 40
"""
BY_HAND = (
    HEAD
    + """
accelerator = Accelerator(mixed_precision="bf16")
model = LlamaForCausalLM(config)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loader, held_out = DataLoader(rows, batch_size=3), DataLoader(rows, batch_size=7)
model, optimizer, loader, held_out = accelerator.prepare(model, optimizer, loader, held_out)
for step, batch in enumerate(loader):
    if step == 1:
        model.eval()
        with torch.no_grad():
            for other in held_out:
                accelerator.gather_for_metrics(model(**other).logits.argmax(-1))
        model.train()
    loss = model(**batch).loss / 4
    accelerator.backward(loss)
    if (step + 1) % 4 == 0:
        optimizer.step()
        optimizer.zero_grad()
"""
)
OWN_LOSS = (
    HEAD
    + """
accelerator = Accelerator(gradient_accumulation_steps=5, mixed_precision="no")
model = LlamaForSequenceClassification(config)
model.gradient_checkpointing_enable()
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows, batch_size=2))
model.train()
for batch in loader:
    with accelerator.accumulate(model):
        logits = model(batch["input_ids"]).logits
        loss = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 0])
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(loss.item())
"""
)


def found_in(tmp_path, body):
    """Discover a script."""
    script = tmp_path / "loop.py"
    script.write_text(body, encoding="utf-8")
    return discover(script, time_limit_seconds=120)


def test_accumulation_by_hand_is_counted(tmp_path):
    """Four backward passes come before the first step; an evaluation in between neither counts nor confuses."""
    found = found_in(tmp_path, BY_HAND)
    said = found.arguments
    assert (said["per_device_train_batch_size"], said["gradient_accumulation_steps"]) == (3, 4)
    assert (said["optim"], said["bf16"], found.checkpoints) == ("sgd", True, False)
    job = job_from_discovery(found, CLUSTER)
    assert (job.workload.global_batch_sequences, job.workload.sequence_tokens) == (24, 12)
    restrictions = job.restrictions
    assert (restrictions.optims, restrictions.precision, restrictions.shardings) == (("sgd",), "bf16", ("ddp",))
    assert (restrictions.micro_batch_sequences, restrictions.keeps_outputs) == ((3,), True)
    assert "DeepSpeed would step in every micro-step" in job.found["sharding"]
    assert job.script_loop == ScriptLoop(
        per_device_train_batch_size=3, gradient_accumulation_steps=4, accumulates_by_hand=True, train_loader=0
    )
    with pytest.raises(InputError, match="decides in its own code when the optimizer steps"):
        job_from_discovery(found, CLUSTER, Overrides(frees_settings=True))


def test_accumulate_and_a_loss_of_ones_own_are_understood(tmp_path):
    """Logits have the shape of the head, a loss of them needs no weights, and what the script fixes is kept."""
    found = found_in(tmp_path, OWN_LOSS)
    said = found.arguments
    assert (said["per_device_train_batch_size"], said["gradient_accumulation_steps"]) == (2, 5)
    assert (said["optim"], found.checkpoints) == ("adamw_torch_fused", True)
    assert found.config["architectures"] == ["LlamaForSequenceClassification"]
    job = job_from_discovery(found, CLUSTER)
    assert (job.restrictions.gradient_checkpointing, job.restrictions.precision) == (True, "fp32")
    assert found.loop == FoundLoop(accumulates_by_hand=False, max_grad_norm=1.0, train_loader=0)
    assert "sharding" not in job.found
    freed = job_from_discovery(found, CLUSTER, Overrides(frees_settings=True)).restrictions
    assert (freed.micro_batch_sequences, freed.precision, freed.gradient_checkpointing) == ((), "auto", None)
    assert freed.optims == ("adamw_torch_fused",)


def a_loop(num_micro_steps=2, **facts):
    """Return a discovered loop of batches of two."""
    optim = {"optim": "adamw_torch"}
    batch = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": num_micro_steps}
    return Discovered(
        model_name="tiny",
        config={"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
        weights_dtype=None,
        attention="sdpa",
        adapter=None,
        quantization=None,
        trainer="a loop",
        lengths=FoundLengths(sequence_tokens=8, num_samples_seen=1, num_samples=1),
        loop=FoundLoop(**{"accumulates_by_hand": False} | facts),
        arguments=batch | optim,
    )


@pytest.mark.parametrize(
    ("wishes", "says"),
    [
        (Overrides(global_batch_sequences=64), "--global-batch"),
        (Overrides(restrictions=Restrictions(micro_batch_sequences=(1,))), "--override beside it"),
        (Overrides(restrictions=Restrictions(num_processes=(1,))), "number of devices"),
    ],
)
def test_what_a_loop_does_itself_cannot_be_asked_for(wishes, says):
    """Options that nothing would put into effect are refused, each by its name."""
    with pytest.raises(InputError) as refusal:
        job_from_discovery(a_loop(), CLUSTER, wishes)
    assert says in str(refusal.value)


@pytest.mark.parametrize(
    ("facts", "allowed"),
    [
        ({}, ()),
        ({"accumulates_by_hand": True}, ("ddp",)),
        ({"accumulates_by_hand": True, "num_micro_steps": 1}, ()),
        ({"prepares_apart": True}, ("ddp",)),
        ({"schedules_apart": True}, ("ddp",)),
        ({"clips_itself": "train.py:7"}, ("ddp",)),
        ({"reads_gradients": "train.py:7"}, ("ddp",)),
        ({"reads_norm": "train.py:7"}, ("ddp",)),
        ({"saves_its_share": "train.py:7"}, ("ddp", "zero1", "zero2")),
    ],
)
def test_a_loop_is_sharded_where_it_trains_the_same(facts, allowed):
    """What a loop does with gradients, schedule and weights leaves out the engines under which it would not."""
    job = job_from_discovery(a_loop(**facts), CLUSTER)
    assert job.restrictions.shardings == allowed
    assert bool(allowed) == ("sharding" in job.found)
    if allowed:
        with pytest.raises(InputError, match="cannot be sharded as zero3: it "):
            job_from_discovery(a_loop(**facts), CLUSTER, Overrides(restrictions=Restrictions(shardings=("zero3",))))


def test_fsdp_is_a_loops_where_only_deepspeed_is_not():
    """Gradients that accumulate by the script's own code are no matter to FSDP."""
    wishes = Overrides(restrictions=Restrictions(shardings=("fsdp2",)))
    assert job_from_discovery(a_loop(accumulates_by_hand=True), CLUSTER, wishes).restrictions.shardings == ("fsdp2",)


def test_another_micro_batch_is_a_loops_only_with_override():
    """--override frees the split of the global batch, --micro-batch then chooses it; what keeps a batch says why."""
    asked = Overrides(restrictions=Restrictions(micro_batch_sequences=(1, 4)), frees_settings=True)
    job = job_from_discovery(a_loop(), CLUSTER, asked)
    assert job.restrictions.micro_batch_sequences == (1, 4)
    assert job.workload.global_batch_sequences == 8
    with pytest.raises(InputError, match="which skips batches: --override cannot"):
        job_from_discovery(a_loop(keeps_batch="skips batches"), CLUSTER, asked)


APART = (
    HEAD
    + """
accelerator = Accelerator(gradient_accumulation_steps=2)
model = LlamaForCausalLM(config)
optimizer = torch.optim.AdamW(model.parameters())
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=40)
model = accelerator.prepare(model)
optimizer, schedule = accelerator.prepare(optimizer, schedule)
loader = DataLoader(rows, batch_size=2)
print(accelerator.gradient_accumulation_steps)
for batch in loader:
    with accelerator.accumulate(model):
        accelerator.backward(model(**batch).loss)
        if accelerator.sync_gradients:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
"""
)


def test_what_a_loop_does_apart_is_found(tmp_path):
    """Model, optimizer and schedule in several `prepare`s, torch's own clipping, a loader that is not prepared."""
    loop = found_in(tmp_path, APART).loop
    assert loop is not None
    assert (loop.prepares_apart, loop.schedules_apart, loop.train_loader) == (True, True, None)
    assert (loop.max_grad_norm, loop.clips_itself) == (None, "loop.py:22")
    assert loop.keeps_batch == "iterates a DataLoader that is not prepared"


def test_how_a_loop_saves_is_read(tmp_path):
    """Saving that gathers is told from saving that does not, a model's from a tokenizer's, a number from a tensor."""
    script = tmp_path / "train.py"
    script.write_text(
        "tokenizer.save_pretrained(out)\n"
        "norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)\n"
        "log(float(norm))\n"
        "accelerator.unwrap_model(model).save_pretrained(out)\n"
        "log(norm.item())\n"
        "total = sum(p.grad.norm() for p in model.parameters())\n"
        "loader = accelerator.skip_first_batches(loader, 3)\n"
    )
    assert read_loop(script) == LoopSource(
        saves_its_share="train.py:4", reads_norm="train.py:5", reads_gradients="train.py:6", skips_batches="train.py:7"
    )
    script.write_text("w = accelerator.get_state_dict(model)\nunwrapped.save_pretrained(out, state_dict=w)\n")
    assert read_loop(script) == LoopSource()


def test_batches_split_over_processes_are_refused(tmp_path):
    """Under `split_batches` a DataLoader's batch is that of all processes, which is not planned for."""
    body = OWN_LOSS.replace(
        'Accelerator(gradient_accumulation_steps=5, mixed_precision="no")',
        "Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True))",
    ).replace("import Accelerator", "import Accelerator, DataLoaderConfiguration")
    with pytest.raises(InputError, match="split_batches"):
        found_in(tmp_path, body)
