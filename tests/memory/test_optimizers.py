"""What optimizers hold and take, against the optimizers themselves on CPU tensors."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, get_args

import pytest
import torch
from msgspec.structs import replace

from autofit.memory.optimizers import OPTIMIZERS, UNMODELLED, step_frame
from autofit.memory.static import optimizer_bytes, partition_optimizer_bytes
from autofit.memory.tensors import Tensor
from autofit.runtime.live_bytes import LiveBytes
from autofit.spec.configuration import Optim

SHAPES = [(512, 256), (64, 64), (1000, 100), (300, 333), (8, 30, 40), (63,), (4095,)]
"""Below, at and above the bounds of 4,096 and 100,000 elements, some that 256 does not divide, and one of experts.

Vectors last, as the Trainer's groups have them."""
QMAP = "qmap"
"""bitsandbytes' code tables: made once and shared by every tensor."""
CODE_TABLES_BYTES = 2 * 256 * 4
DTYPES = [torch.float32, torch.bfloat16]
Parameters = list[torch.nn.Parameter]
Maker = Callable[[Parameters], Any]


def parameters(
    dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, ...]] = SHAPES
) -> list[torch.nn.Parameter]:
    """Make parameters with gradients."""
    made = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]
    for parameter in made:
        parameter.grad = torch.ones_like(parameter)
    return made


def described(parameter: torch.Tensor, *, embeds: bool = False) -> Tensor:
    """Describe a parameter as the memory model sees it."""
    rows = parameter.shape[0] if parameter.dim() > 1 else 1
    size = parameter.element_size()
    columns = parameter.shape[-1]
    return Tensor(parameter.numel(), size, trains=True, embeds=embeds, kind="parameter", rows=rows, columns=columns)


def held_bytes(optimizer: Any, parameter: torch.Tensor) -> int:
    """Count an optimizer's real state tensors of one parameter."""
    state = optimizer.state[parameter]
    return sum(t.nbytes for name, t in state.items() if torch.is_tensor(t) and not name.startswith(QMAP))


def step_temporary(optimizer: Any, num_before: int = 1) -> int:
    """Return the most bytes that a later step holds above its start."""
    for _ in range(num_before):
        optimizer.step()
    with counting_from_here() as live:
        before = live.now_bytes
        optimizer.step()
        return live.peak_bytes - before


@contextmanager
def counting_from_here() -> Iterator[LiveBytes]:
    """Count what is alive, and not what tests before left in cycles: Python may collect those at any moment."""
    gc.collect()
    with LiveBytes() as live:
        live.count_existing()
        live.reset_peak()
        yield live


def unrounded(name: Optim, made: Parameters, device: Any) -> int:
    """Return what is said of a device's step, without the blocks that its allocator rounds to."""
    return sum(step_frame(name, [described(p) for p in made], device).at_peak)


def as_trainer_groups(made: Parameters) -> Any:
    """Put vectors in a second group, as the Trainer does with norms and biases."""
    return [{"params": [p for p in made if p.dim() > 1]}, {"params": [p for p in made if p.dim() == 1]}]


def assert_state_is_as_said(name: Optim, optimizer: Any, made: Parameters) -> None:
    """Compare the state of every tensor, wherever it lives."""
    for parameter in made:
        kept = OPTIMIZERS[name].state(described(parameter))
        assert sum(kept.device) + kept.counter + kept.host == held_bytes(optimizer, parameter), parameter.shape


def _adafactor(made: Parameters) -> Any:
    from transformers.optimization import Adafactor

    return Adafactor(made, lr=1e-3, scale_parameter=False, relative_step=False)


