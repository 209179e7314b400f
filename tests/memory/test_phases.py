"""Stages of a run apart from its steady steps, on a model whose bytes are known."""

from __future__ import annotations

import pytest
import torch
from msgspec.structs import replace

from autofit.memory.assemble import MemoryModel
from autofit.memory.engines import layout
from autofit.memory.evaluation import evaluation_bytes, forward_bytes, prediction_bytes
from autofit.memory.fsdp_stages import FsdpStages
from autofit.memory.loading import broadcast_buckets, broadcast_bytes
from autofit.memory.phases import Run, first_step, loading, preparing, saving
from autofit.memory.static import static_bytes
from autofit.memory.tensors import Tensor, tensors
from autofit.profile.trace import trace
from autofit.spec.configuration import Configuration, Lora, Quantization
from autofit.spec.estimate import Phase, Stage
from autofit.spec.hardware import Cluster
from autofit.spec.profile import StaticTensor
from autofit.spec.regimes import regime_of
from tests.plans import A100, CPU_RANK, a_configuration
from tests.timing.hand_profiles import a_profile, a_regime

TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
}
HIDDEN = 64
TABLE, MATRIX = 1000 * HIDDEN, 16 * HIDDEN * HIDDEN
NUM_PARAMS = 2 * TABLE + 8 * MATRIX
PEAK = 5_000_000


def a_run(configuration: Configuration, *, on_cpu: bool = False) -> Run:
    """A bf16 model of an embedding, eight matrices and a head, on one node of eight devices."""

    def tensor(name: str, num_elements: int) -> StaticTensor:
        return StaticTensor(
            name=name,
            num_elements=num_elements,
            dtype="bfloat16",
            trains=True,
            repeats=name == "matrix",
            kind="parameter",
            embeds=name == "embed",
        )

    profile = replace(
        a_profile(
            regime=a_regime(device="cpu" if on_cpu else "cuda", weights_dtype="bfloat16", autocast="no"),
            num_layers=8,
            tensors=(tensor("embed", TABLE), tensor("matrix", MATRIX), tensor("head", TABLE)),
        ),
        hidden_size=HIDDEN,
    )
    device = CPU_RANK if on_cpu else A100
    model = tensors(profile)
    plan = layout(configuration, model, static_bytes(model, device.kind), HIDDEN, device.kind)
    return Run(
        profile=profile,
        configuration=configuration,
        cluster=Cluster(device=device, num_devices_per_node=configuration.num_processes),
        plan=plan,
        model=model,
        phases=tuple(
            Phase(name=name, bytes=PEAK, terms={"optimizer_state": 40, "gathered_weights": 900_000})
            for name in ("loss_backward", "optimizer_step")
        ),
        always_bytes=sum(plan.resident.values()),
        sequence_tokens=32,
    )


def a_choice(sharding: str = "ddp", **changes: object) -> Configuration:
    """Eight processes that load bf16."""
    values = {"optim": "adamw_torch", **changes}
    return a_configuration(sharding=sharding, num_processes=8, weights_dtype="bfloat16", **values)


def test_every_process_of_a_node_loads_its_own_copy():
    """Not quantised and not under stage 3, each makes the whole model in host memory before it moves."""
    stage = loading(a_run(a_choice()))
    assert stage.host_bytes == 8 * 2 * NUM_PARAMS
    assert stage.device_bytes == 2 * NUM_PARAMS


def test_stage_3_loads_in_shards():
    """The device holds its shard and one parameter whole; only the first process reads the checkpoint."""
    stage = loading(a_run(a_choice("zero3")))
    assert stage.host_bytes == 2 * NUM_PARAMS
    assert stage.device_bytes == pytest.approx(2 * NUM_PARAMS / 8 + 2 * MATRIX, rel=1e-3)


