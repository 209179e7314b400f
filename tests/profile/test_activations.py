"""What a step keeps for backward, against the real model on the CPU, whose living storages are counted."""

from __future__ import annotations

import functools
import gc
import importlib.util
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from msgspec.structs import replace
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from autofit.errors import InputError
from autofit.memory.assemble import estimate_memory
from autofit.memory.evaluation import evaluation_bytes, forward_bytes
from autofit.memory.fused_losses import bound_on, liger_chunk_tokens
from autofit.memory.inference import kv_cache_bytes, kv_cache_elements
from autofit.memory.tape import offloaded_bytes, phase_peaks
from autofit.memory.unroll import unroll
from autofit.profile import batching, losses
from autofit.profile.recorder import Recorder
from autofit.profile.trace import trace
from autofit.runtime.live_bytes import LiveBytes
from autofit.sources.hardware import parse_cluster
from autofit.sources.script_job import job_from_discovery
from autofit.spec.configuration import Evaluation, Lora, Loss
from autofit.spec.discovered import Discovered, FoundLengths
from autofit.spec.job import Workload
from autofit.spec.profile import MONOMIALS, ON_HOST, RegimeProfile
from tests.plans import a_configuration
from tests.profile.tiny import CONFIGS, a_regime, every_layer_traced

BATCH, TOKENS = 3, 200
"""Neither was traced."""
NUM_STEPS = 2
"""The first makes what libraries make once."""
Batch = dict[str, torch.Tensor]


def equal() -> Batch:
    """Make sequences of one length."""
    ids = torch.randint(0, 8, (BATCH, TOKENS))
    return {"input_ids": ids, "labels": ids}


def padded() -> Batch:
    """Make sequences of which one is a token shorter."""
    mask = torch.ones(BATCH, TOKENS, dtype=torch.long)
    mask[0, -1] = 0
    return {**equal(), "attention_mask": mask}


def packed() -> Batch:
    """Make the same sequences in one row."""
    ids = torch.randint(0, 8, (1, BATCH * TOKENS))
    return {"input_ids": ids, "labels": ids, "position_ids": torch.arange(TOKENS).repeat(BATCH)[None]}


def real_model(name: str, attention: str = "sdpa", dtype: torch.dtype = torch.bfloat16) -> Any:
    """Build a model with weights, ready to train."""
    values = {key: value for key, value in CONFIGS[name].items() if key != "model_type"}
    config = AutoConfig.for_model(CONFIGS[name]["model_type"], **values, use_cache=False)
    config._attn_implementation = attention
    return AutoModelForCausalLM.from_config(config, dtype=dtype).train()


def measured(model: Any, make_batch: Callable[[], Batch], **arguments: Any) -> int:
    """Return the most bytes alive above the model's own in a second forward and backward, the batch included."""
    counter, peak = LiveBytes(), 0
    with counter:
        for tensor in [*model.parameters(), *model.buffers()]:
            counter.add(tensor)
        for _ in range(NUM_STEPS):
            gc.collect()
            before = counter.now_bytes
            counter.reset_peak()
            batch = make_batch()
            held = batch if len(batch) > 2 else None
            loss = model(**batch, **arguments)["loss"]
            del batch
            loss.backward()
            del loss, held
            peak = counter.peak_bytes - before
            for parameter in model.parameters():
                parameter.grad = None
    return peak


@functools.cache
def traced(name: str, **regime: Any) -> RegimeProfile:
    """Trace a tiny model on a CPU rank in bf16."""
    return trace(name, CONFIGS[name], a_regime(**regime))


def predicted(profile: RegimeProfile) -> int:
    """Return the highest phase at the measured size."""
    return int(max(peak.kept[0] for peak in phase_peaks(profile, [BATCH], TOKENS)))


def test_every_second_layer_is_computed_again():
    """With `every_n_layers=2` the peak of a real step is predicted to the byte."""
    model = real_model("llama")
    model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=2)
    profile = traced("llama", gradient_checkpointing=True, checkpoint_every_n_layers=2)
    assert predicted(profile) == measured(model, equal)
    assert predicted(profile) > 1.5 * predicted(traced("llama", gradient_checkpointing=True))


