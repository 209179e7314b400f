"""What a run needs outside its steady steps: while it loads, while engines are made, first step, evaluation, saving.

Each is a figure of its own, for the device and for the host of a node.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct

from autofit.memory.engines import MASTER_BYTES, Layout, ties_embeddings
from autofit.memory.evaluation import PLAIN_FORWARD, evaluation_bytes, forward_bytes
from autofit.memory.fsdp_stages import FsdpStages
from autofit.memory.host import NUM_MOMENTS, sub_groups
from autofit.memory.loading import broadcast_bytes, merged_bytes, read_bytes
from autofit.memory.static import rounded
from autofit.memory.tape import returned_logits_bytes
from autofit.memory.tensors import Model, Tensor, num_bytes_of
from autofit.spec.configuration import Configuration
from autofit.spec.deepspeed import DeepSpeedSettings, bucket_settings
from autofit.spec.estimate import Phase, Stage, Stages
from autofit.spec.hardware import Cluster
from autofit.spec.profile import RegimeProfile
from autofit.units import BYTES_PER_ELEMENT

ADAPTER_BYTES = 4
"""peft makes adapters fp32 on any base. Source: peft/tuners/tuners_utils.py 0.21, cast_adapter_dtype."""
SCALE_BYTES, SCALED_ELEMENTS = 4, 64
"""bitsandbytes first makes an fp32 scale for every block. Source: bitsandbytes 0.50 functional.py, quantize_4bit."""
EIGHT_BITS = 8
SHARED_TABLE, NUM_STACKS = "shared", 2
"""What encoder-decoders call the table of their stacks, and how many they have."""
HALF_BYTES = 2
LARGEST_SAVED_FILE_BYTES = 50_000_000_000
"""A file of weights is written from one copy in host memory.