def test_a_checkpoint_is_read_in_the_dtype_that_it_is_stored_in():
    """Stage 3's first process holds all of it so; elsewhere one tensor at a time.

    Names in order: embed, head, eight matrices; the last of them is there in fp32 and in bf16.
    """
    stored = {"stored_dtype": "float32"}
    assert loading(a_run(a_choice("zero3", **stored))).host_bytes == 4 * NUM_PARAMS
    assert loading(a_run(a_choice(**stored))).host_bytes == 8 * (2 * NUM_PARAMS + 4 * MATRIX)


def test_a_cpu_rank_has_one_memory():
    """Its device is the host: nothing is counted twice, and the host's figure is not known apart."""
    stage = loading(a_run(a_choice(), on_cpu=True))
    assert (stage.device_bytes, stage.host_bytes) == (2 * NUM_PARAMS, None)


def test_deepspeed_flattens_weights_beside_themselves():
    """Stages 1 and 2 hold what trains twice while the engine is made."""
    assert preparing(a_run(a_choice("zero2"))).device_bytes == 2 * 2 * NUM_PARAMS


def test_the_first_step_finds_no_state():
    """Its forward and backward lack the optimizer's state and, before DeepSpeed knows the order, gathered weights."""
    once, twice = (a_run(a_choice("zero3", gradient_accumulation_steps=steps)) for steps in (1, 2))
    assert first_step(replace(once, phases=once.phases[:1])).device_bytes == PEAK - 40 - 900_000
    assert first_step(replace(twice, phases=twice.phases[:1])).device_bytes == PEAK - 40


def test_the_first_update_makes_the_state():
    """What the step takes before it, gradients copied and cast, meets none yet."""
    run = a_run(a_choice("zero3", optim="adamw_torch_fused"))
    update = replace(run, phases=run.phases[1:])
    *before, last = (sum(held.values()) for held in run.plan.step)
    assert max(before) > last
    state = run.plan.resident["optimizer_state"]
    expected = run.always_bytes + max(last, max(before) - state)
    assert first_step(update).device_bytes == expected < run.always_bytes + max(before)


def test_offloaded_moments_are_made_in_the_first_step():
    """On a CPU rank, where the host counts, backward comes before them."""
    run = a_run(a_choice("zero2", offload="optimizer", gradient_accumulation_steps=1), on_cpu=True)
    backward, update = (replace(run, phases=(phase,)) for phase in run.phases)
    moments = 8 * NUM_PARAMS // 8
    assert first_step(update).device_bytes == run.always_bytes + run.plan.host
    assert first_step(backward).device_bytes == PEAK - 40 - 900_000 + run.plan.host - moments


def test_stages_1_and_2_copy_the_model_in_every_process_to_save_it():
    """Each process of the node clones all of it; without DeepSpeed the first one alone writes."""
    alone, cloned = (saving(a_run(a_choice(sharding))) for sharding in ("ddp", "zero2"))
    assert alone.host_bytes == 2 * NUM_PARAMS
    assert cloned.host_bytes == 8 * 2 * NUM_PARAMS


T5 = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_heads": 4, "num_layers": 2, "vocab_size": 1000}
BART = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in (("layers", 2), ("ffn_dim", 64))}


