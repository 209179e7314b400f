"""The rules against the installed libraries: what a rule forbids is run, and fails as the rule says.

A rule that no longer holds turns its test red. What cannot be run here is named with the reason in `NOT_RUN`.
"""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import weakref
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from autofit.search.rules import LIBRARIES, RULES
from autofit.spec.libraries import software_here
from tests.plans import TINY_LLAMA
from tests.scripts import write_tiny_llama

pytestmark = pytest.mark.slow
TRIED = Path(__file__).parent / "tried.py"
PRETENDING_GPUS = Path(__file__).parents[2] / "benchmarks" / "cpu_fsdp"
HERE = software_here(LIBRARIES, trains_here=True)

FOUND_UNDER_ENGINES: dict[str, dict[str, Any]] = {
    "fsdp": {
        "replicas-share-the-processes": "Mesh should not be bigger than default world size 2",
        "fsdp2-steps-with-dtensors": "does not have a sharding strategy registered",
        "fsdp2-has-no-adafactor": "got mixed torch.Tensor and DTensor",
        "fsdp-has-no-apollo": "KeyError: 'seed'",
        "fsdp1-has-no-galore": "IndexError: tuple index out of range",
        "fsdp-cannot-shard-int8": "Cannot flatten integer dtype tensors",
        "fsdp1-flattens-one-floating-dtype": "Must flatten tensors with uniform dtype",
        "fsdp1-flattens-no-fp32-modules": "Must flatten tensors with uniform dtype",
        "fsdp2-trains-no-fp32-modules": "FSDP expects uniform original parameter dtype",
        "fsdp2-puts-a-table-in-one-group": "already managed by another FSDP group",
        "fsdp-would-cast-packed-weights": "is invalid for input of size",
        "fsdp1-has-no-dora": "IndexError: tuple index out of range",
        "fsdp1-adapter-needs-no-checkpoint": "CheckpointError",
        "fsdp2-shards-no-uint8": 0,
        "fsdp2-sharded-one-dtype": ["FSDPLlamaDecoderLayer NO_REENTRANT"] * 2,
        "fsdp1-cannot-save-8bit-state": "Boolean value of Tensor",
    },
    "deepspeed": {
        "several-processes-share-gradients": "DistributedDataParallel",
        "layerwise-optimizers-are-for-one-process": "does not support DDP at this time",
        "pure-bf16-is-not-deepspeed": "torch.float32",
        "packed-weights-would-be-cast": "is invalid for input of size",
        "zero3-has-no-dora-of-packed-weights": "has no attribute 'ds_status'",
        "zero3-trains-one-dtype": "AssertionError",
        "zero3-shards-no-int8": [4096, 2048, 4096],
        "zero3-gathers-floating-weights": [2048, 1024],
        "peft-zero3-needs-reentrant": 2,
        "adagrad-makes-its-state-at-once": "IndexError: list index out of range",
        "low-rank-optimizers-need-matrices": "IndexError: tuple index out of range",
        "lomo-has-its-own-backward": "unexpected keyword argument 'learning_rate'",
        "lomo-reduces-no-gradients": 2,
        "offloaded-weights-need-zero3": 0,
    },
}
"""What `tried.py` finds of each rule on two ranks: words of the error, or what is there when the training has ended.

Of a weight: its elements, those of this rank's shard, and of the copy that products read. Of stage 2 with weights to be
offloaded: how many parameters are partitioned. Of FSDP2: how many packed weights are shards; what is checkpointed.
"""
ALSO_SHOWN_BY = {
    "fsdp-checkpoints-every-layer": "fsdp2-sharded-one-dtype",
    "fsdp2-crashed-on-uint8": "fsdp2-shards-no-uint8",
    "fsdp2-came-with-accelerate-1.6": "fsdp2-sharded-one-dtype",
    "zero3-qlora-needs-peft-0.10": "zero3-gathers-floating-weights",
}
"""Rules that another rule's run shows too: what is in effect, or that an old release's refusal is gone."""
GONE = {
    "fsdp2-sharded-one-dtype",
    "fsdp2-crashed-on-uint8",
    "fsdp2-came-with-accelerate-1.6",
    "zero3-gathers-floating-weights",
    "zero3-qlora-needs-peft-0.10",
    "peft-zero3-needs-reentrant",
    "zero3-waits-for-every-expert",
    "bitsandbytes-optimizers-were-for-gpus",
}
"""Rules about releases before those that the tests run with; shown is that what they forbid works now."""
NOT_RUN = {
    "flash-attention-needs-ampere": "needs a GPU",
    "flash-attention-needs-half": "needs a GPU",
    "flash-attention-needs-small-heads": "needs a GPU",
    "fsdp-offloads-everything": "accelerate offloads from an accelerator only",
    "fsdp1-replicates-over-nodes": "needs two nodes",
    "auto-gptq-needs-a-gpu": "needs a GPU",
    "gptqmodel-is-not-installed": "it is not among the packages that the tests run with",
    "optimum-is-not-installed": "as above",
    "peft-is-not-installed": "without it there is nothing to import",
    "trl-is-not-installed": "as above",
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny Llama on disk, and within its folder a tiny gpt-oss and a tiny BART."""
    from transformers import AutoModelForCausalLM, BartConfig, BartForConditionalGeneration, GptOssConfig

    folder = write_tiny_llama(tmp_path_factory.mktemp("model"))
    sizes = {"hidden_size": 32, "intermediate_size": 32, "head_dim": 16, "num_attention_heads": 2, "vocab_size": 100}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "num_key_value_heads": 1, "num_hidden_layers": 2}
    config = GptOssConfig(**sizes, **experts, pad_token_id=0, eos_token_id=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "gpt-oss")
    layers = {f"{stack}_{what}": 2 for stack in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    tokens = {"vocab_size": 100, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 1}
    bart = BartConfig(d_model=32, encoder_ffn_dim=32, decoder_ffn_dim=32, forced_eos_token_id=1, **layers, **tokens)
    BartForConditionalGeneration(bart).save_pretrained(folder / "bart")
    return folder


@pytest.fixture(scope="module")
def found(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run every combination of both engines, each engine's in one launch of two ranks."""
    every: dict[str, Any] = {}
    for engine in FOUND_UNDER_ENGINES:
        folder = tmp_path_factory.mktemp(engine)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        if engine == "fsdp":
            environment["PYTHONPATH"] = str(PRETENDING_GPUS)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        arguments = [str(TRIED), engine, str(model_folder), str(folder / "found.json")]
        with (folder / "log.txt").open("wb") as log:
            subprocess.run(
                [*command, *arguments], env=environment, cwd=folder, stdout=log, stderr=log, check=True, timeout=600
            )
        every |= json.loads((folder / "found.json").read_text())
    return every


ENGINE_CASES = {name: expected for cases in FOUND_UNDER_ENGINES.values() for name, expected in cases.items()}


@pytest.mark.parametrize(("name", "expected"), ENGINE_CASES.items(), ids=ENGINE_CASES)
def test_engines_do_as_the_rule_says(name: str, expected: Any, found: dict[str, Any]) -> None:
    """Two ranks with the real engine end in the error that the rule names, or in the state that is its reason."""
    if isinstance(expected, str):
        assert expected in found[name]
    else:
        assert found[name] == expected


def test_every_rule_is_run_or_says_why_not() -> None:
    """Each rule is among the combinations above, has a test below, or is named with what keeps it from being run."""
    below = {name.removeprefix("test_").replace("_", "-") for name in globals() if name.startswith("test_")}
    needs = {f"{package}-is-not-installed" for package in (*OPTIMIZER_PACKAGES, *OTHER_PACKAGES)}
    shown = {*ENGINE_CASES, *ALSO_SHOWN_BY, *needs} | {name.replace(".", "-") for name in below}
    missing = [rule.name for rule in RULES if rule.name not in shown and rule.name not in NOT_RUN]
    assert missing == []
    assert not shown & set(NOT_RUN)


def test_rules_hold_for_these_releases_but_for_old_ones() -> None:
    """With the releases that the tests run with, exactly the rules about older ones do not hold."""
    assert {rule.name for rule in RULES if not rule.holds_for(HERE)} == GONE


def arguments_of(**given: Any) -> Any:
    """Make TrainingArguments."""
    from transformers import TrainingArguments

    return TrainingArguments(output_dir="unused", report_to="none", **given)


def tiny_model(**given: Any) -> Any:
    """Build the tiny Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**TINY_LLAMA, **given))


def test_bf16_needs_hardware() -> None:
    """transformers refuses bf16 where neither a GPU multiplies it nor the CPU was asked for."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="doesn't support bf16/gpu"):
        arguments_of(bf16=True)


def test_tf32_needs_ampere() -> None:
    """transformers refuses TF32 without tensor cores that have it."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="requires Ampere"):
        arguments_of(tf32=True, use_cpu=True)


def test_fp16_is_not_for_cpus() -> None:
    """Asked for fp16 on a CPU, accelerate sets up neither autocast nor a gradient scaler."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert (accelerator.native_amp, accelerator.scaler) == (False, None)


def test_fp16_weights_cannot_be_unscaled() -> None:
    """The gradient scaler refuses the gradients of fp16 weights."""
    import torch

    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.float16))
    optimizer, scaler = torch.optim.AdamW([weight]), torch.amp.GradScaler("cpu")
    scaler.scale(weight.sum()).backward()
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaler.unscale_(optimizer)