TORCH: list[tuple[Optim, str, Maker]] = [
    ("adamw_torch", "cuda", lambda made: torch.optim.AdamW(made, foreach=True)),
    ("adamw_torch", "cpu", lambda made: torch.optim.AdamW(made, foreach=False)),
    ("adamw_torch_fused", "cuda", lambda made: torch.optim.AdamW(made, fused=True)),
    ("sgd", "cuda", lambda made: torch.optim.SGD(made, foreach=True)),
    ("sgd", "cpu", lambda made: torch.optim.SGD(made, foreach=False)),
    ("adagrad", "cuda", lambda made: torch.optim.Adagrad(made, foreach=True)),
    ("adagrad", "cpu", lambda made: torch.optim.Adagrad(made, foreach=False)),
    ("rmsprop", "cuda", lambda made: torch.optim.RMSprop(made, foreach=True)),
    ("rmsprop", "cpu", lambda made: torch.optim.RMSprop(made, foreach=False)),
    ("adafactor", "cuda", _adafactor),
    ("adafactor", "cpu", _adafactor),
]
"""By whose step it is: a GPU's is had on a CPU by asking for `foreach`."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "device", "make"), TORCH, ids=[f"{name}-{device}" for name, device, _ in TORCH])
def test_state_and_step_are_those_of_the_real_optimizer(name, device, make, dtype):
    """State of every tensor and the most that a step holds above its start: to the byte, in fp32 and in halves."""
    made = parameters(dtype)
    optimizer = make(made)
    assert step_temporary(optimizer) == unrounded(name, made, device)
    if name != "sgd":  # keeps a None
        assert_state_is_as_said(name, optimizer, made)


@pytest.mark.parametrize("case", [("adamw_torch", "cpu"), ("rmsprop", "cpu"), ("adagrad", "cpu"), ("adafactor", "cpu")])
def test_neighbours_are_those_of_the_trainers_groups(case):
    """What is left of the tensor before is of a matrix, though vectors lie between in the model."""
    make = next(make for name, device, make in TORCH if (name, device) == case)
    made = parameters(shapes=[(100, 90), (50,), (300, 333), (50,), (100, 100), (50,), (400, 300), (50,), (2, 2)])
    name, device = case
    assert step_temporary(make(as_trainer_groups(made))) == unrounded(name, made, device)


def test_a_gpu_holds_no_step_counts_but_fused_ones():
    """torch leaves AdamW's step counts on the host; fused ones are on the device, 512 bytes each."""
    model = tuple(described(parameter) for parameter in parameters(shapes=[(512, 256)] * 3))
    bare = 2 * 3 * 512 * 256 * 4
    assert optimizer_bytes(model, "adamw_torch", "cuda").state == bare
    assert optimizer_bytes(model, "adamw_torch_fused", "cuda").state == bare + 3 * 512
    assert optimizer_bytes(model, "adamw_torch", "cpu").state == bare + 3 * 4


def test_a_flat_partition_is_not_factored():
    """DeepSpeed hands over a vector: Adafactor then keeps a whole second moment, four bytes an element."""
    partition = torch.nn.Parameter(torch.ones(50_000))
    partition.grad = torch.ones_like(partition)
    optimizer = _adafactor([partition])
    optimizer.step()
    assert partition_optimizer_bytes(50_000, "adafactor", "cpu").state == held_bytes(optimizer, partition)


def a_bitsandbytes_optimizer(name: str, made: Parameters) -> Any:
    """Make the optimizer that transformers makes for a name."""
    from bitsandbytes import optim

    kinds = {"adamw": optim.AdamW, "lion": optim.Lion, "ademamix": optim.AdEMAMix, "rmsprop": optim.RMSprop}
    kind = next(kinds[key] for key in kinds if key in name)
    paged = {"is_paged": True} if name.startswith("paged") else {}
    return kind(made, optim_bits=8 if name.endswith("8bit") else 32, **paged)


BITSANDBYTES = [
    name
    for name in OPTIMIZERS
    if any(key in name for key in ("_8bit", "lion", "ademamix", "bnb", "paged")) and "galore" not in name
]


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", [name for name in BITSANDBYTES if "torch" not in name])
def test_bitsandbytes_optimizers_hold_what_is_said(name):
    """The bytes on the device and, where it pages, on the host together are those of bitsandbytes' own state."""
    if name.startswith("paged_ademamix"):
        pytest.skip("its double state asks for managed memory also on a CPU")
    made = parameters()
    optimizer = a_bitsandbytes_optimizer(name, made)
    optimizer.step()
    assert_state_is_as_said(name, optimizer, made)
    for parameter in made:
        pages = name.startswith("paged") and parameter.numel() >= 100_000
        assert (OPTIMIZERS[name].state(described(parameter)).host > 0) == pages
    assert unrounded(name, made, "cuda") == 0