class HostMemory:
    """Takes what checkpoints save out of torch, so that the counter sees no storage of it, and counts it here."""

    def __init__(self) -> None:
        self.now_bytes = self.peak_bytes = 0

    def pack(self, tensor: torch.Tensor) -> tuple[HostMemory, np.ndarray]:
        """Copy a tensor's bytes."""
        copy = tensor.detach().contiguous().view(torch.int16).numpy().copy()
        self.now_bytes += copy.nbytes
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)
        return self, copy

    def unpack(self, packed_bytes: tuple[HostMemory, np.ndarray]) -> torch.Tensor:
        """Make a tensor of them again."""
        return torch.from_numpy(packed_bytes[1]).view(torch.bfloat16).clone()


def test_offloaded_checkpoints_are_the_hosts(monkeypatch):
    """With `offload` what layers save leaves the device: device and host are predicted to the byte."""
    host = HostMemory()
    hooks = lambda **_: saved_tensors_hooks(host.pack, host.unpack)  # noqa: E731
    monkeypatch.setattr(transformers.modeling_utils, "save_on_cpu", hooks)
    model = real_model("llama")
    model.activation_checkpointing_enable({"use_reentrant": False}, offload=True)
    profile = traced("llama", gradient_checkpointing=True, checkpoint_offload=True)
    assert predicted(profile) == pytest.approx(measured(model, equal), abs=8 * BATCH * TOKENS)
    assert NUM_STEPS * offloaded_bytes(profile, [BATCH], TOKENS)[0] == host.peak_bytes > 0
    pinned = replace(profile, regime=replace(profile.regime, device="cuda"))
    each = BATCH * TOKENS * CONFIGS["llama"]["hidden_size"] * 2
    assert offloaded_bytes(pinned, [BATCH], TOKENS)[0] == profile.num_layers * 2 ** (each - 1).bit_length() > each


def test_no_offloaded_activation_reaches_the_devices_allocator():
    """Written out at full depth, the step has no event on the host, and frees only what was made."""
    profile = traced("llama", gradient_checkpointing=True, checkpoint_offload=True)
    events = [event for segment in unroll(profile, BATCH, TOKENS).segments() for event in segment]
    assert all(event.category != ON_HOST for event in events)
    made = {event.number_of for event in events if event.is_birth}
    assert {event.number_of for event in events if not event.is_birth} <= made


def test_checkpoints_of_a_kind_that_the_release_lacks_are_refused(monkeypatch):
    """A transformers that knows only `gradient_checkpointing_enable` cannot skip layers."""
    monkeypatch.delattr(transformers.PreTrainedModel, "activation_checkpointing_enable")
    with pytest.raises(InputError, match="every_n_layers"):
        traced.__wrapped__("llama", gradient_checkpointing=True, checkpoint_every_n_layers=2)


def test_dropout_keeps_its_masks():
    """GPT-2 drops a tenth after attention and MLP, by default: its masks are counted, to the byte."""
    assert predicted(traced("gpt2")) == measured(real_model("gpt2"), equal)