@pytest.fixture
def no_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget overrides of other optimizers, which bitsandbytes keeps for the whole process by position."""
    from bitsandbytes.optim import GlobalOptimManager

    monkeypatch.setattr(GlobalOptimManager, "_instance", None)


def stepped(optimizer: type, **given: Any) -> Any:
    """Step a bitsandbytes optimizer once over a weight of 2^18 elements."""
    import torch

    weight = torch.nn.Parameter(torch.ones(512, 512))
    weight.grad = torch.ones_like(weight)
    made = optimizer([weight], **given)
    made.step()
    return made


def test_paged_optimizer_on_cpu() -> None:
    """A paged optimizer warns on a CPU and does not page."""
    import bitsandbytes

    with pytest.warns(UserWarning, match="Paged optimizers are not supported on CPU"):
        stepped(bitsandbytes.optim.PagedAdamW)


@pytest.mark.usefixtures("no_overrides")
def test_8bit_optimizer_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU an 8-bit update unpacks both states to fp32 tensors as large as the weight."""
    import bitsandbytes
    import torch
    from bitsandbytes.backends.cpu import ops

    unpack, unpacked = ops._dequant_blockwise_fp32_direct, []

    def spied(*given: Any) -> Any:
        unpacked.append(unpack(*given))
        return unpacked[-1]

    monkeypatch.setattr(ops, "_dequant_blockwise_fp32_direct", spied)
    stepped(bitsandbytes.optim.AdamW8bit)
    assert [(each.dtype, each.numel()) for each in unpacked] == [(torch.float32, 2**18)] * 2