def test_paged_state_is_the_same_as_unpaged():
    """Paging moves AdEMAMix's three moments from 100,000 elements on, and nothing else."""
    for bits in ("8bit", "32bit"):
        plain = OPTIMIZERS["ademamix_8bit" if bits == "8bit" else "ademamix"]
        paged = OPTIMIZERS["paged_ademamix_8bit" if bits == "8bit" else "paged_ademamix_32bit"]
        for parameter in parameters():
            whole, moved = plain.state(described(parameter)), paged.state(described(parameter))
            assert sum(whole.device) == sum(moved.device) + moved.host
            moments = 3 * parameter.numel() * (1 if bits == "8bit" else 4)
            assert moved.host == (moments if parameter.numel() >= 100_000 else 0)


@pytest.mark.parametrize("name", ["adamw_8bit", "lion_8bit", "ademamix_8bit", "rmsprop_bnb_8bit"])
def test_embeddings_keep_32_bits_under_the_trainers_override(name, monkeypatch):
    """transformers registers every nn.Embedding for 32-bit state."""
    from bitsandbytes.optim import GlobalOptimManager

    # bitsandbytes keeps one list for the process, by position: other optimizers' first parameter would be meant too.
    monkeypatch.setattr(GlobalOptimManager, "_instance", None)
    embedding = torch.nn.Embedding(1000, 64)
    optimizer = a_bitsandbytes_optimizer(name, list(embedding.parameters()))
    GlobalOptimManager.get_instance().register_module_override(embedding, "weight", {"optim_bits": 32})
    embedding.weight.grad = torch.ones_like(embedding.weight)
    optimizer.step()
    kept = OPTIMIZERS[name].state(described(embedding.weight, embeds=True))
    assert sum(kept.device) == held_bytes(optimizer, embedding.weight)
    assert sum(kept.device) % (4 * 64_000) == 0


def test_every_name_is_one_that_transformers_takes():
    """What is offered are names of transformers' own list, spelt the same, and of ours."""
    from transformers.training_args import OptimizerNames

    assert set(OPTIMIZERS) <= {name.value for name in OptimizerNames}
    assert set(OPTIMIZERS) <= set(get_args(Optim))


def _schedule_free(name: str) -> Maker:
    schedulefree = pytest.importorskip("schedulefree")
    kinds = {"adamw": "AdamWScheduleFree", "radam": "RAdamScheduleFree", "sgd": "SGDScheduleFree"}
    kind = getattr(schedulefree, kinds[name.rsplit("_", 1)[-1]])

    def make(made: Parameters) -> Any:
        optimizer = kind(made)
        optimizer.train()
        return optimizer

    return make


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd"])
def test_schedule_free_optimizers_hold_and_take_what_is_said(name, dtype):
    """They use foreach on every device; RAdam's rectified step comes after some warming up."""
    make = _schedule_free(name)
    made = parameters(dtype)
    optimizer = make(made)
    assert step_temporary(optimizer, num_before=7) == unrounded(name, made, "cuda")
    assert_state_is_as_said(name, optimizer, made)


@pytest.mark.parametrize("dtype", DTYPES)
def test_stable_adamw_holds_and_takes_what_is_said(dtype):
    """Halves keep what rounding loses; a CPU takes two copies of the largest tensor."""
    optimi = pytest.importorskip("optimi")
    made = parameters(dtype)
    optimizer = optimi.StableAdamW(made, lr=1e-3)
    assert step_temporary(optimizer) == unrounded("stable_adamw", made, "cpu")
    assert_state_is_as_said("stable_adamw", optimizer, made)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("ignore")
def test_grokadamw_holds_and_takes_what_is_said(dtype):
    """Its three states live on the host, in the group and not under the parameter."""
    grokadamw = pytest.importorskip("grokadamw")
    made = parameters(dtype)
    optimizer = grokadamw.GrokAdamW(made)
    assert step_temporary(optimizer) == unrounded("grokadamw", made, "cpu")
    for parameter in made:
        state = optimizer.param_groups[0]["state"][parameter]
        held = sum(t.nbytes for t in state.values() if torch.is_tensor(t))
        assert OPTIMIZERS["grokadamw"].state(described(parameter)).host == held


