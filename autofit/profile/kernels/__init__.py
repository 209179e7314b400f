"""What a device's kernels do that a trace on fake CPU tensors does not show.

Three kinds of difference, each a table whose entries name the line of source they come from:

- `inside`: temporaries that CUDA's kernels allocate for themselves, where no dispatch sees them;
- `operators`, `attention`, `flex`, `results`: operators that CUDA takes apart in another way, or whose results differ;
- `autocast`: which operators CUDA's autocast runs in fp32.

docs/cuda_semantics.md is made from them (`python -m autofit.profile.kernels.table`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from autofit.profile.kernels.attention import flash_attn_in_transformers
from autofit.profile.kernels.autocast import autocast_as_on_cuda
from autofit.profile.kernels.flex import flex_in_transformers
from autofit.profile.kernels.inside import TemporaryBytes, temporaries
from autofit.profile.kernels.operators import operators_as_on_cuda
from autofit.profile.kernels.results import Substitute, substitutes
from autofit.spec.profile import Regime

__all__ = ["Substitute", "TemporaryBytes", "kernels_of", "substitutes", "temporaries"]


@contextmanager
def kernels_of(regime: Regime) -> Iterator[None]:
    """Let operators and autocast behave as on the regime's device; afterwards everything is as before.

    Raises:
        InputError: the regime's attention has no kernel to imitate.
    """
    with ExitStack() as stack:
        stack.enter_context(flex_in_transformers(regime))
        if regime.device == "cuda":
            stack.enter_context(operators_as_on_cuda(regime))
            stack.enter_context(flash_attn_in_transformers(regime))
            if regime.autocast != "no":
                stack.enter_context(autocast_as_on_cuda())
        yield
