"""Runs a script under every hook of discovery.

Weights cost nothing (every parameter is one stored zero, expanded), nothing is trained, no output folder stays, no
connection leaves the machine, and no GPU is seen. What was found is written as `autofit.spec.discovered.Discovered`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from autofit.runtime.discover.adapters import hook_adapters, hook_kbit
from autofit.runtime.discover.arguments import hook_training_arguments
from autofit.runtime.discover.loops import (
    hook_accelerator,
    hook_backward,
    hook_clipping,
    hook_dataloader,
    hook_own_ddp,
)
from autofit.runtime.discover.models import hook_models
from autofit.runtime.discover.observed import Observed
from autofit.runtime.discover.side_effects import (
    forbid_network,
    hook_hub,
    hook_process_groups,
    hook_tokenizers,
    hook_trackers,
    watch_files,
)
from autofit.runtime.discover.trainers import hook_dpo, hook_trainer
from autofit.runtime.discover.weights import hide_gpus, make_modules_thrifty
from autofit.runtime.import_hooks import patch_after_import
from autofit.runtime.run import run_script

ALLOW_NETWORK = "--allow-network"

HOOKS: dict[str, Callable[[Observed, ModuleType], None]] = {
    "accelerate.accelerator": hook_accelerator,
    "huggingface_hub.hf_api": hook_hub,
    "peft.peft_model": hook_adapters,
    "peft.utils.other": hook_kbit,
    "torch._tensor": hook_backward,
    "torch.distributed.distributed_c10d": hook_process_groups,
    "torch.nn.parallel.distributed": hook_own_ddp,
    "torch.nn.utils": hook_clipping,
    "torch.nn.utils.clip_grad": hook_clipping,
    "torch.utils.data.dataloader": hook_dataloader,
    "transformers.modeling_utils": hook_models,
    "transformers.tokenization_utils_base": hook_tokenizers,
    "transformers.trainer": hook_trainer,
    "transformers.training_args": hook_training_arguments,
    "trl.trainer.dpo_trainer": hook_dpo,
    "wandb": hook_trackers,
    "mlflow": hook_trackers,
    "trackio": hook_trackers,
}
"""Module -> what is done to it once it is imported."""


def main() -> None:
    """Run the script under the hooks."""
    out, *rest = sys.argv[1:]
    allows_network = rest[0] == ALLOW_NETWORK
    script, *arguments = rest[1:] if allows_network else rest
    observed = Observed(script=Path(script).resolve(), out=Path(out))
    watch_files(observed)
    if not allows_network:
        forbid_network()
    hide_gpus()
    make_modules_thrifty()
    patch_after_import({name: functools.partial(hook, observed) for name, hook in HOOKS.items()})
    try:
        run_script(str(observed.script), arguments)
    finally:
        observed.clean_up()