@pytest.mark.parametrize("name", ["adamw_torch_8bit", "adamw_torch_4bit"])
def test_torchao_optimizers_hold_what_is_said(name):
    """Codes, scales and a code table for each moment of a tensor that is large and even enough."""
    torchao = pytest.importorskip("torchao.optim")
    made = parameters(torch.bfloat16)
    optimizer = (torchao.AdamW8bit if name.endswith("8bit") else torchao.AdamW4bit)(made, block_size=256)
    for parameter in made:
        moments = [optimizer._new_buffer(parameter, signed) for signed in (True, False)]
        parts = [getattr(m, part) for m in moments for part in ("codes", "scale", "qmap") if hasattr(m, part)]
        held = sum(part.nbytes for part in parts) or sum(m.nbytes for m in moments)
        assert sum(OPTIMIZERS[name].state(described(parameter)).device) == held


def test_apollo_holds_and_takes_what_is_said():
    """Linear weights have moments of rank 128 and a projection; the step scales and limits a whole gradient."""
    apollo = pytest.importorskip("apollo_torch")
    made = parameters(shapes=[(512, 256), (63,), (300, 333), (256, 700)])
    linear = [parameter for parameter in made if parameter.dim() == 2]
    rank = {"rank": 128, "update_proj_gap": 200, "scale": 1.0, "proj": "random", "proj_type": "std"}
    groups = [{"params": [made[1]]}, {"params": linear, **rank, "scale_type": "channel"}]
    optimizer = apollo.APOLLOAdamW(groups, lr=1e-3)
    first = step_frame("apollo_adamw", [described(p) for p in made], "cpu", is_first=True).peak_bytes
    assert step_temporary(optimizer, num_before=0) == pytest.approx(first, abs=64)
    assert step_temporary(optimizer) == pytest.approx(unrounded("apollo_adamw", made, "cpu"), abs=64)
    for parameter in made:
        projector = optimizer.state[parameter].get("projector")
        projection = projector.ortho_matrix.nbytes if projector else 0
        kept = OPTIMIZERS["apollo_adamw"].state(described(parameter))
        assert sum(kept.device) == held_bytes(optimizer, parameter) + projection


GALORE: dict[str, tuple[str, dict[str, Any]]] = {
    "galore_adamw": ("GaLoreAdamW", {}),
    "galore_adafactor": ("GaLoreAdafactor", {"scale_parameter": False, "relative_step": False}),
    "galore_adamw_8bit": ("GaLoreAdamW8bit", {}),
}
"""Class and arguments. Source: transformers/trainer_optimizer.py 5.23, _get_galore_optimizer."""
GALORE_SHAPES = [(63,), (1000, 40), (512, 256), (300, 333), (256, 700), (200, 200), (60, 50), (4095,)]
"""Tall, wide, square, and with a side below GaLore's rank; two vectors, and an embedding, which is not projected."""


def galore_groups(made: Parameters) -> Any:
    """Group parameters as transformers does for GaLore; every step decomposes anew."""
    projects = {"rank": 128, "update_proj_gap": 1, "scale": 0.25, "proj_type": "std"}
    others = [p for n, p in enumerate(made) if p.dim() == 1 or n == 1]
    return [{"params": others}, {"params": [p for n, p in enumerate(made) if p.dim() == 2 and n != 1], **projects}]


@pytest.mark.filterwarnings("ignore:This implementation of AdamW is deprecated")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GALORE)
def test_galore_holds_and_takes_what_is_said(name, dtype, monkeypatch):
    """State with the projector, and steps that decompose every gradient: to the byte, in fp32 and in halves.

    The first makes the state of a tensor when it comes to it. Left out is what a decomposition allocates inside, and
    that the 8-bit one, which frees gradients, waits for a GPU.
    """
    galore = pytest.importorskip("galore_torch")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    made = parameters(dtype, GALORE_SHAPES)
    for parameter in made:
        parameter.grad = torch.randn_like(parameter)
    kind, arguments = GALORE[name]
    optimizer = getattr(galore, kind)(galore_groups(made), lr=1e-3, **arguments)
    said = [described(parameter, embeds=number == 1) for number, parameter in enumerate(made)]
    first = step_frame(name, said, "cpu", is_first=True).peak_bytes
    assert step_temporary(optimizer, num_before=0) == pytest.approx(first, abs=CODE_TABLES_BYTES)
    for parameter in made:
        parameter.grad = torch.randn_like(parameter)
    assert step_temporary(optimizer, num_before=0) == step_frame(name, said, "cpu").peak_bytes
    for parameter, tensor in zip(made, said, strict=True):
        projector = optimizer.state[parameter].get("projector")
        projection = projector.ortho_matrix.untyped_storage().nbytes() if projector else 0
        kept = OPTIMIZERS[name].state(tensor)
        assert sum(kept.device) == held_bytes(optimizer, parameter) + projection, parameter.shape


