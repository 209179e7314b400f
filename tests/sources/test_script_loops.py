"""A loop of the script's own with accelerate counts itself: batch, accumulation, optimizer and precision are found."""

import pytest

from autofit.errors import InputError
from autofit.sources.hardware import parse_cluster
from autofit.sources.script import discover
from autofit.sources.script_job import Overrides, job_from_discovery
from autofit.spec.job import Restrictions

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


def test_accumulate_and_a_loss_of_ones_own_are_understood(tmp_path):
    """Logits have the shape of the head, a loss of them needs no weights, and what the script fixes is kept."""
    found = found_in(tmp_path, OWN_LOSS)
    said = found.arguments
    assert (said["per_device_train_batch_size"], said["gradient_accumulation_steps"]) == (2, 5)
    assert (said["optim"], found.checkpoints) == ("adamw_torch_fused", True)
    assert found.config["architectures"] == ["LlamaForSequenceClassification"]
    job = job_from_discovery(found, CLUSTER)
    assert (job.restrictions.gradient_checkpointing, job.restrictions.precision) == (True, "fp32")


@pytest.mark.parametrize(
    ("wishes", "says"),
    [
        (Overrides(global_batch_sequences=64), "--global-batch"),
        (Overrides(restrictions=Restrictions(micro_batch_sequences=(1,))), "--micro-batch"),
        (Overrides(restrictions=Restrictions(shardings=("zero2",))), "without sharding"),
        (Overrides(restrictions=Restrictions(num_processes=(1,))), "number of devices"),
    ],
)
def test_what_a_loop_does_itself_cannot_be_asked_for(wishes, says):
    """Options that nothing would put into effect are refused, each by its name."""
    from autofit.spec.discovered import Discovered, FoundLengths

    said = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "optim": "adamw_torch"}
    found = Discovered(
        model_name="tiny",
        config={"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
        weights_dtype=None,
        attention="sdpa",
        adapter=None,
        quantization=None,
        trainer="a loop",
        lengths=FoundLengths(sequence_tokens=8, num_samples_seen=1, num_samples=1),
        is_loop=True,
        arguments=said,
    )
    with pytest.raises(InputError) as refusal:
        job_from_discovery(found, CLUSTER, wishes)
    assert says in str(refusal.value)


def test_batches_split_over_processes_are_refused(tmp_path):
    """Under `split_batches` a DataLoader's batch is that of all processes, which is not planned for."""
    body = OWN_LOSS.replace(
        'Accelerator(gradient_accumulation_steps=5, mixed_precision="no")',
        "Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True))",
    ).replace("import Accelerator", "import Accelerator, DataLoaderConfiguration")
    with pytest.raises(InputError, match="split_batches"):
        found_in(tmp_path, body)
