"""Rules about what has to be installed, one for each package; they hold where the machine that will train is known."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct

from autofit.search.rules.rule import Axis, Rule, is_from_bitsandbytes
from autofit.spec.configuration import Configuration

_EVERY_RELEASE = ">=0"


class _Need(Struct, frozen=True, kw_only=True):
    """A package that some configurations cannot run without."""

    library: str
    axes: tuple[Axis, ...]
    source: str
    uses: Callable[[Configuration], bool]


def _is_auto_gptq(configuration: Configuration) -> bool:
    return configuration.quantization is not None and configuration.quantization.kernel == "auto_gptq"


_NEEDS: tuple[_Need, ...] = (
    _Need(
        library="peft",
        axes=("path",),
        source="transformers/integrations/peft.py 5.23, check_peft_version",
        uses=lambda c: c.lora is not None,
    ),
    _Need(
        library="bitsandbytes",
        axes=("path", "optim"),
        source='transformers/quantizers/quantizer_bnb_4bit.py 5.23, "4-bit quantization requires bitsandbytes"; '
        "trainer_optimizer.py, _get_bitsandbytes_optimizer",
        uses=lambda c: (
            (c.quantization is not None and not c.quantization.comes_packed) or is_from_bitsandbytes(c.optim)
        ),
    ),
    _Need(
        library="gptqmodel",
        axes=("path",),
        source='transformers/quantizers/quantizer_gptq.py 5.23, "requires gptqmodel"; quantizer_awq.py',
        uses=lambda c: c.quantization is not None and c.quantization.comes_packed and not _is_auto_gptq(c),
    ),
    _Need(
        library="optimum",
        axes=("path",),
        source='transformers/quantizers/quantizer_gptq.py 5.23, "requires optimum"',
        uses=lambda c: c.quantization is not None and c.quantization.quant_type == "gptq" and not _is_auto_gptq(c),
    ),
    _Need(
        library="deepspeed",
        axes=("engine",),
        source='accelerate/accelerator.py 1.15, "DeepSpeed is not installed"',
        uses=lambda c: c.uses_deepspeed,
    ),
    _Need(
        library="flash-attn",
        axes=("path",),
        source='transformers/modeling_utils.py 5.23, "the package for FlashAttention2 doesn\'t seem to be installed"',
        uses=lambda c: c.attention == "flash_attention_2",
    ),
    _Need(
        library="liger-kernel",
        axes=("path",),
        source='transformers/integrations/liger.py 5.23, "You have set `use_liger_kernel` to `True`"',
        uses=lambda c: c.loss == "liger",
    ),
    _Need(
        library="trl",
        axes=("path",),
        source="trl/trainer/sft_trainer.py 1.16, add_fused_lm_head",
        uses=lambda c: c.loss == "chunked",
    ),
    _Need(
        library="torchao",
        axes=("optim",),
        source='transformers/trainer_optimizer.py 5.23, "You need to have `torchao>=0.4.0`"',
        uses=lambda c: c.optim in {"adamw_torch_8bit", "adamw_torch_4bit"},
    ),
    _Need(
        library="lomo-optim",
        axes=("optim",),
        source='transformers/trainer_optimizer.py 5.23, "You need to install `lomo_optim`"',
        uses=lambda c: c.optim in {"lomo", "adalomo"},
    ),
    _Need(
        library="galore-torch",
        axes=("optim",),
        source='transformers/trainer_optimizer.py 5.23, "You need to install `galore_torch`"',
        uses=lambda c: c.optim.startswith("galore"),
    ),
    _Need(
        library="apollo-torch",
        axes=("optim",),
        source='transformers/trainer_optimizer.py 5.23, "You need to install `apollo_torch`"',
        uses=lambda c: c.optim.startswith("apollo"),
    ),
    _Need(
        library="grokadamw",
        axes=("optim",),
        source='transformers/trainer_optimizer.py 5.23, "Please install grokadamw"',
        uses=lambda c: c.optim == "grokadamw",
    ),
    _Need(
        library="schedulefree",
        axes=("optim",),
        source='transformers/trainer_optimizer.py 5.23, "You need to install `schedulefree`"',
        uses=lambda c: c.optim.startswith("schedule_free"),
    ),
    _Need(
        library="torch-optimi",
        axes=("optim",),
        source='transformers/trainer_optimizer.py 5.23, "You need to install `torch-optimi`"',
        uses=lambda c: c.optim == "stable_adamw",
    ),
)


def _rule(need: _Need) -> Rule:
    return Rule(
        name=f"{need.library}-is-not-installed",
        reason=f"{need.library} is not installed here, and it cannot run without",
        library=need.library,
        releases=_EVERY_RELEASE,
        source=need.source,
        axes=need.axes,
        breaks=lambda c, on: on.software.lacks(need.library) and need.uses(c),
    )


SOFTWARE_RULES: tuple[Rule, ...] = tuple(_rule(need) for need in _NEEDS)