def test_a_gpus_decomposition_copies_the_matrix_and_takes_a_workspace():
    """Beside the factors that are returned: the copy that torch's source makes, and what is assumed for cuSOLVER."""
    matrix = Tensor(4096 * 11008, 4, trains=True, embeds=False, kind="parameter", rows=4096, columns=11008)
    whole, square = matrix.num_bytes, 4 * 4096**2
    factors = whole + 4 * 4096 + square
    assert step_frame("galore_adamw", [matrix], "cuda").peak_bytes == factors + whole + (2 * whole + 4 * square) + 512


@pytest.mark.parametrize("name", ["galore_adamw", "apollo_adamw"])
def test_what_is_no_linear_layer_is_not_projected(name):
    """transformers projects an nn.Linear's weight alone: not GPT-2's Conv1D, nor a tensor of all experts' matrices."""
    linear = Tensor(512 * 256, 4, trains=True, embeds=False, kind="parameter", rows=512, columns=256)
    whole = 2 * linear.num_bytes
    assert sum(OPTIMIZERS[name].state(linear).device) < whole
    experts = replace(linear, num_elements=8 * 512 * 256, rows=8, columns=256)
    assert sum(OPTIMIZERS[name].state(replace(linear, outside_linear=True)).device) == whole
    assert sum(OPTIMIZERS[name].state(experts).device) == 8 * whole


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["lomo", "adalomo"])
def test_lomo_takes_what_is_said_for_one_gradient(name, dtype, monkeypatch):
    """What updating a weight inside backward holds, with the gradient that it uses up."""
    lomo = pytest.importorskip("lomo_optim")
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    model = torch.nn.Linear(300, 200, bias=False, dtype=dtype)
    optimizer = (lomo.Lomo if name == "lomo" else lomo.AdaLomo)(model)
    model.weight.grad = torch.ones_like(model.weight)
    with counting_from_here() as live:
        before = live.now_bytes - model.weight.grad.nbytes
        optimizer.grad_func(0)
        taken = live.peak_bytes - before
    assert model.weight.grad is None
    assert taken == pytest.approx(unrounded(name, [model.weight], "cpu"), abs=64)
    if name == "adalomo":
        sums = optimizer.exp_avg_sq_row["weight"].nbytes + optimizer.exp_avg_sq_col["weight"].nbytes
        assert sum(OPTIMIZERS[name].state(described(model.weight)).device) == sums


def test_every_name_of_a_configuration_is_modelled_or_refused_with_a_reason():
    """No name falls between the two."""
    assert set(OPTIMIZERS) | set(UNMODELLED) == set(get_args(Optim))
    assert not set(OPTIMIZERS) & set(UNMODELLED)


def test_clipping_takes_sums_for_chunks_of_the_largest_gradient():
    """Worked out from torch's source for three tensors, the largest of 131,072,000 elements: 2,000 chunks."""
    model = tuple(
        Tensor(elements, 2, trains=True, embeds=False, kind="parameter") for elements in (131_072_000, 4096, 4096)
    )
    sums, global_sums, norms = -(-4 * 3 * 2000 // 512) * 512, -(-4 * 320 // 512) * 512, 3 * 512
    assert optimizer_bytes(model, "adamw_torch_fused", "cuda").step == sums + global_sums + norms
    assert optimizer_bytes(model, "adamw_torch", "cuda").step == 2 * (131_072_000 + 4096 + 4096)
    assert optimizer_bytes(model, "adamw_torch_fused", "cpu").step == 0


def test_planning_an_optimizer_imports_none_of_them():
    """The table is arithmetic: neither torch nor an optimizer's package is imported with it."""
    code = "import sys, autofit.memory.optimizers; sys.exit('torch' in sys.modules or 'bitsandbytes' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
