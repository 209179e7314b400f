"""Which head of a model is trained: asked of the mappings that transformers itself keeps."""

from __future__ import annotations

from typing import Any, Literal

import transformers
from transformers.models.auto import modeling_auto

from autofit.errors import InputError
from autofit.spec.configuration import Task

Head = Literal["causal-lm", "masked-lm", "seq2seq-lm", "sequence-classification", "image-text-to-text"]
_AUTO: dict[Head, tuple[tuple[str, ...], str]] = {
    "image-text-to-text": (
        ("AutoModelForImageTextToText", "AutoModelForVision2Seq"),
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    ),
    "seq2seq-lm": (("AutoModelForSeq2SeqLM",), "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    "masked-lm": (("AutoModelForMaskedLM",), "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    "causal-lm": (("AutoModelForCausalLM",), "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "sequence-classification": (
        ("AutoModelForSequenceClassification",),
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    ),
}
"""Head -> the names of its auto class, of which releases have one, and of its mapping."""
MAPPINGS: dict[Head, str] = {head: mapping for head, (_, mapping) in _AUTO.items()}
"""Head -> the name of the mapping from model types to classes, in transformers' modeling_auto."""


def auto_class(head: Head) -> Any:
    """Return transformers' auto class for a head.

    Raises:
        InputError: the installed release has none.
    """
    names, _ = _AUTO[head]
    found = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
    if found is None:
        raise InputError(
            f"transformers {transformers.__version__} has no {names[0]}",
            to_fix="install a later release of transformers",
        )
    return found


def mapped_class(head: Head, model_type: str) -> str | None:
    """Return the class that transformers maps a model type to for a head; of several, the first."""
    mapped = getattr(modeling_auto, _AUTO[head][1], {}).get(model_type)
    return mapped[0] if isinstance(mapped, (list, tuple)) else mapped


def task_of(config: Any, task: Task) -> Head:
    """Return the head that is trained: the one asked for, or that the config's `architectures` names.

    Where it names none with a head (a bare encoder), the one that transformers maps the type to: an encoder-decoder's
    sequence to sequence, a vision-language model's text, an encoder's masked language, else causal language.
    """
    if task != "auto":
        return task
    named = [name for name in getattr(config, "architectures", None) or [] if isinstance(name, str)]
    possible = [head for head in _AUTO if mapped_class(head, config.model_type)]
    for head in ("causal-lm", *possible):
        if mapped_class(head, config.model_type) in named:  # type: ignore[arg-type]
            return head  # type: ignore[return-value]
    if not getattr(config, "is_encoder_decoder", False) and "seq2seq-lm" in possible:
        possible.remove("seq2seq-lm")
    return possible[0] if possible else "causal-lm"