@pytest.mark.parametrize(
    "config",
    [
        {**TINY, "tie_word_embeddings": True},
        {**TINY, "tie_word_embeddings": False},
        {"model_type": "t5", **T5, "is_encoder_decoder": True, "decoder_start_token_id": 0, "pad_token_id": 0},
        {"model_type": "bart", **BART, "d_model": 64, "vocab_size": 1000, "is_encoder_decoder": True},
    ],
    ids=["tied", "not tied", "t5", "bart"],
)
def test_a_table_is_copied_by_each_of_its_names(config):
    """What stage 2 copies to save is what DeepSpeed's own function makes of the model's state dict, to the byte."""
    from deepspeed.checkpoint.utils import clone_tensors_for_torch_save
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    auto = AutoModelForSeq2SeqLM if config.get("is_encoder_decoder") else AutoModelForCausalLM
    choice = a_configuration(sharding="zero2", num_processes=2, weights_dtype="bfloat16", mixed_precision="bf16")
    profile = trace("tiny", config, regime_of(choice, CPU_RANK))
    cluster = Cluster(device=CPU_RANK, num_devices_per_node=1, num_nodes=2)
    found = MemoryModel(profile, 32, (choice.per_device_train_batch_size,)).estimate(choice, cluster, replays=True)
    values = {key: value for key, value in config.items() if key != "model_type"}
    model = auto.from_config(AutoConfig.for_model(config["model_type"], **values), dtype=torch.bfloat16)
    copies = clone_tensors_for_torch_save(model.state_dict())
    buffers = sum(buffer.nbytes for name, buffer in model.named_buffers() if name not in copies)
    copied = found.stages.saving.device_bytes - found.after_step_allocated_bytes
    assert copied == sum(copy.nbytes for copy in copies.values()) + buffers


def test_stage_3_gathers_to_save():
    """The device holds gathered weights beside what it always does; the first process collects them on the host.

    There it may still have what it collected for the checkpoint before.
    """
    run = a_run(a_choice("zero3"))
    stage = saving(run)
    assert stage.device_bytes == run.always_bytes + run.plan.forward["gathered_weights"]
    assert stage.host_bytes == 2 * 2 * NUM_PARAMS


def test_what_deepspeed_collects_waits_for_python_to_look_for_circles():
    """A function inside the one that collects names itself and what is collected, so that neither dies by itself."""
    engine = pytest.importorskip("deepspeed.runtime.engine")
    outer = engine.DeepSpeedEngine._zero3_consolidated_16bit_state_dict.__code__
    inner = [each for each in outer.co_consts if getattr(each, "co_name", "") in outer.co_cellvars]
    assert any({each.co_name, "state_dict"} <= set(each.co_freevars) for each in inner)


def test_predictions_are_concatenated_after_a_process_let_go_of_its_own():
    """Of two batches of two processes: all that was gathered twice; a process's own logits are gone by then.

    Of one batch there is nothing to join, and a process's own are there beside what is gathered.
    """
    profile, batch, tokens = replace(a_run(a_choice()).profile, sizes=((0,) * 6,)), 2, 4096
    forward = forward_bytes(profile, batch, tokens)
    waiting = evaluation_bytes(profile, batch, tokens, keeps_logits=False, num_batches=1) - forward
    own, labels = prediction_bytes(profile, batch, tokens), batch * tokens * 8
    inputs = 2 * labels
    asked = {"keeps_logits": True, "num_processes": 2}
    two = evaluation_bytes(profile, batch, tokens, num_batches=2, **asked)
    assert two - waiting == 2 * (2 * 2 * own + 2 * labels) + inputs > 2 * own + forward
    one = evaluation_bytes(profile, batch, tokens, num_batches=1, **asked)
    assert one - waiting == own + 2 * own + 2 * labels + inputs


def test_under_fsdp_every_process_loads_its_own_copy_into_host_memory():
    """`cpu_ram_efficient_loading` does not spare the others it; nothing is on the device before it is sharded."""
    run = a_run(a_choice())
    configuration = a_choice("fsdp2")
    under_fsdp = replace(run, configuration=configuration, fsdp=FsdpStages(configuration, run.profile))
    assert loading(under_fsdp) == Stage(device_bytes=0, host_bytes=8 * 2 * NUM_PARAMS)


