"""Models of which transformers loads some modules in fp32 where all else is loaded in 16 bits, by `model_type`.

Source: transformers 5.23, modeling_utils.py, `_get_dtype_plan`, and each class's `_keep_in_fp32_modules`. Left out are
classes that name `e_score_correction_bias` alone: one element for each expert, not worth a code path of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from autofit.spec.configuration import Dtype

IN_FP16 = frozenset(
    {
        "afmoe",
        "axk2",
        "blip-2",
        "blip_2_qformer",
        "blip_2_vision_model",
        "deepseek_v32",
        "deepseek_v4",
        "glm_moe_dsa",
        "gpt_oss",
        "instructblip",
        "instructblip_qformer",
        "instructblip_vision_model",
        "instructblipvideo",
        "instructblipvideo_qformer",
        "instructblipvideo_vision_model",
        "longcat_flash",
        "mistral_large4",
        "mistral_large4_text",
        "mt5",
        "pop2piano",
        "rwkv",
        "t5",
        "udop",
        "umt5",
    }
)
"""`_keep_in_fp32_modules`: what fp16 is too narrow for."""
IN_16_BITS = frozenset(
    {
        "bailing_hybrid",
        "beam",
        "deepseek_v4",
        "ernie4_5_moe",
        "ernie4_5_vl_moe",
        "ernie4_5_vl_moe_text",
        "ernie4_5_vl_moe_vision",
        "esmfold2",
        "flint",
        "glm5_next",
        "glm5_next_text",
        "glm5_next_vision",
        "gradium_phonon_tts",
        "granite_speech5_ctc",
        "granite_speech5_encoder",
        "hy_v4",
        "inkling2",
        "inkling2_text",
        "inkling2_vision",
        "inkling_audio",
        "inkling_mm_model",
        "inkling_text",
        "inkling_vision",
        "kyutai_speech_to_text",
        "mistral_large4",
        "mistral_large4_text",
        "muse_spark",
        "muse_spark_audio",
        "muse_spark_text",
        "muse_spark_vision",
        "nemo_speechlm",
        "nemotron3_5_transcribe_asr_audio",
        "nemotron3_5_transcribe_audio",
        "nemotron3_5_transcribe_word_timestamp",
        "openai_privacy_filter",
        "pocket_tts",
        "slanext",
        "slanext_vision",
        "voxtral",
        "voxtral_encoder",
    }
)
"""`_keep_in_fp32_modules_strict`: routers, sinks, convolutions, and what is mixed into residual streams."""


def dtypes_with_fp32_modules(config: Mapping[str, Any]) -> frozenset[Dtype]:
    """Return the dtypes that a model may be loaded in with some of its modules in fp32.

    Args:
        config: content of config.json; a part of it may be of a type of its own.
    """
    types = set(_model_types(config))
    dtypes: list[Dtype] = []
    if types & IN_16_BITS:
        dtypes += ["bfloat16", "float16"]
    elif types & IN_FP16:
        dtypes += ["float16"]
    return frozenset(dtypes)


def _model_types(config: Mapping[str, Any]) -> Iterator[str]:
    if isinstance(config.get("model_type"), str):
        yield config["model_type"]
    for part in config.values():
        if isinstance(part, Mapping):
            yield from _model_types(part)
