"""Vision-language models with images, against real models on the CPU whose living storages are counted."""

from __future__ import annotations

import functools
import gc
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForImageTextToText

from autofit.errors import InputError
from autofit.memory.assemble import estimate_memory
from autofit.memory.static import rounded
from autofit.memory.tape import phase_peaks
from autofit.memory.uncertainty import interval, run_kind
from autofit.profile.images import image_token_id
from autofit.profile.known import KnownValues, is_known
from autofit.profile.models import build, load_config
from autofit.profile.recorder import RawSegment, join_known_temporaries
from autofit.profile.trace import trace
from autofit.runtime.live_bytes import LiveBytes
from autofit.sources.models import resolve_model
from autofit.spec.configuration import Lora, Quantization
from autofit.spec.estimate import MemoryEstimate
from autofit.spec.hardware import Cluster, Device
from autofit.spec.job import Workload
from autofit.spec.profile import ACTIVATION, RegimeProfile
from tests.plans import A100, CPU_RANK, a_configuration
from tests.profile.tiny import CONFIGS, a_regime

BATCH, TOKENS = 4, 200
"""Neither was traced."""
NUM_STEPS = 2
_TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
}
QWEN: dict[str, Any] = {
    "model_type": "qwen2_5_vl",
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "text_config": {**_TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}},
    "vision_config": {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "out_hidden_size": 128,
        "fullatt_block_indexes": [1],
        "window_size": 112,
    },
    "image_token_id": 900,
    "video_token_id": 901,
    "vision_start_token_id": 902,
    "vision_end_token_id": 903,
}
LLAVA: dict[str, Any] = {
    "model_type": "llava",
    "architectures": ["LlavaForConditionalGeneration"],
    "image_token_index": 900,
    "text_config": {"model_type": "llama", **_TEXT, "num_hidden_layers": 7},
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 112,
        "patch_size": 14,
    },
}
MODELS = {"qwen": QWEN, "llava": LLAVA}
LLAVA_IMAGE_TOKENS = 64
"""(112 / 14)²."""
GRIDS = {64: (16, 16), 63: (14, 18)}
"""Patches of the image that becomes so many of Qwen's tokens: nearest to a square, 2 x 2 patches a token."""


def real_batch(name: str, image_tokens: int) -> dict[str, torch.Tensor]:
    """Make what a processor and a collator would: the labels of images do not count."""
    ids = torch.randint(0, 8, (BATCH, TOKENS))
    ids[:, 1 : 1 + image_tokens] = 900
    labels = ids.masked_fill(ids == 900, -100)
    if name == "llava":
        return {
            "input_ids": ids,
            "labels": labels,
            "pixel_values": torch.randn(BATCH * image_tokens // 64, 3, 112, 112),
        }
    rows, columns = GRIDS[image_tokens]
    return {
        "input_ids": ids,
        "labels": labels,
        "mm_token_type_ids": (ids == 900).long(),
        "pixel_values": torch.randn(BATCH * rows * columns, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, rows, columns]] * BATCH),
    }


def real_model(name: str, attention: str, *, lora: bool, checkpoints: bool) -> Any:
    """Build a model with weights, ready to train."""
    values = {key: value for key, value in MODELS[name].items() if key != "model_type"}
    config = AutoConfig.for_model(MODELS[name]["model_type"], **values)
    config.use_cache = config.text_config.use_cache = False
    config._attn_implementation = attention
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).train()
    if checkpoints:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
        if checkpoints:
            model.enable_input_require_grads()
    return model


def measured(model: Any, name: str, image_tokens: int) -> int:
    """Return the most bytes alive above the model's own in a second step, its batch included."""
    counter, peak = LiveBytes(), 0
    with counter:
        for tensor in [*model.parameters(), *model.buffers()]:
            counter.add(tensor)
        for _ in range(NUM_STEPS):
            gc.collect()
            before = counter.now_bytes
            batch = real_batch(name, image_tokens)
            counter.reset_peak()
            loss = model(**batch)["loss"]
            loss.backward()
            del loss, batch
            peak = counter.peak_bytes - before
            for parameter in model.parameters():
                parameter.grad = None
    return peak


@functools.cache
def traced(name: str, **regime: Any) -> RegimeProfile:
    """Trace a tiny model on a CPU rank in bf16."""
    return trace(name, {**MODELS, **CONFIGS}[name], a_regime(**regime), sequence_tokens=TOKENS)


def predicted(profile: RegimeProfile) -> int:
    """Return the highest phase at the measured size."""
    return int(max(peak.kept[0] for peak in phase_peaks(profile, [BATCH], TOKENS)))


SHIFTED_LABELS = 8 * BATCH
"""transformers pads a label to each sequence where it shifts them; the trace's are of whole sequences."""


