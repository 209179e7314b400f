"""The hooks set what the plan decided, and nothing else."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from msgspec import structs

from autofit.launch.evidence import read_events
from autofit.runtime.apply import set_fields
from autofit.runtime.events import EventLog
from autofit.runtime.import_hooks import patch_after_import
from autofit.runtime.model import bits_and_bytes_config, build_as_planned, load_as_planned, quantize_in_place
from autofit.runtime.run import is_out_of_memory
from autofit.runtime.session import Session
from autofit.runtime.verify import Check, check_first_batch, optimizer_name, table
from autofit.spec.configuration import Quantization
from tests.plans import TINY_LLAMA, a_configuration, a_plan
from tests.scripts import write_tiny_llama


@dataclasses.dataclass
class New:
    """The checkpointing fields of transformers 5.23."""

    bf16: bool = False
    optim: str = "sgd"
    gradient_checkpointing: bool | None = None
    activation_checkpointing: bool | None = None


@dataclasses.dataclass
class Old:
    """The checkpointing field of transformers 4.45."""

    bf16: bool = False
    gradient_checkpointing: bool = False


def test_decided_fields_are_set_and_the_scripts_values_reported() -> None:
    """What the script had said is returned beside the plan's value; what agrees is not mentioned."""
    arguments = New(optim="adamw_torch")
    assert set_fields(arguments, {"bf16": True, "optim": "adamw_torch"}) == {"bf16": ["False", "True"]}
    assert arguments.bf16


@pytest.mark.parametrize("written", ["gradient_checkpointing", "activation_checkpointing"])
@pytest.mark.parametrize("given", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_is_set_under_the_name_that_is_obeyed(written: str, given: str) -> None:
    """Whichever name the file has and the script used, the name that the release obeys gets the plan's value."""
    arguments = New(**{given: True})
    assert set_fields(arguments, {written: False}) == {"activation_checkpointing": ["True", "False"]}
    assert (arguments.activation_checkpointing, arguments.gradient_checkpointing) == (False, None)
    old = Old(gradient_checkpointing=True)
    set_fields(old, {written: False})
    assert old.gradient_checkpointing is False


def test_an_unknown_field_is_an_error() -> None:
    """A field that this release does not have cannot be set in silence."""
    with pytest.raises(AttributeError):
        set_fields(Old(), {"no_such_field": 1})


def test_modules_are_patched_when_imported_and_at_once_if_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """A patch runs right after its module's own code, once."""
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    seen: list[tuple[str, bool]] = []
    patch_after_import(
        {
            "colorsys": lambda module: seen.append((module.__name__, hasattr(module, "hls_to_rgb"))),
            "json": lambda module: seen.append((module.__name__, hasattr(module, "loads"))),
        }
    )
    import colorsys

    assert seen == [("json", True), ("colorsys", True)]
    assert colorsys.__name__ == "colorsys"


def test_what_counts_as_out_of_memory() -> None:
    """Torch's, Python's and the CPU allocator's errors do, also as the cause of another; other errors do not."""
    wrapped = ValueError("loading failed")
    wrapped.__cause__ = MemoryError()
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."))
    assert is_out_of_memory(wrapped)
    assert not is_out_of_memory(KeyError("out of memory"))
    assert not is_out_of_memory(RuntimeError("Connection closed by peer"))


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_quantising_in_place_equals_quantising_while_loading(bits: Literal[4, 8], tmp_path: Path) -> None:
    """The packed bytes, the scales and what the Trainer looks at are those of from_pretrained(quantization_config)."""
    from transformers import AutoModelForCausalLM
    from transformers.trainer_utils import validate_quantization_for_training

    folder = write_tiny_llama(tmp_path / "model")
    config = bits_and_bytes_config(a_configuration(method="qlora", quantization=Quantization(bits=bits)))
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)
    placed = quantize_in_place(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), config)
    for (name, one), (same, other) in zip(loaded.named_parameters(), placed.named_parameters(), strict=True):
        assert name == same
        assert torch.equal(one, other), name
        if hasattr(one, "quant_state"):
            assert torch.equal(one.quant_state.absmax, other.quant_state.absmax), name
        if one.dtype == torch.int8:
            assert torch.equal(one.SCB, other.SCB), name
    for attribute in ("is_quantized", f"is_loaded_in_{bits}bit", "quantization_method"):
        assert getattr(loaded, attribute) == getattr(placed, attribute)
    with pytest.raises(ValueError, match="purely quantized"):  # as for a loaded one, until an adapter is on it
        validate_quantization_for_training(placed)


