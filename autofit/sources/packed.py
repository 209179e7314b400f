"""What a config.json says of weights that its checkpoint has packed, as a restriction of what can be planned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from msgspec.structs import replace

from autofit.errors import InputError
from autofit.spec.configuration import Bits
from autofit.spec.job import QuantizationWish, Restrictions

FORMATS = {"gptq": {"gptq", "gptq_v2"}, "awq": {"gemm"}}
"""How packed words lie. Source: gptqmodel 7.7 quantization/config.py, FORMAT; transformers/utils/quantization_config.py
5.23, AwqConfig (`version` is the older name)."""
GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)
"""Source: gptqmodel 7.7 nn_modules/qlinear/torch.py, TorchLinear.SUPPORTS_GROUP_SIZE."""


def with_packed_weights(restrictions: Restrictions, config: Mapping[str, Any]) -> Restrictions:
    """Plan a checkpoint that comes packed as what it is: the base of an adapter.

    Args:
        restrictions: what the user allows.
        config: content of the model's config.json.

    Raises:
        InputError: it is packed in a way that is not known, or the user asks for what cannot be done with it.
    """
    declared = config.get("quantization_config")
    method = declared.get("quant_method") if isinstance(declared, Mapping) else None
    if method not in FORMATS:
        return restrictions
    assert isinstance(declared, Mapping), "it names a method"
    if restrictions.methods and not {"lora", "qlora"} & set(restrictions.methods):
        raise InputError(
            f"the checkpoint is packed with {method.upper()}, and method {', '.join(restrictions.methods)} trains the "
            "weights themselves.",
            to_fix="use --method qlora, an adapter on packed weights, or plan the checkpoint that it was made from",
        )
    wished = restrictions.quantizations[0]
    stated = replace(wished, prepares_kbit=False, kernel=QuantizationWish().kernel)
    if len(restrictions.quantizations) > 1 or (stated != QuantizationWish() and not wished.comes_packed):
        raise InputError(
            f"the checkpoint is packed with {method.upper()}, and another quantisation is asked for.",
            to_fix="leave it out, or plan the checkpoint that it was made from",
        )
    packed = replace(_declared(method, declared), prepares_kbit=wished.prepares_kbit, kernel=wished.kernel)
    return replace(restrictions, methods=("qlora",), quantization=packed)


def refuse_generating(config: Mapping[str, Any]) -> None:
    """Refuse to estimate what generating from a checkpoint that comes packed needs: its kernels pack it anew.

    Raises:
        InputError: the checkpoint comes packed.
    """
    declared = config.get("quantization_config")
    method = declared.get("quant_method") if isinstance(declared, Mapping) else None
    if method in FORMATS:
        raise InputError(
            f"the checkpoint is packed with {method.upper()}, and generating from it is not modelled.",
            to_fix="estimate training an adapter on it, or generating from the checkpoint that it was made from",
        )


def _declared(method: str, declared: Mapping[str, Any]) -> QuantizationWish:
    """Read how a checkpoint was packed. Names are those of GPTQConfig and AwqConfig.

    Source: transformers/utils/quantization_config.py 5.23.
    """
    bits, group_size = declared.get("bits", 4), declared.get("group_size", 128)
    packed_as = str(declared.get("checkpoint_format") or declared.get("format") or declared.get("version") or "")
    if packed_as and packed_as.casefold() not in FORMATS[method]:
        raise _not_known(method, f"in the format {packed_as!r}", f"plan one in the format {min(FORMATS[method])}")
    if bits not in (get_args(Bits) if method == "gptq" else (4,)):
        raise _not_known(method, f"in {bits!r} bits", "plan one of 2, 4 or 8 bits, of AWQ 4")
    if group_size not in GROUP_SIZES:
        raise _not_known(method, f"in groups of {group_size!r}", f"plan one of {', '.join(map(str, GROUP_SIZES))}")
    for name in ("modules_in_block_to_quantize", "modules_to_not_convert", "dynamic"):
        if declared.get(name):
            raise _not_known(method, f"in part ({name})", "plan one whose layers are packed whole")
    if declared.get("lm_head"):
        raise _not_known(method, "with its head (lm_head)", "plan one whose head is not packed")
    return QuantizationWish(bits=bits, quant_type=method, group_size=group_size)  # type: ignore[arg-type]


def _not_known(method: str, how: str, to_fix: str) -> InputError:
    return InputError(
        f"the checkpoint is packed with {method.upper()} {how}, whose layers are not modelled.", to_fix=to_fix
    )