@pytest.mark.slow
@pytest.mark.parametrize("checkpoints", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["qwen", "llava"])
def test_a_real_step_with_images(name, lora, checkpoints):
    """Tower, projector and language model: the peak of a real step, frozen or trained, is predicted to a few bytes."""
    method = {"method": "lora", "lora": Lora()} if lora else {}
    profile = traced(name, image_tokens=64, gradient_checkpointing=checkpoints, **method)
    real = measured(real_model(name, "sdpa", lora=lora, checkpoints=checkpoints), name, 64)
    assert predicted(profile) == pytest.approx(real, abs=SHIFTED_LABELS)


@pytest.mark.slow
def test_windows_that_an_image_does_not_fill():
    """63 tokens are 7 x 9: windows of 4 x 4 tokens are cut at its edges, and each length is attended to by itself."""
    real = measured(real_model("qwen", "sdpa", lora=False, checkpoints=False), "qwen", 63)
    assert predicted(traced("qwen", image_tokens=63)) == pytest.approx(real, abs=SHIFTED_LABELS)


@pytest.mark.slow
def test_several_images_in_a_sequence():
    """Twice LLaVA's tokens are two images of its resolution, each with all its patches."""
    real = measured(real_model("llava", "sdpa", lora=False, checkpoints=False), "llava", 128)
    assert predicted(traced("llava", image_tokens=128)) == real
    assert traced("llava", image_tokens=128).input_bytes[1] == 2 * 3 * 112 * 112 * 4


@pytest.mark.slow
def test_eager_attention_of_several_images():
    """What a step needs of one image's scores at a time is counted of all images: a bound, where a tower decides."""
    real = measured(real_model("qwen", "eager", lora=False, checkpoints=True), "qwen", 64)
    profile = traced("qwen", image_tokens=64, attention="eager", gradient_checkpointing=True)
    assert 1 <= predicted(profile) / real < 1.2


def test_a_tower_is_no_layer_of_the_tape():
    """The tape is cut at the language model's layers, six of which stand for all; the tower is in the embedding."""
    profile = traced("llava", image_tokens=64)
    assert (profile.num_layers, profile.num_traced_layers) == (7, 6)
    assert {segment.layer for segment in profile.segments} == {None, *range(6)}
    assert sum(segment.matmul_flops[1] for segment in profile.segments if segment.name == "embedding") > 0
    assert (
        profile.attends_causally
    )  # the language model does, which grows with the square of a sequence; a tower does not


def test_lengths_hold_the_images():
    """A profile is for sequences that hold its image tokens, and shorter ones are refused."""
    profile = traced("llava", image_tokens=64)
    assert profile.holds_for(64)
    assert not profile.holds_for(63)
    with pytest.raises(InputError, match="63 tokens cannot hold 64 image tokens"):
        trace("llava", LLAVA, a_regime(image_tokens=64), sequence_tokens=63)


@pytest.mark.parametrize(
    ("name", "regime", "message", "to_fix"),
    [
        ("llama", {"image_tokens": 64}, "LlamaForCausalLM takes no images", "vision-language model"),
        ("llava", {"image_tokens": 100}, "becomes 64 tokens, and image_tokens is 100", "64, 128"),
        ("qwen", {"image_tokens": 211}, "no image .* becomes 211 tokens", "210 and 212"),
        ("llava", {"image_tokens": 64, "batching": "packed"}, "packed batches hold no images", "padded"),
    ],
)
def test_numbers_that_no_image_becomes_are_refused(name, regime, message, to_fix):
    """What was given, and which numbers can be: a whole number of images, or rows and columns of patches."""
    with pytest.raises(InputError, match=message) as refusal:
        trace(name, {**MODELS, **CONFIGS}[name], a_regime(**regime))
    assert to_fix in str(refusal.value.to_fix)


def test_a_text_trace_of_a_vision_language_model_is_as_before():
    """Without image tokens the tower does not run: its parameters are there, and no gradient of theirs."""
    profile = traced("llava")
    assert profile.input_bytes is None
    assert any(tensor.name.startswith("model.vision_tower") for tensor in profile.tensors)
    assert predicted(profile) < predicted(traced("llava", image_tokens=64))


def quantized_names(model: torch.nn.Module) -> set[str]:
    """Names of a model's packed layers."""
    return {name for name, module in model.named_modules() if type(module).__name__.endswith("Linear4bit")}


@pytest.mark.parametrize("name", ["qwen", "llava"])
def test_quantisation_reaches_the_tower_as_bitsandbytes_does(name):
    """The layers that are packed are those that transformers itself replaces: the tower's and the projector's too."""
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    regime = a_regime(method="qlora", quantization=Quantization(), lora=None)
    ours = quantized_names(build(load_config(MODELS[name], None, regime), regime))
    with torch.device("meta"):
        plain = build(load_config(MODELS[name], None, a_regime()), a_regime())
        left_out = get_keys_to_not_convert(plain)
        theirs = replace_with_bnb_linear(plain, left_out, BitsAndBytesConfig(load_in_4bit=True))
    assert ours == quantized_names(theirs)
    assert any("vis" in layer for layer in ours)