def test_the_table_marks_what_is_not_in_effect() -> None:
    """Both values are shown, and the line that differs is marked."""
    checks = [Check(setting="optim", planned="a", in_effect="b"), Check(setting="sharding", planned="c", in_effect="c")]
    lines = table(checks).splitlines()
    assert lines[1].split("<-")[0].split() == ["optim", "a", "b"]
    assert [line.endswith("<- not in effect") for line in lines] == [False, True, False]


@pytest.mark.parametrize(
    ("rows", "tokens", "holds"), [(2, 32, True), (2, 20, True), (2, 33, False), (1, 32, False), (3, 32, False)]
)
def test_the_first_batch_may_be_shorter_but_not_larger(rows: int, tokens: int, holds: bool) -> None:
    """Sequences up to the planned length need no more than planned; other rows, or longer ones, are not the plan."""
    assert all(check.holds for check in check_first_batch(a_plan(), rows, tokens)) == holds


@pytest.mark.parametrize(("rows", "tokens", "holds"), [(1, 64, True), (1, 40, True), (1, 65, False), (2, 32, False)])
def test_without_padding_a_batch_is_one_row(rows: int, tokens: int, holds: bool) -> None:
    """Where all sequences of a micro-batch were planned to be one row, a padded batch is not the plan."""
    plan = a_plan()
    for batching in ("padding_free", "packed"):
        planned = structs.replace(plan, configuration=structs.replace(plan.configuration, batching=batching))
        assert all(check.holds for check in check_first_batch(planned, rows, tokens)) == holds


NAMED_OPTIMIZERS = [
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_8bit",
    "paged_adamw_8bit",
    "sgd",
    "adagrad",
    "rmsprop",
    "adafactor",
    "lion_8bit",
    "paged_lion_32bit",
    "ademamix_8bit",
    "paged_ademamix_32bit",
    "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit",
]


@pytest.mark.parametrize("optim", NAMED_OPTIMIZERS)
def test_an_optimizer_is_named_as_the_trainer_was_asked_for_it(optim: str, tmp_path: Path) -> None:
    """The optimizer that transformers makes of a name is recognised as that name."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(output_dir=str(tmp_path), optim=optim, report_to="none", use_cpu=True)
    kind, keywords = Trainer.get_optimizer_cls_and_kwargs(arguments)
    assert optimizer_name(kind([torch.nn.Parameter(torch.zeros(2))], **keywords)) == optim


def test_the_runtime_refuses_to_run_by_hand() -> None:
    """Started without a run folder it says so and names the command to use."""
    done = subprocess.run(
        [sys.executable, "-m", "autofit.runtime", "train.py"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "autofit launch" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_scripts_device_map_is_left_to_the_plan(tmp_path: Path) -> None:
    """A model that the script would part over devices is loaded whole, and the change is recorded."""
    from transformers import LlamaForCausalLM

    folder = write_tiny_llama(tmp_path / "model")
    session = _session(tmp_path)
    load = LlamaForCausalLM.from_pretrained
    whole = load_as_planned(session, LlamaForCausalLM, load, (folder,), {"device_map": {"": "disk"}})
    assert not hasattr(whole, "hf_device_map")
    (event,) = read_events(tmp_path)
    assert event.detail["changes"] == {"device_map": ["{'': 'disk'}", "the plan's"]}


def _session(folder: Path) -> Session:
    """Return the session of one rank with a plan of bf16 weights."""
    plan = a_plan(a_configuration(weights_dtype="bfloat16", attention="eager"))
    log = EventLog(run_folder=folder, rank=0)
    return Session(plan=plan, run_folder=folder, training_arguments={}, rank=0, log=log, strict=True)


@pytest.mark.slow
def test_a_model_made_from_its_config_is_made_as_planned(tmp_path: Path) -> None:
    """Dtype and attention are the plan's; a model of another shape, and a part of a model, are left alone."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_utils import PreTrainedModel

    session = _session(tmp_path)
    build = functools.partial(PreTrainedModel._from_config.__func__, LlamaForCausalLM)
    config = LlamaConfig(**TINY_LLAMA)
    made = build_as_planned(session, LlamaForCausalLM, build, config, {"dtype": torch.float32})
    assert (made.dtype, made.config._attn_implementation) == (torch.bfloat16, "eager")
    (event,) = read_events(tmp_path)
    assert event.detail["changes"] == {"dtype": ["torch.float32", "the plan's"]}
    other = LlamaConfig(**TINY_LLAMA | {"hidden_size": 32})
    assert build_as_planned(session, LlamaForCausalLM, build, other, {}).dtype == torch.float32
    assert len(read_events(tmp_path)) == 1
