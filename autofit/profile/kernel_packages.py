"""Refuses layers that leave torch for a package's own CUDA kernels, which a trace cannot follow."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys

from torch import nn

from autofit.errors import InputError
from autofit.spec.hardware import DeviceKind

_FROM_HUB = re.compile(r"""use_kernel_func_from_hub_with_fallback\(\s*["'][^"']+["'],\s*["']([^"']+)["']""")
_IMPORTED = re.compile(r"^\s*(?:from|import) (mamba_ssm|causal_conv1d|fla|xlstm)\b", re.MULTILINE)
HUB_CLIENT = "kernels"
"""The package that fetches kernels from the Hub; without it transformers takes what it finds installed.
Source: transformers/integrations/hub_kernels.py 5.23, lazy_load_kernel."""


def kernel_packages(model: nn.Module) -> set[str]:
    """Return the packages whose kernels a model's layers run where they are installed, and torch operators otherwise.

    Read from the source of the modules that its classes come from.
    """
    modules = {type(module).__module__ for module in model.modules()}
    sources = [_source(name) for name in modules if name.startswith("transformers.models.")]
    return {package for source in sources for pattern in (_FROM_HUB, _IMPORTED) for package in pattern.findall(source)}


def refuse_kernel_packages(model: nn.Module, device: DeviceKind) -> None:
    """Refuse a model that would run kernels of an installed package on a GPU: their memory is not the trace's.

    Where none is installed, a GPU runs the same torch operators as the trace.

    Raises:
        InputError: a package is installed that the model's layers take kernels from.
    """
    if device != "cuda":
        return
    packages = kernel_packages(model)
    installed = sorted(name for name in packages if importlib.util.find_spec(name.replace("-", "_")) is not None)
    if packages and importlib.util.find_spec(HUB_CLIENT) is not None:
        installed.append(HUB_CLIENT)
    if installed:
        raise InputError(
            f"{type(model).__name__} runs CUDA kernels of {', '.join(installed)}, whose memory a trace cannot show.",
            to_fix="train in an environment without it (slower, in torch operators) and trace there",
        )


def _source(module: str) -> str:
    try:
        return inspect.getsource(sys.modules[module])
    except (OSError, TypeError, KeyError):
        return ""
