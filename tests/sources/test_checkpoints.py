"""The dtype of a checkpoint, from files that safetensors and transformers wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from autofit.sources.checkpoints import stored_dtype
from autofit.sources.models import resolve_model
from tests.scripts import write_tiny_llama


def test_a_file_says_in_which_dtype_most_of_it_is(tmp_path: Path) -> None:
    """A norm kept in fp32 does not make a bf16 checkpoint an fp32 one, whatever its config says."""
    weights = {"matrix": torch.zeros(64, 64, dtype=torch.bfloat16), "norm": torch.zeros(64)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert stored_dtype({"dtype": "float32"}, tmp_path) == "bfloat16"


@pytest.mark.parametrize("max_shard_size", ["50GB", "20KB"])
def test_a_model_that_transformers_saved_is_read(max_shard_size: str, tmp_path: Path) -> None:
    """In one file or in several beside an index; the config that was saved with it says another dtype."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(write_tiny_llama(tmp_path / "first")).half()
    model.save_pretrained(tmp_path / "second", max_shard_size=max_shard_size)
    config = tmp_path / "second" / "config.json"
    config.write_text(config.read_text().replace("float16", "float32"))
    assert resolve_model(str(tmp_path / "second")).stored_dtype == "float16"


def test_without_a_file_the_config_says_it(tmp_path: Path) -> None:
    """By its newer name or its older one, of a model with several parts in the text's; or nothing does."""
    assert stored_dtype({"dtype": "bfloat16", "torch_dtype": "float32"}, tmp_path) == "bfloat16"
    assert stored_dtype({"torch_dtype": "float16"}) == "float16"
    assert stored_dtype({"text_config": {"torch_dtype": "bfloat16"}}) == "bfloat16"
    assert stored_dtype({"torch_dtype": "auto"}) is None
    assert resolve_model("Qwen/Qwen2.5-0.5B").stored_dtype == "bfloat16"


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, (2).to_bytes(8, "little") + b"[]"])
def test_a_broken_file_says_nothing(content: bytes, tmp_path: Path) -> None:
    """transformers will refuse it; until then the config is believed."""
    (tmp_path / "model.safetensors").write_bytes(content)
    assert stored_dtype({"dtype": "float16"}, tmp_path) == "float16"