def test_what_integers_say_is_known():
    """What is computed of integers alone has values; what touches a weight has none."""
    known = KnownValues()
    with FakeTensorMode(allow_non_fake_inputs=True), known:
        weight = torch.empty(8, 4)
        ids = torch.zeros(2, 3, dtype=torch.int64)
        ids[:, 1] = 5
        mask = ids == 5
        assert int(mask.sum()) == 2
        assert ids.tolist() == [[0, 5, 0], [0, 5, 0]]
        assert not is_known(weight[ids])
        assert weight[ids][mask].shape == (2, 4)
        with known.making(known=False):
            assert not is_known(torch.arange(3))
        with pytest.raises(InputError, match="over integers"):
            ids.copy_(torch.empty(2, 3).long())


def test_large_integers_are_not_computed():
    """A tensor of more than 128 MiB is fake, whatever it is made of."""
    with FakeTensorMode(allow_non_fake_inputs=True), KnownValues():
        row = torch.arange(8192)
        assert is_known(row)
        assert not is_known(row[:, None] * row)


def test_integers_made_in_loops_are_one():
    """Three temporaries of 8 bytes, two alive at once, become one of 16; what outlives the segment stays."""
    first = RawSegment("embedding", "forward", None)
    first.events = [(8, 0), (8, 0), (100, 0), (8, 0, 0, 0), (8, 0), (8, 0, 0, 1), (8, 0, 0, 3), (24, 0)]
    first.known = {0, 1, 3, 4}
    second = RawSegment("end", "backward", None, events=[(100, 0, 0, 2), (24, 0, 0, 4)])
    join_known_temporaries([first, second])
    assert first.events == [(16, ACTIVATION), (100, 0), (24, 0), (16, ACTIVATION, 0, 0)]
    assert second.events == [(100, 0, 0, 1), (24, 0, 0, 2)]


IMAGE_BYTES = 3 * 112 * 112 * 4


def step_estimate(device: Device, *, accumulation: int) -> MemoryEstimate:
    """Estimate a step of LLaVA with one image in each of two sequences."""
    profile = traced("llava", image_tokens=64, device=device.kind)
    configuration = a_configuration(
        method="full",
        sharding="none",
        num_processes=1,
        weights_dtype="bfloat16",
        mixed_precision="no",
        image_tokens=64,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
    )
    workload = Workload(sequence_tokens=TOKENS, global_batch_sequences=2 * accumulation)
    cluster = Cluster(device=device, num_devices_per_node=1)
    return estimate_memory(profile, configuration, cluster, workload, replays=True)


@pytest.mark.slow
def test_images_of_all_micro_steps_wait_on_the_device():
    """Trainer moves the batches of a step to the device at once; a CPU rank also holds the one that comes next.

    Source: transformers/trainer.py 5.23, get_batch_samples; accelerate/data_loader.py 1.15, DataLoaderShard.__iter__.
    """
    inputs = 2 * (IMAGE_BYTES + 2 * 8 * TOKENS)
    one, many = (step_estimate(A100, accumulation=steps) for steps in (1, 1001))
    assert "batch" not in one.phases[0].terms
    assert {phase.terms["batch"] for phase in many.phases} == {1000 * inputs}
    assert many.peak_reserved_bytes - one.peak_reserved_bytes >= 1000 * inputs
    assert step_estimate(CPU_RANK, accumulation=1).phases[0].terms["batch"] == inputs


def test_no_interval_is_claimed_of_images():
    """No measured run with images was published: of any figure the widest interval of all kinds is taken."""
    text, images = (run_kind(a_regime(device="cuda", image_tokens=n), is_sharded=False) for n in (0, 64))
    assert interval("peak_allocated", text).is_of_kind
    assert not interval("peak_allocated", images).is_of_kind
    assert interval("peak_allocated", images).high >= interval("peak_allocated", text).high


def test_weights_on_a_gpu_are_as_measured():
    """Qwen2.5-VL-7B in bf16 on an L4: torch allocated 16,584,369,664 bytes, and blocks of 512 make a millionth less.

    Source: "Qwen2.5-VL 7B Cloud Run GPU Model Load Proof Result" (public repository, 2026-06-27; torch 2.8,
    transformers 4.57.1), CUDA memory allocated after load.
    """
    regime = a_regime(device="cuda")
    model = build(load_config(resolve_model("Qwen/Qwen2.5-VL-7B-Instruct").config, None, regime), regime)
    counted = [tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()]]
    assert sum(rounded(size, "cuda") for size in counted) == pytest.approx(16_584_369_664, rel=1e-6)


def test_an_image_token_is_named_in_two_ways():
    """Configs call it image_token_id or image_token_index; a text model has none."""
    ids = [image_token_id(load_config(config, None, a_regime())) for config in (QWEN, LLAVA, CONFIGS["llama"])]
    assert ids == [900, 900, None]
