"""Any architecture: layers of several kinds, routed experts, other heads than a causal one, windows of attention."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.utils.quantization_config import BitsAndBytesConfig

from autofit.errors import InputError
from autofit.memory.tape import phase_peaks
from autofit.profile import models
from autofit.profile.kernel_packages import kernel_packages
from autofit.profile.layers import Depth, shallow_depth
from autofit.profile.recorder import Recorder
from autofit.profile.tasks import task_of
from autofit.profile.trace import trace, trace_model
from autofit.profile.windows import lengths_to_trace, windows
from autofit.spec.configuration import Lora, Quantization
from tests.profile.tiny import a_regime, every_layer_traced, highest_alive, real_peak, tool

TOLERANCE = 0.005
SIZE = (5, 384)
"""Was not traced."""
depths = tool("compare_depths")
CONFIGS: dict[str, dict[str, Any]] = {name: each.config for name, each in depths.ARCHITECTURES.items()}
TRACED_LAYERS = {"cohere2": 16, "deepseek_v3": 7, "gemma2": 8, "gemma3_text": 20, "gpt_oss": 8, "qwen3_next": 16}
"""Of models whose layers are of two kinds: those at each end, the first of each kind, and twice what is repeated."""


def regime_for(model_type: str, **changes: Any) -> Any:
    """Full fine-tuning in bf16, with the attention that the type has."""
    return a_regime(attention=depths.ARCHITECTURES[model_type].attention, **changes)


def config_of(model_type: str, **changes: Any) -> dict[str, Any]:
    """Content of a tiny config.json."""
    return {"model_type": model_type, **CONFIGS[model_type], **changes}


def assert_assembled_equals_traced(model_type: str, **changes: Any) -> None:
    """Compare the assembled peak with a trace of every layer at a size that was not traced."""
    regime, config = regime_for(model_type, **changes), config_of(model_type)
    profile = trace(model_type, config, regime)
    (segments,) = every_layer_traced(config, regime, [SIZE])
    assembled = max(peak.kept[0] for peak in phase_peaks(profile, [SIZE[0]], SIZE[1]))
    assert assembled == pytest.approx(highest_alive(segments), rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, {"method": "lora", "lora": Lora()}])
def test_layers_of_two_kinds_repeat_under_checkpointing_and_with_an_adapter(changes):
    """The step's other shapes repeat as well."""
    assert_assembled_equals_traced("gemma2", **changes)


@pytest.mark.parametrize(("model_type", "num_traced"), TRACED_LAYERS.items())
def test_layers_of_two_kinds_are_traced_as_often_as_their_pattern_needs(model_type, num_traced):
    """Fewer layers are traced than the model has, and their pattern is the model's."""
    regime, config = regime_for(model_type), config_of(model_type)
    chosen = models.choose_depth(config, models.load_config(config, None, regime), regime)
    assert chosen is not None
    assert chosen[2].num_traced == num_traced < CONFIGS[model_type]["num_hidden_layers"]


def test_layers_without_a_pattern_are_all_traced():
    """A list of kinds that never repeats has no shallower model that stands for it."""
    kinds = [("s",) if 1 << n & 0b1011000101101 else ("f",) for n in range(13)]
    assert shallow_depth(kinds) is None


def test_the_traced_layers_spell_the_model_out():
    """Each layer of the model is a copy of one of its kind, and both ends stand for themselves."""
    kinds = [("dense",)] * 3 + [("routed",)] * 58
    depth = shallow_depth(kinds)
    assert depth == Depth(num_layers=61, num_traced=8, start=4, period=1)
    order = depth.real_order()
    assert [kinds[layer] for layer in order[:4]] == kinds[:4]
    assert len(order) == 61
    assert order[-2:] == [6, 7]


def test_an_attention_that_a_class_has_not_is_refused_with_the_one_it_has():
    """Transformers ends a run that asks for it; one that asks for none takes eager."""
    with pytest.raises(InputError, match="--attention eager"):
        trace("gemma2", config_of("gemma2"), a_regime())