def test_ddp_sends_parameters_in_torchs_own_groups():
    """Copies of one dtype each, in torch's grouping, two under way at a time; scales of packed weights are not sent."""
    kinds = [("bfloat16", 100, "parameter"), ("uint8", 30, "quantized"), ("float32", 5, "quant_state")]
    kinds += [("float32", 7, "adapter"), ("uint8", 50, "quantized"), ("float32", 3, "buffer")]
    listed = tuple(
        StaticTensor(name=str(n), num_elements=size, dtype=dtype, trains=False, repeats=False, kind=kind)
        for n, (dtype, size, kind) in enumerate(kinds)
    )
    sent = [torch.empty(s, dtype=getattr(torch, d), device="meta") for d, s, kind in kinds if kind != "quant_state"]
    groups, _ = torch.distributed._compute_bucket_assignment_by_size(sent, [250 * 2**20])
    profile = replace(a_profile(), tensors=listed)
    assert broadcast_buckets(profile) == [sum(sent[n].nbytes for n in group) for group in groups] == [200, 80, 40]
    assert broadcast_bytes(profile) == 280


def test_what_backward_does_not_use_is_not_kept_gathered():
    """Stage 3 frees frozen layers below all that trains after their forward, and keeps all others it may."""
    model = [Tensor(4096, 2, trains=trains, embeds=n == 0, kind="parameter") for n, trains in enumerate((0, 0, 1, 0))]
    frozen = a_configuration(method="freeze", lora=None, sharding="zero3")
    whole = replace(model[0], trains=True)
    assert zero3_gathered(frozen, model) == 2 * 4096 * 2
    assert zero3_gathered(a_configuration(sharding="zero3"), [whole, whole]) == 2 * 4096 * 2


def zero3_gathered(configuration: Configuration, model: list[Tensor]) -> int:
    """Return what a stage 3 layout keeps gathered of a model whose tensors are all above the threshold."""
    plan = layout(configuration, tuple(model), static_bytes(tuple(model), "cpu"), HIDDEN, "cpu")
    return plan.forward["gathered_weights"]


@pytest.mark.parametrize(
    ("changes", "bits", "kept", "resident"),
    [
        ({"gradient_checkpointing": True}, 4, 8e9, 0),
        ({"gradient_checkpointing": True, "use_reentrant": True}, 4, 1e9, 0),
        ({"gradient_checkpointing": True, "use_reentrant": True}, 8, 0, 8e9),
    ],
    ids=["held by the graph", "computed again as a whole", "int8"],
)
def test_stage_3_does_not_free_packed_weights_that_others_hold(changes, bits, kept, resident):
    """Four-bit weights stay whole where the graph has them, as many as may live otherwise; int8 ones always do."""
    packed = tuple(Tensor(10**9, 1, trains=False, embeds=False, kind="quantized") for _ in range(8))
    model = (*packed, Tensor(4096, 2, trains=True, embeds=False, kind="adapter"))
    configuration = a_configuration(
        method="qlora", sharding="zero3", num_processes=8, quantization=Quantization(bits=bits), lora=Lora(), **changes
    )
    plan = layout(configuration, model, static_bytes(model, "cuda"), HIDDEN, "cuda")
    whole = plan.forward.get("quantized_weights", 0) + plan.forward["gathered_weights"]
    assert whole == pytest.approx(kept, rel=0.06, abs=model[-1].num_bytes)
    assert plan.resident["quantized_weights"] == resident
    assert plan.step[-1].get("quantized_weights", 0) == (kept if kept == 8e9 else 0)


def test_a_head_that_is_fetched_with_adapters_is_copied_out_of_their_buffer():
    """The largest weight is there twice for a moment; without adapters the head is gathered alone, in place."""
    head = Tensor(10**6, 2, trains=False, embeds=False, kind="parameter")
    adapter = Tensor(4096, 4, trains=True, embeds=False, kind="adapter")
    model = (head, adapter)
    for lora, extra in ((Lora(), head.num_bytes), (None, 0)):
        configuration = a_configuration(method="lora" if lora else "full", lora=lora, sharding="zero3")
        assert layout(configuration, model, static_bytes(model, "cpu"), HIDDEN, "cpu").gathering_bytes == extra
