"""Attention whose processes share each sequence: DeepSpeed's own Ulysses, run with a group that sends nothing.

Each process holds as many tokens of a sequence as of any other's. Around attention, and around it alone, they exchange
what they have: before it tokens for heads, after it heads for tokens.
Source: deepspeed/runtime/sequence_parallel/ulysses_sp.py 0.19.8, UlyssesSPAttentionHF, UlyssesSPDataLoaderAdapter.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from io import StringIO
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from msgspec.structs import replace
from torch import nn

from autofit.errors import InputError
from autofit.profile.fit import Point
from autofit.profile.tasks import task_of
from autofit.profile.windows import Lengths, lengths_to_trace, windows
from autofit.spec.profile import Regime

_GROUP = SimpleNamespace(group_name="autofit")


def shared_batch(batch: Mapping[str, torch.Tensor], regime: Regime) -> dict[str, torch.Tensor]:
    """Give a process's part of a batch what Ulysses' data loader adds: positions, and labels that are shifted already.

    Trainer hands the shifted labels to the model under both names.
    Source: transformers/integrations/deepspeed.py 5.23, deepspeed_sp_compute_loss.
    """
    if regime.sequence_parallel_size == 1:
        return dict(batch)
    return {**batch, "shift_labels": batch["labels"], "position_ids": torch.zeros_like(batch["input_ids"])}


@contextmanager
def ulysses_of(model: Any, regime: Regime, point: Point) -> Iterator[None]:
    """Let attention exchange tokens for heads, if the regime's processes share sequences.

    In place of transformers' function for sdpa, which every model here is built for, whichever kernel it then imitates.
    The mask is dropped, as DeepSpeed does: attention is causal over the whole sequence.
    Source: ulysses_sp.py 0.19.8, register_with_transformers.

    Args:
        model: with or without an adapter.
        regime: what the step does.
        point: sequences of the micro-batch, tokens of each on one process.

    Raises:
        InputError: DeepSpeed is not installed, or the model's heads cannot be shared so.
    """
    if regime.sequence_parallel_size == 1:
        yield
        return
    functions = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    core: Callable[..., Any] = functions["sdpa"]
    with ExitStack() as stack:
        ulysses = _ulysses(stack, core, _text_config(model), regime, point)

        def attend(module: nn.Module, query: Any, key: Any, value: Any, _mask: Any, *args: Any, **kwargs: Any) -> Any:
            return ulysses(module, query, key, value, None, *args, **kwargs)

        stack.callback(functions.__setitem__, "sdpa", core)
        functions["sdpa"] = attend
        try:
            yield
        except AssertionError as error:
            raise InputError(
                f"{type(model).__name__} cannot share sequences: {error}",
                to_fix="leave sequence_parallel_size at 1, or choose another model",
            ) from error


def import_ulysses(regime: Regime) -> tuple[Any, Any]:
    """Import DeepSpeed's attention and its exchange, where the regime has need of them.

    Raises:
        InputError: DeepSpeed is not installed, or too old.
    """
    if regime.sequence_parallel_size == 1:
        return None, None
    try:
        with redirect_stdout(StringIO()):  # DeepSpeed prints while it is imported
            module = importlib.import_module("deepspeed.runtime.sequence_parallel.ulysses_sp")
            return module, importlib.import_module("deepspeed.sequence.layer")
    except ImportError as error:
        raise InputError(
            f"sequence parallelism is traced with DeepSpeed's own code, which cannot be imported here: {error}",
            to_fix="pip install 'deepspeed>=0.18.2', or leave sequence_parallel_size at 1",
        ) from error


def _ulysses(stack: ExitStack, core: Callable[..., Any], config: Any, regime: Regime, point: Point) -> Any:
    module, exchange = import_ulysses(regime)
    for owner in (module, exchange):
        stack.enter_context(_replaced(owner, dist=_comm(regime.sequence_parallel_size)))
    registered = getattr(exchange, "_all_to_all_groups", {})
    stack.callback(registered.pop, _GROUP.group_name, None)
    num_sequences, tokens = point
    try:
        return module.UlyssesSPAttentionHF(
            attn=core,
            batch_size=num_sequences,
            attn_head_count=config.num_attention_heads,
            attn_head_size=getattr(config, "head_dim", config.hidden_size // config.num_attention_heads),
            kv_head_count=config.num_key_value_heads,
            num_hidden_layers=config.num_hidden_layers,
            process_group=_GROUP,
            seq_length_is_variable=True,
            local_seq_length=tokens,
            global_seq_length=tokens * regime.sequence_parallel_size,
        )
    except (ValueError, AttributeError) as error:
        raise InputError(
            f"DeepSpeed cannot share sequences of a {config.model_type!r} by {regime.sequence_parallel_size} "
            f"processes: {error}",
            to_fix=f"choose a sequence_parallel_size that divides its {config.num_attention_heads} heads, or 1",
        ) from error


def _comm(num_processes: int) -> SimpleNamespace:
    """What of deepspeed.comm is called here, for the first of so many processes; nothing is sent."""
    return SimpleNamespace(
        get_world_size=lambda _group=None: num_processes,
        get_rank=lambda _group=None: 0,
        all_gather=lambda *_args, **_kwargs: None,
        ProcessGroup=object,
    )


@contextmanager
def _replaced(owner: Any, **changes: Any) -> Iterator[None]:
    saved = {name: getattr(owner, name) for name in changes}
    for name, new in changes.items():
        setattr(owner, name, new)
    try:
        yield
    finally:
        for name, old in saved.items():
            setattr(owner, name, old)


def shared_lengths(config: Any, regime: Regime, sequence_tokens: int | None) -> Lengths:
    """Choose three lengths of a process's part, and say up to which whole length they hold.

    Refuses models that DeepSpeed would train otherwise than they are meant to be, or whose loss it cannot share.
    Source: accelerate/big_modeling.py 1.15, _refuse_recurrent_layers_under_sequence_parallelism; ulysses_sp.py 0.19.8,
    uattn_wrapper (the mask of a window is dropped with every other).

    Args:
        config: of the whole model.
        regime: what the step does.
        sequence_tokens: of whole sequences; None: not known.

    Raises:
        InputError: it is such a model.
    """
    text = config.get_text_config()
    limits = [] if regime.attention == "flash_attention_2" else windows(text)
    num_processes = regime.sequence_parallel_size
    part = None if sequence_tokens is None else sequence_tokens // num_processes
    lengths = lengths_to_trace(text, part, masks_windows=False)
    planned = sequence_tokens or lengths.traced[-1] * num_processes
    crossed = [limit for limit in limits if limit <= planned]
    if task_of(config, regime.task) != "causal-lm":
        raise _unshareable(config, "only a causal language model's labels can be shifted beforehand")
    if any("linear_attention" in kind for kind in getattr(text, "layer_types", None) or []):
        raise _unshareable(config, "its recurrent layers would begin anew on every process")
    if crossed:
        what = f"sdpa would attend beyond its window of {crossed[0]:,} tokens, as DeepSpeed drops every mask"
        raise _unshareable(config, what, ", or use --attention flash_attention_2")
    return replace(lengths, max_sequence_tokens=min(limits) - 1 if limits else None)


def _unshareable(config: Any, problem: str, other_fix: str = "") -> InputError:
    return InputError(
        f"processes cannot share sequences of a {config.model_type!r}: {problem}.",
        to_fix=f"leave sequence_parallel_size at 1{other_fix}",
    )


def _text_config(model: Any) -> Any:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.config.get_text_config()