@pytest.mark.parametrize(
    ("config", "head"),
    [
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "causal-lm"),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, "sequence-classification"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, "masked-lm"),
        ({"model_type": "bert", "architectures": ["BertForSequenceClassification"]}, "sequence-classification"),
        ({"model_type": "t5"}, "seq2seq-lm"),
        ({"model_type": "bart", "architectures": ["BartForConditionalGeneration"]}, "seq2seq-lm"),
        ({"model_type": "gpt2"}, "causal-lm"),
        ({"model_type": "llava"}, "image-text-to-text"),
    ],
)
def test_the_head_is_the_one_that_the_config_names(config, head):
    """Or, where it names none with a head, the one that transformers maps the type to."""
    values = {key: value for key, value in config.items() if key != "model_type"}
    assert task_of(AutoConfig.for_model(config["model_type"], **values), "auto") == head
    assert task_of(AutoConfig.for_model("bert"), "causal-lm") == "causal-lm"


@pytest.mark.slow
def test_a_classifier_of_a_decoder_has_a_class_head_and_no_logits_for_words():
    """Its step has no tensor as large as the logits of a language model."""
    config = {**config_of("granite"), "model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}
    (segments,) = every_layer_traced({**config, "vocab_size": 50_000}, a_regime(), [(2, 256)])
    largest = max(event[0] for segment in segments for event in segment.events if segment.kind == "forward")
    assert largest < 2 * 256 * 50_000 * 2


def test_each_side_of_a_window_is_traced_for_itself():
    """A sequence as long as the window takes the other path, and the profile says for which lengths it holds."""
    config = AutoConfig.for_model("mistral", sliding_window=4096, max_position_embeddings=32768)
    below, above = lengths_to_trace(config, 4095), lengths_to_trace(config, 4096)
    assert (below.min_sequence_tokens, below.max_sequence_tokens) == (1, 4095)
    assert (above.min_sequence_tokens, above.max_sequence_tokens) == (4096, None)
    assert max(below.traced) < 4096 < min(above.traced)
    assert max(above.traced) <= 32768
    narrow = AutoConfig.for_model("gemma3_text", sliding_window=512)
    assert lengths_to_trace(narrow, 511).traced == (128, 256, 384)
    assert lengths_to_trace(narrow, 511).min_sequence_tokens == 1
    assert min(lengths_to_trace(narrow, 512).traced) >= 512


def test_what_counts_layers_is_no_window():
    """Qwen2's `max_window_layers` and Gemma's `sliding_window_pattern` are numbers of layers."""
    for model_type in ("qwen2", "gemma3_text"):
        config = AutoConfig.for_model(model_type)
        assert all(length >= 1024 for length in windows(config)), model_type


def test_a_model_without_windows_is_traced_for_every_length():
    """And within the positions that it has."""
    lengths = lengths_to_trace(AutoConfig.for_model("bert"), None)
    assert (lengths.traced, lengths.max_sequence_tokens) == ((128, 256, 512), None)


@pytest.mark.slow
def test_a_mask_of_a_window_is_in_the_step_that_reaches_it():
    """Sdpa has no mask below the window, and one of s² from it on."""
    config = config_of("cohere2", num_hidden_layers=4)
    short, long = (trace("cohere2", config, a_regime(), sequence_tokens=length) for length in (100, 200))
    assert short.max_sequence_tokens == 127
    assert long.min_sequence_tokens == 128
    grows = [any(size[4] or size[5] for size in profile.sizes) for profile in (short, long)]
    assert grows == [False, True]


def peak_of_a_real_step(favoured: int | None) -> int:
    """Count the bytes that live in a step of a real Mixtral, its tokens routed to two experts or to all of them."""
    torch.manual_seed(0)
    values = {**CONFIGS["mixtral"], "num_hidden_layers": 2}
    config = AutoConfig.for_model("mixtral", **values)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert model.config._experts_implementation == "grouped_mm"
    for name, parameter in model.named_parameters():
        if favoured is not None and name.endswith("gate.weight"):
            parameter.data.zero_()
            parameter.data[favoured:] = -1e3 * torch.ones(parameter.shape[1])
    recorder = Recorder({})
    recorder.ignore([*model.parameters(), *model.buffers()])
    ids = torch.randint(0, 1000, (2, 64))
    with recorder:
        for _ in range(2):
            recorder.restart()
            recorder.mark("embedding", "forward")
            model(input_ids=ids, labels=ids).loss.backward()
            model.zero_grad()
    return highest_alive(recorder.finished())


def test_what_grouped_experts_need_does_not_depend_on_the_routing():
    """A real step has the same peak with its tokens on two experts as on all: even is the worst case."""
    assert peak_of_a_real_step(None) == peak_of_a_real_step(2)


LOOPS_OVER_EXPERTS: dict[str, dict[str, Any]] = {
    "dbrx": {**CONFIGS["dbrx"], "n_layers": 2},
    "jetmoe": {**depths.SMALL, "num_hidden_layers": 2, "kv_channels": 16, "num_local_experts": 4},
}


class EvenChoice(TorchDispatchMode):
    """Lets tokens choose experts in turn, where a router would choose by its weights."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Keep the router's figures, and change which experts they are of."""
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.topk.default:
            out[1].copy_((torch.arange(out[1].numel()) % args[0].shape[-1]).view_as(out[1]))
        return out


@pytest.mark.slow
@pytest.mark.parametrize("model_type", LOOPS_OVER_EXPERTS)
def test_an_even_share_for_each_expert_is_what_a_real_step_needs(model_type):
    """Where a loop reads the routing from values: a real step whose tokens choose all experts equally often."""
    size, config = (3, 200), {"model_type": model_type, **LOOPS_OVER_EXPERTS[model_type]}
    with EvenChoice():
        real = real_peak(config, size)
    regime = a_regime(task="causal-lm")
    traced = trace_model(
        models.build(models.load_config(config, None, regime), regime), regime, [size], lambda *_: None
    )
    assert highest_alive(traced.steps[0]) == real
    assert traced.routes_evenly


def quantised(model: torch.nn.Module) -> set[str]:
    """Names of the layers that are bitsandbytes'."""
    return {name for name, module in model.named_modules() if "4bit" in type(module).__name__}


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_the_layers_of_a_routed_model_that_are_quantised_are_those_that_transformers_quantises(model_type):
    """Linear layers are; experts are three-dimensional parameters, which stay in their dtype."""
    regime = regime_for(model_type, method="qlora", quantization=Quantization())
    config = models.load_config(config_of(model_type), 4, regime)
    model = models.build(config, regime)
    with torch.device("meta"):
        real = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        real.tie_weights()
        settings = BitsAndBytesConfig(load_in_4bit=True)
        real = replace_with_bnb_linear(real, get_keys_to_not_convert(real), settings)
    assert quantised(model) == quantised(real)
    experts = [p for name, p in model.named_parameters() if ".experts." in name and p.dim() == 3]
    assert experts
    assert {parameter.dtype for parameter in experts} == {torch.bfloat16}


def test_all_linear_reaches_the_experts_of_a_mixtral():
    """Peft adapts their fused weights, as many ranks for gate and up as these two had as layers of their own."""
    regime = a_regime(method="lora", lora=Lora(r=4))
    model = models.build(models.load_config(config_of("mixtral"), 2, regime), regime)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if "layers.0.mlp.experts" in name}
    ranks = sorted(shape[0] for name, shape in shapes.items() if "lora_A" in name)
    assert ranks == [4 * 4, 2 * 4 * 4]