def test_bitsandbytes_optimizers_were_for_gpus() -> None:
    """The installed release steps on a CPU."""
    import bitsandbytes

    optimizer = stepped(bitsandbytes.optim.AdamW)
    assert all("state1" in state for state in optimizer.state.values())


def test_checkpoints_are_offloaded_from_gpus() -> None:
    """On a machine without an accelerator checkpoints that are offloaded cannot be pinned."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    model, ids = tiny_model().train(), torch.zeros(1, 8, dtype=torch.long)
    model.activation_checkpointing_enable(offload=True)
    with pytest.raises(RuntimeError, match="pin_memory=True requires"):
        model(input_ids=ids, labels=ids)


def test_flex_attention_needs_volta() -> None:
    """torch raises where gradients are asked of flex_attention on a CPU."""
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    query = torch.zeros(1, 1, 8, 16, requires_grad=True)
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        flex_attention(query, query, query)


def test_liger_needs_triton() -> None:
    """Liger's fused loss cannot be imported without Triton, which torch has for GPUs alone."""
    if any(each.metadata["Name"] == "triton" for each in metadata.distributions()):
        pytest.skip("Triton is installed")
    code = "import liger_kernel.ops.fused_linear_cross_entropy"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "No module named 'triton'" in child.stderr


def test_quantised_needs_adapter(model_folder: Path) -> None:
    """The check that Trainer makes refuses a quantised model without an adapter."""
    from transformers import BitsAndBytesConfig, LlamaForCausalLM
    from transformers.trainer_utils import validate_quantization_for_training

    model = LlamaForCausalLM.from_pretrained(model_folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    with pytest.raises(ValueError, match="purely quantized"):
        validate_quantization_for_training(model)


def test_adalomo_needs_cuda() -> None:
    """It moves its state to CUDA, which a machine without it refuses."""
    import torch
    from lomo_optim import AdaLomo

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
        AdaLomo(tiny_model())


def test_galore_8bit_needs_cuda() -> None:
    """Its step waits for CUDA, which a machine without it refuses."""
    import torch
    from galore_torch import GaLoreAdamW8bit

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
        stepped(GaLoreAdamW8bit)


@pytest.mark.parametrize("reentrant", [False, True])
def test_int8_checkpoints_with_reentry(reentrant: bool) -> None:
    """After a checkpointed int8 product its input is still there, unless the checkpoint is reentrant."""
    import bitsandbytes
    import torch
    from torch.utils.checkpoint import checkpoint

    layer = bitsandbytes.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
    layer.load_state_dict({"weight": torch.randn(64, 64)})
    layer = layer.to("cpu")
    inputs: list[weakref.ref[Any]] = []

    def block(x: Any) -> Any:
        made = x.to(torch.bfloat16) * 2
        inputs.append(weakref.ref(made))
        return layer(made)

    out = checkpoint(block, torch.randn(4, 64, requires_grad=True), use_reentrant=reentrant)
    gc.collect()
    assert out.requires_grad
    assert (inputs[0]() is None) == reentrant


def test_zero3_waits_for_every_expert() -> None:
    """In the installed release all experts of a layer are one parameter, which every rank gathers."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**TINY_LLAMA | {"model_type": "mixtral"}, num_local_experts=4)
    shapes = [tuple(p.shape) for name, p in MixtralForCausalLM(config).named_parameters() if "experts" in name]
    assert shapes
    assert all(shape[0] == 4 for shape in shapes)


def test_offload_replaces_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate puts DeepSpeedCPUAdam in the place of any optimizer; of AdamW alone it remains AdamW."""
    import bitsandbytes
    import deepspeed.ops.adam
    import torch
    from accelerate.utils.deepspeed import map_pytorch_optim_to_deepspeed

    monkeypatch.setattr(deepspeed.ops.adam, "DeepSpeedCPUAdam", lambda _groups, **given: given["adamw_mode"])
    weights = [torch.nn.Parameter(torch.ones(4))]
    optimizers = (torch.optim.AdamW(weights), torch.optim.SGD(weights, lr=1.0), bitsandbytes.optim.AdamW8bit(weights))
    assert [map_pytorch_optim_to_deepspeed(each) for each in optimizers] == [True, False, False]


def test_cpu_adam_needs_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With nothing on the PATH, DeepSpeedCPUAdam cannot be compiled, and says that ninja is missing."""
    from deepspeed.ops.op_builder.cpu import CPUAdamBuilder

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(CPUAdamBuilder, "_loaded_ops", {}, raising=False)
    with pytest.raises(RuntimeError, match="ninja not being installed"):
        CPUAdamBuilder().jit_load()


def test_fsdp_needs_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for FSDP on a CPU, accelerate's state is that of a plain process."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    found = Accelerator(cpu=True).state.distributed_type.value
    AcceleratorState._reset_state(reset_partial_state=True)
    assert found in {"NO", "MULTI_CPU"}


def test_fsdp1_offloads_no_checkpoints() -> None:
    """accelerate's plugin refuses to offload checkpoints under the first version."""
    from accelerate.utils import FullyShardedDataParallelPlugin

    with pytest.raises(ValueError, match="requires `fsdp_version=2`"):
        FullyShardedDataParallelPlugin(
            fsdp_version=1, activation_checkpointing=True, activation_checkpointing_offload=True
        )


def optimizer_of(optim: str, **given: Any) -> Any:
    """Ask Trainer for an optimizer's class and options."""
    from transformers import Trainer

    arguments = arguments_of(optim=optim, optim_target_modules="all-linear", use_cpu=True, **given)
    return Trainer.get_optimizer_cls_and_kwargs(arguments, tiny_model())


def test_layerwise_optimizers_do_not_accumulate() -> None:
    """transformers refuses a layerwise optimizer with two micro-steps."""
    with pytest.raises(ValueError, match="does not support gradient accumulation"):
        optimizer_of("apollo_adamw_layerwise", gradient_accumulation_steps=2)


def test_apex_left_transformers() -> None:
    """The name is none of the installed release's."""
    with pytest.raises(ValueError, match="is not a valid OptimizerNames"):
        arguments_of(optim="adamw_apex_fused")


OPTIMIZER_PACKAGES = {
    "torchao": ("adamw_torch_8bit", "is_torchao_available"),
    "lomo-optim": ("lomo", "is_lomo_available"),
    "galore-torch": ("galore_adamw", "is_galore_torch_available"),
    "apollo-torch": ("apollo_adamw", "is_apollo_torch_available"),
    "grokadamw": ("grokadamw", "is_grokadamw_available"),
    "schedulefree": ("schedule_free_adamw", "is_schedulefree_available"),
    "torch-optimi": ("stable_adamw", "is_torch_optimi_available"),
}


@pytest.mark.parametrize("package", OPTIMIZER_PACKAGES)
def test_an_optimizer_without_its_package_is_refused(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers does not find the package, it raises and says so."""
    import transformers.trainer_optimizer as module

    optim, asks = OPTIMIZER_PACKAGES[package]
    monkeypatch.setattr(module, asks, lambda *_: False)
    with pytest.raises((ImportError, ValueError), match=re.compile(r"install|need", re.IGNORECASE)):
        optimizer_of(optim)


OTHER_PACKAGES = ("bitsandbytes", "deepspeed", "flash-attn", "liger-kernel")


@pytest.mark.parametrize("package", OTHER_PACKAGES)
def test_a_method_without_its_package_is_refused(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers or accelerate does not find what quantises, shards, attends or fuses, it raises."""
    refusals = {
        "bitsandbytes": _quantise_without_bitsandbytes,
        "deepspeed": _shard_without_deepspeed,
        "flash-attn": _attend_without_flash_attention,
        "liger-kernel": _fuse_without_liger,
    }
    with pytest.raises(ImportError):
        refusals[package](monkeypatch)


def _quantise_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import BitsAndBytesConfig
    from transformers.quantizers import AutoHfQuantizer, quantizer_bnb_4bit

    quantizer = AutoHfQuantizer.from_config(BitsAndBytesConfig(load_in_4bit=True), pre_quantized=False)
    monkeypatch.setattr(quantizer_bnb_4bit, "is_bitsandbytes_available", lambda *_: False)
    quantizer.validate_environment()


def _shard_without_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator, DeepSpeedPlugin, accelerator

    plugin = DeepSpeedPlugin(zero_stage=2)
    monkeypatch.setattr(accelerator, "is_deepspeed_available", lambda: False)
    Accelerator(deepspeed_plugin=plugin)


def _attend_without_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import modeling_utils

    monkeypatch.setattr(modeling_utils, "is_flash_attn_2_available", lambda *_, **__: False, raising=False)
    tiny_model(attn_implementation="flash_attention_2")


def _fuse_without_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import liger

    monkeypatch.setattr(liger, "is_liger_kernel_available", lambda: False)
    liger.apply_liger_kernel(tiny_model(), None)