Source: transformers/modeling_utils.py 5.23, save_pretrained (`max_shard_size`); safetensors 0.8 torch.py, save_file."""


_AFTER_UPDATES = ("head_backward", "layer_backward", "embedding_backward", "end")
"""Phases of backward in which there are gradients."""


class Run(Struct, frozen=True, kw_only=True):
    """One configuration, laid out: what every stage is worked out from."""

    profile: RegimeProfile
    configuration: Configuration
    cluster: Cluster
    plan: Layout
    model: Model
    phases: tuple[Phase, ...]
    always_bytes: int
    """Allocated between two steps."""
    sequence_tokens: int
    fsdp: FsdpStages | None = None
    """Under FSDP alone."""

    @property
    def builds_partitioned(self) -> bool:
        """Whether weights are sharded as they are made. Source: transformers/modeling_utils.py 5.23 (zero.Init)."""
        return self.configuration.zero_stage == 3 and self.configuration.quantization is None

    @property
    def weight_bytes(self) -> int:
        """Of one element as weights are loaded."""
        return BYTES_PER_ELEMENT[self.configuration.weights_dtype]

    @property
    def settings(self) -> DeepSpeedSettings:
        """DeepSpeed's numbers."""
        return bucket_settings(self.configuration, self.profile.hidden_size)

    def rounded(self, num_bytes: int) -> int:
        """Return an allocation as the device's allocator counts it."""
        return rounded(num_bytes, self.cluster.device.kind)

    def total(self, tensors: Iterable[tuple[Tensor, int]]) -> int:
        """Add tensors up, each as often as there are of it, as the device's allocator counts them."""
        return sum(self.rounded(tensor.num_bytes) * num for tensor, num in tensors)

    def shard(self, tensor: Tensor) -> int:
        """Bytes of this process's part of a tensor."""
        return -(-tensor.num_elements // self.configuration.num_processes) * tensor.bytes_per_element

    def shards(self, tensors: Iterable[tuple[Tensor, int]]) -> int:
        """The same of several, each as often as there are of it."""
        return sum(self.shard(tensor) * num for tensor, num in tensors)

    def placed(self, device_bytes: int, host_bytes: int, *, first_process: int = 0) -> Stage:
        """Say what a device and a node's host hold; a CPU rank's device is the host.

        FSDP runs beside accelerators alone: ranks that only pretend to have one are told both apart all the same.

        Args:
            device_bytes: of one process.
            host_bytes: of each process.
            first_process: of the node's first process besides.
        """
        if self.cluster.device.kind == "cpu" and self.fsdp is None:
            return Stage(device_bytes=device_bytes + host_bytes + first_process, host_bytes=None)
        host = host_bytes * self.cluster.num_devices_per_node + first_process
        return Stage(device_bytes=device_bytes, host_bytes=host)


def stages(run: Run) -> Stages:
    """Work out every stage."""
    return Stages(
        loading=loading(run),
        preparing=preparing(run),
        first_step=first_step(run),
        evaluation=evaluation(run),
        saving=saving(run),
    )


def loading(run: Run) -> Stage:
    """While `from_pretrained` and peft make the model, up to where it is on the device.

    A file's pages count as memory, though processes of a node share them. Not quantised, the model is made whole in the
    host memory of each process, then moved. Under stage 3 it is made in shards on the device, each parameter whole for
    a moment, and the first process reads the whole checkpoint, as it is stored. Quantised, it is made on the device,
    also under stage 3: one weight at a time is there in both forms; adapters come when all are packed. Under FSDP every
    process has it in host memory too, though its config lets the first one alone load it: `cpu_ram_efficient_loading`
    spares the others the initialisation of missing weights.

    Source: transformers/modeling_utils.py 5.23 (_load_pretrained_model, get_init_context), core_model_loading.py
    (convert_and_load_state_dict_in_model), integrations/deepspeed.py (_load_state_dict_into_zero3_model),
    trainer.py (`_move_model_to_device`).
    """
    element = BYTES_PER_ELEMENT[run.configuration.weights_dtype]
    stored = BYTES_PER_ELEMENT[run.configuration.stored_dtype or run.configuration.weights_dtype]
    keeps_fp32 = run.profile.regime.keeps_fp32
    loaded = [(_loaded_bytes(t, element, keeps_fp32=keeps_fp32), num) for t, num in run.model.counted]
    quantization = run.configuration.quantization
    if quantization is not None and not quantization.comes_packed:
        adapters = sum(
            run.rounded(_loaded_bytes(t, element)) * num for t, num in run.model.counted if t.kind == "adapter"
        )
        rest = sum(run.rounded(num_bytes) * num for num_bytes, num in loaded) - adapters
        passing = max(_while_packing(run, element), merged_bytes(run.profile, element))
        return run.placed(rest + max(adapters, passing), 0)
    if run.builds_partitioned:
        parameters = run.model.parameters.counted
        adapters = sum(t.num_elements * ADAPTER_BYTES * num for t, num in parameters if t.kind == "adapter")
        base = [(t, num) for t, num in parameters if t.kind != "adapter"]
        largest = max((t.num_bytes for t, _ in base), default=0)
        checkpoint = sum(t.num_elements * stored * num for t, num in base)
        shards, buffers = run.shards(base), _buffers(run)
        offloads = run.configuration.offload == "optimizer_and_parameters"
        device = buffers + max(largest, adapters) + (0 if offloads else shards)
        return run.placed(device, shards if offloads else 0, first_process=checkpoint)
    on_host = max(sum(num_bytes * num for num_bytes, num in loaded), read_bytes(run.profile, stored, element))
    if run.fsdp is not None:
        return run.placed(0, on_host)
    if run.cluster.device.kind == "cpu":
        return run.placed(on_host, 0)
    return run.placed(run.total(run.model.counted), on_host)


def _loaded_bytes(tensor: Tensor, bytes_per_element: int, *, keeps_fp32: bool = False) -> int:
    if tensor.loaded_in_fp32:
        return tensor.num_elements * BYTES_PER_ELEMENT["float32"]
    if tensor.kind == "parameter":
        return tensor.num_bytes if keeps_fp32 else tensor.num_elements * bytes_per_element
    return tensor.num_elements * ADAPTER_BYTES if tensor.kind == "adapter" else tensor.num_bytes


def _while_packing(run: Run, bytes_per_element: int) -> int:
    """The largest weight before it is packed, and the scales or the fp16 copy that packing makes."""
    quantization = run.configuration.quantization
    assert quantization is not None, "only a quantised model packs"
    packed = max((t.num_bytes for t, _ in run.model.counted if t.kind == "quantized"), default=0)
    elements = packed * EIGHT_BITS // quantization.bits
    if quantization.is_int8:
        return elements * bytes_per_element + (0 if run.configuration.weights_dtype == "float16" else elements * 2)
    scales = elements // SCALED_ELEMENTS * SCALE_BYTES
    return elements * bytes_per_element + scales * (2 if quantization.double_quant else 1)


def _buffers(run: Run) -> int:
    return _total_of(run, "buffer")


def _total_of(run: Run, kind: str) -> int:
    return run.total((t, num) for t, num in run.model.counted if t.kind == kind)


def preparing(run: Run) -> Stage:
    """While accelerate makes the engine: DDP's buckets; DeepSpeed's flat weights and fp32 masters; FSDP's shards.

    DeepSpeed flattens what trains beside what is there; where a device has no room for it, it does so on the host.
    Source: torch v2.13 nn/parallel/distributed.py; deepspeed/runtime/zero/stage_1_and_2.py 0.19.8 (`__init__`,
    initialize_optimizer_states), stage3.py (_create_fp32_partitions, initialize_optimizer_states,
    create_reduce_and_remove_grad_hooks).
    """
    weights = run.total(run.model.counted)
    if run.fsdp is not None:
        held = run.fsdp.preparing()
        return run.placed(held.device, held.host)
    if run.configuration.zero_stage == 3:
        return _preparing_zero3(run)
    if run.configuration.uses_deepspeed:
        return _preparing_zero12(run, weights)
    buckets = run.plan.resident.get("communication_buckets", 0)
    sent = broadcast_bytes(run.profile) if run.configuration.sharding == "ddp" else 0
    return run.placed(weights + _moved_int8(run) + max(buckets, sent), 0)


def _moved_int8(run: Run) -> int:
    """A rank's CPU has a number, which makes it another device to `model.to`: int8 weights are copied.

    bitsandbytes holds the old ones until the next forward. On a GPU nothing moves.
    Source: accelerate/accelerator.py 1.15, prepare_model; accelerate/state.py, set_device; bitsandbytes 0.50
    nn/modules.py, Linear8bitLt (`state.CB`).
    """
    quantization = run.configuration.quantization
    moves = run.cluster.device.kind == "cpu" and run.configuration.num_processes > 1
    if not moves or quantization is None or not quantization.is_int8:
        return 0
    return _total_of(run, "quantized")


def _preparing_zero12(run: Run, weights: int) -> Stage:
    flat = run.total(run.model.trained.counted)
    if run.configuration.offload == "none":
        return run.placed(weights + max(flat, 2 * MASTER_BYTES * _partition_elements(run)), 0)
    kept = run.plan.resident.get("offload_buffers", 0)
    host = run.plan.host - run.plan.host_made_later - _offloaded_moments(run)
    if run.cluster.device.kind == "cpu":
        return run.placed(max(weights + flat, weights + kept + host), 0)
    return run.placed(max(weights + flat, weights + kept), host)


def _preparing_zero3(run: Run) -> Stage:
    shards, trained = run.shards(run.model.parameters.counted), run.shards(run.model.trained.counted)
    partition = _partition_elements(run)
    cut = (-(-t.num_elements // run.configuration.num_processes) for t in run.model.trained)
    sub_group = max(sub_groups(cut, run.settings.sub_group_size)) * MASTER_BYTES
    rest = _buffers(run) + _total_of(run, "quant_state")
    master = partition * MASTER_BYTES
    whole = _while_partitioning(run) if not run.builds_partitioned else 0
    # At last each parameter that trains is gathered by itself, to hang a hook on it.
    made = sum(run.plan.resident.values()) - run.plan.resident.get("optimizer_state", 0)
    hooking = made + max((run.rounded(t.num_bytes) for t, _ in run.model.trained.counted), default=0)
    if run.configuration.offload == "none":
        return run.placed(max(rest + whole, rest + shards + master + sub_group, hooking), 0)
    offloads_weights = run.configuration.offload == "optimizer_and_parameters"
    on_device = max(rest + whole, rest + (0 if offloads_weights else shards), hooking)
    kept = run.plan.host - _offloaded_moments(run)
    on_host = kept + sub_group
    if run.cluster.device.kind == "cpu":
        making = max(rest + whole, rest + shards + master + sub_group * 2, rest + shards + trained)
        return run.placed(max(making, hooking + kept), 0)
    return run.placed(on_device, on_host)


def _while_partitioning(run: Run) -> int:
    """Every parameter in turn gives way to its shard, which is there before the whole is gone; int8 weights stay."""
    quantization = run.configuration.quantization
    stays = "quantized" if quantization is not None and quantization.is_int8 else None
    parameters = run.model.parameters
    whole, highest = run.total(parameters.counted), 0
    changes = {
        id(t): (shard := run.shard(t), shard - (0 if t.kind == stays else run.rounded(t.num_bytes)))
        for t, _ in parameters.counted
    }
    for tensor in parameters:
        shard, change = changes[id(tensor)]
        highest = max(highest, whole + shard)
        whole += change
    return highest


def first_step(run: Run) -> Stage:
    """The first optimizer step: its forward and backward find no optimizer state.

    Under stage 3 DeepSpeed does not know the order of layers yet: in the first micro-step it gathers one module's
    weights at a time, and frees all after use, those that it will keep whole as well.
    Source: deepspeed/runtime/zero/partitioned_param_coordinator.py 0.19.8 (`is_complete_trace`).
    """
    moments = _offloaded_moments(run)
    if run.cluster.device.kind != "cpu" or run.fsdp is not None:
        offloads = run.fsdp is not None and run.configuration.offload != "none"
        host = run.fsdp.host_in_first_step() if run.fsdp is not None and offloads else run.plan.host
        return run.placed(max(_in_first_step(phase, run) for phase in run.phases), host)
    later = {phase.name: 0 if phase.name == "optimizer_step" else moments for phase in run.phases}
    return run.placed(max(_in_first_step(phase, run) - later[phase.name] for phase in run.phases), run.plan.host)


def _offloaded_moments(run: Run) -> int:
    """DeepSpeedCPUAdam's, which its first step makes."""
    if run.configuration.offload == "none":
        return 0
    return NUM_MOMENTS * MASTER_BYTES * _partition_elements(run)


def _partition_elements(run: Run) -> int:
    return sum(-(-t.num_elements // run.configuration.num_processes) * num for t, num in run.model.trained.counted)


def _in_first_step(phase: Phase, run: Run) -> int:
    if phase.name == "optimizer_step":
        return _first_update(phase, run)
    without = (
        _made_in_backward(phase, run)
        + phase.bytes
        - phase.terms.get("optimizer_state", 0)
        - phase.terms.get("outputs", 0)
    )
    if run.configuration.gradient_accumulation_steps > 1 or run.fsdp is not None:
        return without
    without -= phase.terms.get("gathered_weights", 0)
    if "gathered_weights" not in phase.terms or phase.name == "loss_backward":
        return without
    tables = {t.num_elements for t, _ in run.model.parameters.counted if t.embeds}
    in_layer = [t.num_bytes for t, _ in run.model.parameters.counted if t.num_elements not in tables]
    everywhere = [t.num_bytes for t, _ in run.model.parameters.counted]
    return without + max(in_layer if phase.name.startswith("layer") else everywhere, default=0)


def _made_in_backward(phase: Phase, run: Run) -> int:
    """Tell how much of the state updates in backward may have made: by a layer's all but the embedding's, made last."""
    whole = run.plan.resident.get("optimizer_state", 0)
    if run.plan.gradients != "used" or phase.name not in _AFTER_UPDATES:
        return 0
    if phase.name == "head_backward":
        return max((update.state_bytes for update in run.plan.updates), default=0)
    last = sum(update.state_bytes for update in run.plan.updates if update.embeds)
    return whole - last if phase.name == "layer_backward" else whole


def _first_update(phase: Phase, run: Run) -> int:
    """The last of the step's moments is the update, which makes the state; those before it have none.

    A few optimizers make it tensor by tensor, and have not made all of it at their highest moment.
    """
    state = run.plan.resident.get("optimizer_state", 0)
    inputs = phase.terms.get("batch", 0) + phase.terms.get("outputs", 0)
    *before, update = (sum(held.values()) for held in run.plan.step)
    return run.always_bytes + inputs + max(update - run.plan.not_yet_made, *(held - state for held in before), -state)


def evaluation(run: Run) -> Stage | None:
    """`Trainer.evaluate` between two steps; None where something about it is not known.

    What generates reads a prompt as long as all of a sequence and has the cache of as much beside it: a bound.

    Under stage 3 the first process may still have what a save before collected; see `saving`.

    Processes that share sequences in training each evaluate whole ones, of which their tape is of a part.
    Source: accelerate/accelerator.py 1.15, _prepare_deepspeed (`disable_in_eval`).
    """
    asked, micro_batch = run.configuration.evaluation, run.configuration.per_device_eval_batch_size
    if not asked.is_known:
        return None
    tokens = run.sequence_tokens * run.configuration.sequence_parallel_size
    profile = run.profile if run.fsdp is None else run.fsdp.profile
    engine = PLAIN_FORWARD if run.fsdp is None else run.fsdp.forward()
    needed = evaluation_bytes(
        profile,
        micro_batch,
        tokens,
        keeps_logits=asked.keeps_predictions,
        num_batches=_batches_kept(run.configuration),
        num_processes=run.configuration.num_processes,
        engine=engine,
    )
    if asked.predict_with_generate:
        element = HALF_BYTES if run.configuration.mixed_precision != "no" else run.weight_bytes
        cache = micro_batch * (asked.cache_elements_per_sequence or 0) * element
        needed = max(needed, cache + forward_bytes(profile, micro_batch, tokens, engine))
    gathered = run.plan.forward.get("gathered_weights", 0)
    if run.fsdp is not None:
        needed = max(needed, run.fsdp.last_gradients())
    earlier = _collected_bytes(run) if run.configuration.zero_stage == 3 else 0
    return run.placed(run.always_bytes + gathered + needed, _host_between_steps(run), first_process=earlier)


def _host_between_steps(run: Run) -> int:
    if run.fsdp is None or run.configuration.offload == "none":
        return run.plan.host
    return run.fsdp.host_between_steps()


def _batches_kept(configuration: Configuration) -> int:
    """The most batches whose predictions a process holds on its device."""
    asked = configuration.evaluation
    together = configuration.per_device_eval_batch_size * configuration.num_processes
    batches = 1 if asked.num_sequences is None else -(-asked.num_sequences // together)
    return min(batches, asked.eval_accumulation_steps or batches)


def saving(run: Run) -> Stage:
    """While a checkpoint is written.

    DeepSpeed's stages 1 and 2 copy the whole model to the host in every process, name by name. Stage 3 gathers module
    by module (what an evaluation gathered is still there) and the first process collects what trains of an adapter,
    else all of it: twice, for the function that collected it for an earlier checkpoint calls itself by a name in its
    own closure, and such a circle, with all that it names, is there until Python looks for circles.
    FSDP's full state dicts, which accelerate's config asks for, are gathered for the first process.
    Source: transformers/trainer.py 5.23 (save_model); accelerate/accelerator.py 1.15 (get_state_dict);
    deepspeed/checkpoint/utils.py (clone_tensors_for_torch_save), runtime/engine.py
    (_zero3_consolidated_16bit_state_dict).
    """
    model, written = sum(t.num_bytes * num for t, num in run.model.counted), _collected_bytes(run)
    device = run.always_bytes
    if run.fsdp is not None:
        held = run.fsdp.saving()
        device += max(held.device, run.fsdp.last_gradients())
        return run.placed(device, _host_between_steps(run), first_process=held.first_process)
    if run.configuration.zero_stage == 3:
        gathered = run.plan.forward.get("gathered_weights", 0)
        if run.cluster.device.kind == "cpu":  # what the first process collects is what it gathered
            return run.placed(device + max(gathered, written), run.plan.host, first_process=written)
        return run.placed(device + gathered, run.plan.host, first_process=2 * written)
    if run.configuration.uses_deepspeed:
        return run.placed(device, run.plan.host + model + _other_names_bytes(run))
    if run.cluster.device.kind == "cpu":
        return run.placed(device, 0)
    return run.placed(device, run.plan.host, first_process=min(written, LARGEST_SAVED_FILE_BYTES))


def _other_names_bytes(run: Run) -> int:
    """A table that several modules share has the name of each in a state dict, and so a copy for each.

    A head may be one of them; what an encoder-decoder calls `shared` is the table of both of its stacks besides.
    Source: transformers/models/t5/modeling_t5.py 5.23, T5ForConditionalGeneration (`_tied_weights_keys`), and alike in
    models/bart and those made from it.
    """
    has_tied_head = ties_embeddings(run.model) and bool(returned_logits_bytes(run.profile, [1], 1)[0])
    shared = [num_bytes_of(t) for t in run.profile.tensors if t.embeds and _module(t.name) == SHARED_TABLE]
    if shared:
        return sum(shared) * (has_tied_head + NUM_STACKS)
    return max((t.num_bytes for t, _ in run.model.counted if t.embeds), default=0) if has_tied_head else 0


def _module(name: str) -> str:
    """The last of the modules that a parameter's dotted name goes through, but for what peft puts around one."""
    parts = [part for part in name.split(".")[:-1] if part != "base_layer"]
    return parts[-1] if parts else ""


def _collected_bytes(run: Run) -> int:
    """What the first process writes: of an adapter what trains."""
    collected = run.model.trained if run.configuration.lora else run.model
    return sum(t.num_bytes * num for t, num in collected.counted)
