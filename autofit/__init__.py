"""Finds the cheapest training configuration that fits the GPUs, writes its files, and launches the script with them.

From Python: `autofit.estimate(model=..., gpus=..., seq_len=..., method="lora")`; likewise `make_plan`, `explain`,
`estimate_inference` and `measure_data`. A script that puts its plan into effect itself asks for `current_plan()`.
Keywords are the options of the command line; a refusal is an
`autofit.AutofitError` with `message` and `to_fix`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autofit.errors import AutofitError

if TYPE_CHECKING:
    from autofit.api import estimate, estimate_inference, explain, make_plan, measure_data
    from autofit.runtime.current import current_plan

__all__ = ["AutofitError", "current_plan", "estimate", "estimate_inference", "explain", "make_plan", "measure_data"]


def __getattr__(name: str) -> Any:
    """Import the interface when it is asked for: importing the package costs nothing."""
    if name not in __all__:
        raise AttributeError(f"module 'autofit' has no attribute {name!r}")
    if name == "current_plan":
        from autofit.runtime.current import current_plan

        return current_plan
    from autofit import api

    return getattr(api, name)
