"""CUDA's autocast policy, imposed on fake CPU tensors.

A CPU's autocast leaves layer norms, softmax, pow, sums and norms in half precision; CUDA's runs them in fp32. Which
operators CUDA's policy covers is read from the installed torch's own dispatcher, and which policy each has from the
lists in its header ATen/autocast_mode.h, the ones that CUDA's kernels are registered from
(torch v2.13 aten/src/ATen/autocast_mode.cpp, TORCH_LIBRARY_IMPL(aten, Autocast)).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from autofit.errors import InputError

Policy = Literal["lower_precision", "fp32", "fp32_set_opt_dtype", "fp32_append_dtype", "promote", "banned"]

_LISTS: dict[str, Policy] = {
    "AT_FORALL_LOWER_PRECISION_FP": "lower_precision",
    "AT_FORALL_FP32": "fp32",
    "AT_FORALL_FP32_SET_OPT_DTYPE": "fp32_set_opt_dtype",
    "AT_FORALL_PROMOTE": "promote",
}
_APPENDED_LIST = "AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE"
_BESIDE_THE_LISTS: dict[str, Policy] = {
    "cudnn_convolution": "lower_precision",
    "cudnn_convolution_transpose": "lower_precision",
    "binary_cross_entropy": "banned",
}
"""Registered one by one. Source: torch v2.13 aten/src/ATen/autocast_mode.cpp, TORCH_LIBRARY_IMPL(aten, Autocast)."""

_OF_DEVICE = torch.is_autocast_enabled
_WITHOUT_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)


@cache
def cuda_policy() -> Mapping[str, Policy]:
    """CUDA's policy for each operator it covers, by the operator's name (`softmax.int`), as the installed torch has it.

    Raises:
        InputError: the installed torch comes without its header, or the header does not name a list.
    """
    header = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"
    try:
        text = header.read_text(encoding="utf-8").replace("\\\n", " ")
        entries = {name: _macro(text, name) for name in (*_LISTS, _APPENDED_LIST)}
    except (OSError, KeyError) as error:
        raise InputError(
            f"torch {torch.__version__} does not say which operators CUDA's autocast casts: {error}",
            to_fix="install torch 2.4 or later from its wheel, which has include/ATen/autocast_mode.h",
        ) from error
    policy = dict(_BESIDE_THE_LISTS)
    for name, kind in _LISTS.items():
        for operator in re.findall(r"_\(([^()]+)\)", entries[name]):
            policy[".".join(part.strip() for part in operator.split(","))] = kind
    for operator in re.findall(r'"([\w.]+)"', entries[_APPENDED_LIST]):
        policy[operator] = "fp32_append_dtype"
    return policy


def _macro(text: str, name: str) -> str:
    found = re.search(rf"#define {name}\(_\)([^\n]*)", text)
    if found is None:
        raise KeyError(name)
    return found[1]


@contextmanager
def autocast_as_on_cuda() -> Iterator[None]:
    """Let `torch.autocast("cpu")` cast as CUDA's does; afterwards the CPU's own kernels are in effect again.

    A lower-precision operator that a CPU casts too keeps its kernel, and with it the cache of cast weights. Operators
    that only a CPU casts are let through. Who asks whether autocast is on without naming a device means CUDA, and is
    told of the CPU's: peft leaves inputs of quantised layers as they are where it is on.
    Source: torch v2.13 torch/csrc/autograd/init.cpp, is_autocast_enabled; peft/tuners/lora/bnb.py 0.21,
    `requires_conversion`.
    """
    library = torch.library.Library("aten", "IMPL")
    policy = cuda_policy()
    on_cpu = _registered("AutocastCPU")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for operator in on_cpu - policy.keys():
                library.impl(operator, torch.library.fallthrough_kernel, "AutocastCPU")
            for operator in _registered("AutocastCUDA"):
                if policy[operator] != "lower_precision" or operator not in on_cpu:
                    library.impl(operator, _kernel(operator, policy[operator]), "AutocastCPU")
        torch.is_autocast_enabled = _is_enabled
        yield
    finally:
        torch.is_autocast_enabled = _OF_DEVICE
        library._destroy()


def _is_enabled(device_type: str = "cpu") -> bool:
    return _OF_DEVICE(device_type)


def _registered(dispatch_key: str) -> set[str]:
    """Names of the operators that have a kernel of their own at a dispatch key."""
    found = torch._C._dispatch_get_registrations_for_dispatch_key(dispatch_key)
    return {name.removeprefix("aten::") for name in found if name.startswith("aten::")}


def _kernel(operator: str, policy: Policy) -> Callable[..., Any]:
    name, _, overload = operator.partition(".")
    plain = getattr(getattr(torch.ops.aten, name), overload or "default")
    kernels = {
        "lower_precision": lambda *a, **k: _cast_all(plain, torch.get_autocast_dtype("cpu"), a, k),
        "fp32": lambda *a, **k: _cast_all(plain, torch.float32, a, k),
        "fp32_set_opt_dtype": _setting_dtype(plain),
        "fp32_append_dtype": _appending_dtype(name, plain),
        "promote": lambda *a, **k: _cast_all(plain, _widest(a, k), a, k),
        "banned": _banned(name),
    }

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_WITHOUT_AUTOCAST):
            return kernels[policy](*args, **kwargs)

    return kernel


def _is_eligible(value: Any) -> bool:
    """As at::autocast::is_eligible: a floating tensor that is not fp64."""
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, (list, tuple)):
        return [_cast(each, dtype) for each in value]
    return value.to(dtype) if _is_eligible(value) else value


def _cast_all(plain: Callable[..., Any], dtype: torch.dtype, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return plain(*(_cast(arg, dtype) for arg in args), **{name: _cast(arg, dtype) for name, arg in kwargs.items()})


def _widest(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.dtype:
    leaves = torch.utils._pytree.tree_leaves((args, kwargs))
    dtypes = {leaf.dtype for leaf in leaves if _is_eligible(leaf)}
    return torch.float32 if torch.float32 in dtypes else torch.get_autocast_dtype("cpu")


def _setting_dtype(plain: Any) -> Callable[..., Any]:
    """Result in fp32 unless the caller chose its dtype: the operator reads halves and converts as it goes."""
    position = next((n for n, arg in enumerate(plain._schema.arguments) if arg.name == "dtype"), None)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        assert position is not None, plain
        chosen = kwargs.get("dtype", args[position] if len(args) > position else None)
        if not _is_eligible(args[0]) or chosen is not None:
            return plain(*args, **kwargs)
        return plain(*args[:position], **{**kwargs, "dtype": torch.float32})

    return kernel


def _appending_dtype(name: str, plain: Any) -> Callable[..., Any]:
    """Call the overload that takes a result dtype, with fp32 (torch has no other such operator than `norm`)."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.float32 if _is_eligible(args[0]) else args[0].dtype
        names = [argument.name for argument in plain._schema.arguments]
        defaults = {argument.name: argument.default_value for argument in plain._schema.arguments}
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        return getattr(torch.ops.aten, name)(*(given.get(n, defaults[n]) for n in names), dtype=dtype)

    return kernel


def _banned(name: str) -> Callable[..., Any]:
    def kernel(*_args: Any, **_kwargs: Any) -> Any:
        raise RuntimeError(f"torch.nn.functional.{name} is unsafe to autocast on CUDA, which refuses it")

    return kernel