@pytest.mark.slow
def test_an_adapters_dropout_keeps_its_masks():
    """With `lora_dropout` each adapter's dropped input and mask are counted, to the byte."""
    from peft import LoraConfig, get_peft_model

    lora = Lora(lora_dropout=0.1)
    model = get_peft_model(
        real_model("llama"), LoraConfig(r=16, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    profile = traced("llama", method="lora", lora=lora)
    assert predicted(profile) == measured(model, equal)
    assert predicted(profile) > 1.2 * predicted(traced("llama", method="lora", lora=Lora()))


BATCHES = {"padded": padded, "packed": packed}


@pytest.mark.parametrize(
    ("attention", "shared"),
    [
        ("sdpa", "padded"),
        ("sdpa", "packed"),
        pytest.param("eager", "padded", marks=pytest.mark.slow),
        pytest.param("eager", "packed", marks=pytest.mark.slow),
    ],
)
def test_masks_of_padded_and_packed_batches(attention, shared):
    """With holes, or several sequences in a row, transformers builds its masks: the peak is predicted to the byte."""
    profile = traced("llama", attention=attention, batching=shared)
    assert predicted(profile) == measured(real_model("llama", attention), BATCHES[shared])


def test_a_mask_of_ones_is_no_mask():
    """Only the mask itself, 8 bytes a token, is more than without one: transformers skips it."""
    without = measured(real_model("llama"), equal)
    ones = {"attention_mask": torch.ones(BATCH, TOKENS, dtype=torch.long)}
    with_ones = measured(real_model("llama"), lambda: {**equal(), **ones})
    assert abs(with_ones - without) <= 2 * 8 * BATCH * TOKENS


def test_a_packed_rows_mask_grows_with_the_square_of_the_row():
    """Twice the sequences in a row take four times the mask, though each is as long as before."""
    profile = traced("llama", attention="eager", batching="packed")
    small, large = (max(p.kept[0] for p in phase_peaks(profile, [b], 1024)) for b in (4, 8))
    assert large / small == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("shared", ["padded", pytest.param("packed", marks=pytest.mark.slow)])
def test_flash_attention_without_padding(shared, monkeypatch):
    """transformers' own flash code, torch's kernel in its place: unpadded copies are counted, and no mask is."""
    flash = "transformers.modeling_flash_attention_utils"
    utils = importlib.import_module(flash)

    def one_row(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        kwargs = {name: kwargs[name] for name in ("causal", "dropout_p", "softmax_scale")}
        return batching._flash(q[None], k[None], v[None], **kwargs)[0]

    functions = (batching._flash, one_row, None, utils._pad_input, utils._unpad_input)
    with monkeypatch.context() as patched:
        patched.setattr(
            utils, "lazy_import_flash_attention", lambda *_a, **_k: (functions, (batching._causal_only, dict))
        )
        model = real_model("llama")
        model.config._attn_implementation_internal = "flash_attention_2"
        real = measured(model, BATCHES[shared])
    profile = traced("llama", attention="flash_attention_2", batching=shared)
    assert 0 <= predicted(profile) / real - 1 < 1 / TOKENS


@pytest.mark.slow
@pytest.mark.parametrize("checkpoints", [False, True])
def test_trls_chunked_head(checkpoints):
    """TRL's head goes through the vocabulary in chunks and never holds all logits: predicted to a few bytes."""
    from trl.trainer.utils import add_fused_lm_head

    model = real_model("llama")
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    if checkpoints:
        model.activation_checkpointing_enable({"use_reentrant": False})
    real = measured(model, equal, fused_lm_head=True, num_items_in_batch=torch.tensor(BATCH * TOKENS))
    profile = traced("llama", loss="chunked", gradient_checkpointing=checkpoints)
    assert predicted(profile) == pytest.approx(real, abs=64)


def test_a_chunk_of_tokens_has_no_more_rows_than_the_library_gives_it():
    """Liger's chunk is the power of two next to a vocabulary's share; TRL's stops growing at 4096 tokens."""
    llama = SimpleNamespace(vocab_size=128256, hidden_size=4096)
    assert [liger_chunk_tokens(tokens, llama) for tokens in (1, 1000, 16384)] == [1, 32, 512]
    chunked = SimpleNamespace(regime=a_regime(loss="chunked"), only_length=None)
    row = 32768 * 2.0
    assert bound_on((0.0, -row, 0.0, row, 0.0, 0.0), chunked, 10**6) == 4096 * row
    assert bound_on((0.0, 0.0, 0.0, row, 0.0, 0.0), chunked, 10**6) is None


def head_bytes(forward: Callable[..., Any], hidden: torch.Tensor, weight: torch.Tensor) -> int:
    """Return the most that Liger's head holds: hidden states, weight, and what it allocates."""
    recorder = Recorder({})
    recorder.mark("head", "forward")
    recorder.ignore([hidden, weight])
    target = torch.zeros(hidden.shape[0], dtype=torch.int64)
    with recorder, torch.no_grad():
        out = forward(_input=hidden, weight=weight, target=target)
    alive = highest = 0
    for event in recorder.segments[0].events:
        alive += event[0] if len(event) == 2 else -event[0]
        highest = max(highest, alive)
    del out
    return highest + sum(t.numel() * t.element_size() for t in (hidden, weight))


@pytest.mark.parametrize(("sums_in_place", "temporary"), [(True, 0), (False, 64 * (2 + 4))])
def test_ligers_head_by_hand(sums_in_place, temporary):
    """Hidden states and their gradient, the head and its gradient, one chunk of logits, a loss for each token.

    Before Ampere the head's gradient is also there as a product in bf16, and that in fp32.
    """
    with FakeTensorMode():
        hidden, weight = (torch.empty(rows, 64, dtype=torch.bfloat16, requires_grad=True) for rows in (4096, 512))
        highest = head_bytes(losses._fused_forward(lambda _moved: None, sums_in_place=sums_in_place), hidden, weight)
    logits, losses_and_count = 4096 * 512 * 2, 4096 * 4 + 8
    by_hand = 2 * 2 * 64 * (4096 + 512) + logits + losses_and_count + 512 * temporary
    assert by_hand <= highest <= by_hand + 8


def test_ligers_own_head_allocates_what_its_stand_in_does():
    """Where a vocabulary is no wider than the model, Liger has one chunk: its own code on a CPU, launches left out."""
    _, fused, _ = losses._import_liger()
    hidden, weight = (torch.randn(rows, 64, requires_grad=True) for rows in (48, 64))
    target = torch.zeros(48, dtype=torch.int64)
    peaks = []
    for forward in (
        fused.fused_linear_cross_entropy_forward,
        losses._fused_forward(lambda _moved: None, sums_in_place=False),
    ):
        counter = LiveBytes()
        with counter, torch.no_grad(), losses._telling_of_launches(lambda _moved: None):
            kept = forward(_input=hidden, weight=weight, target=target)
        peaks.append(counter.peak_bytes)
        del kept
    logits_by_input = 48 * 64 * 4
    assert 0 <= peaks[0] - peaks[1] <= logits_by_input + 4096


@pytest.mark.slow
@pytest.mark.parametrize("checkpoints", [False, True])
def test_ligers_own_layers_and_head(checkpoints, monkeypatch):
    """Liger's own code on a CPU with real tensors, only its launches left out, is predicted within 0.01 %."""
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(losses, "_refuse_a_cpu", lambda _regime: None)
    monkeypatch.setattr(losses, "_writes_in_place", lambda *_tensors: False)
    monkeypatch.setattr(losses, "MOST_MULTIPROCESSORS", 1)
    model = real_model("llama")
    if checkpoints:
        model.activation_checkpointing_enable({"use_reentrant": False})
    liger, _, _ = losses._import_liger()
    library = dict(vars(modeling_llama))
    try:
        with losses._triton_or_stand_in(), losses._telling_of_launches(lambda _moved: None):
            liger._apply_liger_kernel_to_instance(model=model)
            real = measured(model, equal, num_items_in_batch=torch.tensor(BATCH * TOKENS))
    finally:
        vars(modeling_llama).update(library)
    profile = traced("llama", loss="liger", flash_kernel=False, gradient_checkpointing=checkpoints)
    assert predicted(profile) == pytest.approx(real, rel=1e-4)


@pytest.mark.slow
def test_experts_multiply_as_much_in_ligers_kernels():
    """A Mixtral's FLOPs are the same whether torch's operators or Liger's kernels multiply its experts' matrices."""
    config = {**CONFIGS["llama"], "model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
    config |= {"num_local_experts": 4, "num_experts_per_tok": 2}

    def flops(loss):
        profile = trace("mixtral", config, a_regime(device="cuda", loss=loss))
        each = [(profile.repeats(s), s.matmul_flops) for s in profile.segments]
        return [sum(times * polynomial[n] for times, polynomial in each) for n in range(len(MONOMIALS))]

    assert flops("liger") == pytest.approx(flops("stock"))


def test_what_ligers_kernels_move_is_counted_by_hand(monkeypatch):
    """A layer's norms, rotation and MLP: what each reads and writes, forward and backward.

    A norm reads rows and writes them, and in backward reads two and writes one, with its weight, the rows' roots and
    sums for the weight's gradient. Rotation changes queries and keys in place in both. The MLP's kernel reads two and
    writes one, and in backward reads three and writes over two of them. A root's dtype is Triton's to say, where it is
    installed: a thousandth.
    """
    moved = {}
    launched = Recorder.launched

    def adding(recorder: Recorder, args: Sequence[Any]) -> None:
        before = recorder.segments[-1].other_bytes
        launched(recorder, args)
        moved[layers] += recorder.segments[-1].other_bytes - before

    monkeypatch.setattr(Recorder, "launched", adding)
    sequences, length = 2, 256
    hidden, keys, inner, head = 128, 64, 256, 32
    for layers in (2, 3):
        moved[layers] = 0
        config = {**CONFIGS["llama"], "num_hidden_layers": layers}
        every_layer_traced(config, a_regime(device="cuda", loss="liger"), [(sequences, length)])
    rows, half, full = sequences * length, 2, 4
    weight, root, sums = hidden * half, rows * full, hidden * full
    norm = (2 + 3) * rows * hidden * half + 2 * (weight + root) + sums
    rotation = 2 * (2 * rows * (hidden + keys) + 2 * length * head) * half
    mlp = (3 + 5) * rows * inner * half
    num_steps = 2  # the first of them warms up
    assert moved[3] - moved[2] == pytest.approx(num_steps * (2 * norm + rotation + mlp), rel=2e-3)


def test_liger_shrinks_layers_and_head():
    """Its norms, rotation and MLP save less than transformers', and logits are gone; nothing is left patched."""
    from transformers.models.llama import modeling_llama

    before = dict(vars(modeling_llama))
    stock = traced("llama", device="cuda")
    liger = traced("llama", device="cuda", loss="liger")
    assert predicted(liger) < 0.7 * predicted(stock)
    assert {name: value for name, value in vars(modeling_llama).items() if name in before} == before
    item, equal_values = torch.Tensor.item, torch.equal
    assert item(torch.ones(())) == 1.0
    assert equal_values(torch.ones(1), torch.ones(1))


def test_a_model_that_liger_does_not_know_is_refused():
    """Liger has no kernels for GPT-2, and Trainer would run it without any."""
    with pytest.raises(InputError, match="gpt2"):
        traced("gpt2", device="cuda", loss="liger")


def test_liger_is_refused_on_a_cpu():
    """Its kernels run on GPUs."""
    with pytest.raises(InputError, match="GPU"):
        traced("llama", loss="liger")


def found(loss: Loss = "stock", **arguments: Any) -> Discovered:
    """Return what discovery hands back of a script with this loss and these training arguments."""
    return Discovered(
        model_name="tiny",
        config={**CONFIGS["llama"], "architectures": ["LlamaForCausalLM"]},
        weights_dtype="bfloat16",
        attention="sdpa",
        adapter=None,
        quantization=None,
        trainer="Trainer",
        loss=loss,
        lengths=FoundLengths(sequence_tokens=64, num_samples_seen=1, num_samples=1),
        arguments={"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, **arguments},
    )


def test_a_compiled_script_is_refused_and_ligers_is_planned_as_such():
    """`torch_compile` is not guessed at, and the loss that discovery finds is the one that is planned."""
    cluster = parse_cluster("1xCPU-8G")
    with pytest.raises(InputError, match="torch_compile"):
        job_from_discovery(found(torch_compile=True), cluster)
    assert job_from_discovery(found("liger"), cluster).restrictions.loss == "liger"
    assert job_from_discovery(found(), cluster).restrictions.loss == "stock"


def peak_of_evaluation(trainer: Trainer) -> int:
    """Let a real trainer evaluate; return the most bytes alive above its model."""
    gc.collect()
    counter = LiveBytes()
    with counter:
        for tensor in [*trainer.model.parameters(), *trainer.model.buffers()]:
            counter.add(tensor)
        before = counter.now_bytes
        counter.reset_peak()
        trainer.evaluate()
        return counter.peak_bytes - before


def generate(folder: str) -> int:
    """Let the real model write a second half to a first one; return the most bytes alive above it."""
    model = real_model("llama", dtype=torch.bfloat16)
    arguments = Seq2SeqTrainingArguments(
        folder,
        per_device_eval_batch_size=BATCH,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        predict_with_generate=True,
        generation_max_length=TOKENS,
    )
    model.generation_config.eos_token_id = None
    rows = [{"input_ids": torch.randint(0, 8, (TOKENS // 2,)), "labels": torch.randint(0, 8, (TOKENS // 2,))}] * BATCH
    trainer = Seq2SeqTrainer(model, arguments, eval_dataset=rows, data_collator=default_data_collator)
    return peak_of_evaluation(trainer)


def test_an_evaluation_that_generates_is_bounded(tmp_path):
    """What the real Seq2SeqTrainer's `predict_with_generate` takes is within what is planned for the whole length,
    which is a forward pass over it and the cache of it.
    """
    real = generate(str(tmp_path))
    elements = kv_cache_elements(CONFIGS["llama"], batch=1, tokens=TOKENS)
    evaluation = Evaluation(
        per_device_eval_batch_size=BATCH, predict_with_generate=True, cache_elements_per_sequence=elements
    )
    configuration = a_configuration(weights_dtype="bfloat16", mixed_precision="no", evaluation=evaluation)
    profile = trace("llama", CONFIGS["llama"], a_regime())
    cluster = parse_cluster("1xCPU-8G")
    workload = Workload(sequence_tokens=TOKENS, global_batch_sequences=1)
    memory = estimate_memory(profile, configuration, cluster, workload, replays=True)
    assert memory.stages is not None
    assert memory.stages.evaluation is not None
    planned = memory.stages.evaluation.device_bytes - (memory.after_step_allocated_bytes or 0)
    assert real <= planned <= 3 * real
    cached = kv_cache_bytes(CONFIGS["llama"], batch=BATCH, tokens=TOKENS)
    assert planned == forward_bytes(profile, BATCH, TOKENS) + cached


def evaluate(*, keeps_logits: bool, num_batches: int, mixed: bool, folder: str) -> int:
    """Run the real Trainer's evaluation; return the most bytes alive above the model."""
    model = real_model("llama", dtype=torch.float32 if mixed else torch.bfloat16)
    rows = [
        {"input_ids": torch.randint(0, 8, (TOKENS,)), "labels": torch.randint(0, 8, (TOKENS,))}
        for _ in range(BATCH * num_batches)
    ]
    trainer = Trainer(
        model,
        TrainingArguments(
            folder, per_device_eval_batch_size=BATCH, use_cpu=True, bf16=mixed, report_to=[], disable_tqdm=True
        ),
        eval_dataset=rows,
        data_collator=default_data_collator,
        compute_metrics=(lambda _predictions: {}) if keeps_logits else None,
    )
    return peak_of_evaluation(trainer)


@pytest.mark.parametrize(
    ("mixed", "keeps_logits", "num_batches"),
    [
        (True, True, 5),
        pytest.param(False, False, 3, marks=pytest.mark.slow),
        pytest.param(False, True, 2, marks=pytest.mark.slow),
    ],
)
def test_an_evaluation_takes_what_trainers_takes(mixed, keeps_logits, num_batches, tmp_path):
    """The real Trainer's evaluation is predicted within 1 %, and bounded from a training step's tape."""
    real = evaluate(keeps_logits=keeps_logits, num_batches=num_batches, mixed=mixed, folder=str(tmp_path))
    regime = a_regime(weights_dtype="float32", autocast="bf16") if mixed else a_regime()
    for evaluates in (True, False):
        profile = trace("llama", CONFIGS["llama"], replace(regime, evaluates=evaluates))
        asked = {"keeps_logits": keeps_logits, "num_batches": num_batches}
        error = evaluation_bytes(profile, BATCH, TOKENS, **asked) / real - 1
        assert -0.001 < error < (0.01 if evaluates else 0.25), evaluates