def test_a_model_whose_layers_take_kernels_of_a_package_names_it():
    """Where the package is installed, a GPU runs its kernels, and a trace would show torch operators instead."""
    regime = a_regime()
    mamba = models.build_plain(models.load_config({"model_type": "mamba2"}, 2, a_regime(attention="eager")), regime)
    assert {"mamba_ssm", "causal_conv1d"} <= {name.replace("-", "_") for name in kernel_packages(mamba)}
    llama = models.build_plain(models.load_config(config_of("granite"), 2, regime), regime)
    assert kernel_packages(llama) == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "every"), [("causal-lm", 1), ("masked-lm", 4), ("seq2seq-lm", 4), ("sequence-classification", 8)]
)
def test_the_page_says_what_a_walk_finds(head, every):
    """Every causal type, and each so many of the other heads, is traced or refused as docs/architectures.md says.

    Of those that loop over tokens, which take half a minute each, the first is walked.
    """
    walk = tool("walk_architectures")
    page = walk.PAGE.read_text(encoding="utf-8").split(f"### {head}")[1].split("###")[0]
    traced, _, refused = page.partition("| refused | by | why |")
    traced, _, untried = traced.partition("Not tried:")
    looping = re.findall(r"^\| `(.+?)` \| [1-9]", traced, re.MULTILINE)[1:]
    tried = [name for name in walk.registered(head) if f"`{name}`" not in untried and name not in looping]
    assert len(tried) >= 30
    for row in walk.walk(head, tried[::every]):
        assert f"`{row.model_type}`" in (traced if row.traced else refused), row
