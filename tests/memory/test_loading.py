"""What loading leaves behind, held to what was measured after it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from autofit.memory.allocator import CachingAllocator
from autofit.memory.loading import merged_bytes, read_bytes, write_loading
from autofit.memory.program import Program
from autofit.profile.trace import trace
from autofit.units import GIB, MIB
from tests.plans import shipped_profiles
from tests.profile.tiny import a_regime


@pytest.mark.parametrize(
    ("model", "measured_mib"), [("bigcode/gpt_bigcode-santacoder", 28.3), ("mistralai/Mistral-7B-v0.1", 0.1)]
)
def test_blocks_that_loading_leaves_too_large_stay_so(model, measured_mib):
    """torch counts a block whole, and splits none of which 1 MiB or less would be left.

    Under transformers 4.48 on an A100, SantaCoder in four bits held 808,442,368 bytes between steps and Mistral-7B
    4,306,496,512 (fms-acceleration, refs/a100_80gb.csv): so much more than tensors, workspaces and inputs have.
    """
    profile = next(p for p in shipped_profiles(model) if (p.regime.method, p.regime.device) == ("qlora", "cuda"))
    nested = replace(profile, versions={**profile.versions, "transformers": "4.48.1", "peft": "0.13.2"})
    program = Program()
    write_loading(program, nested, 80 * GIB)
    events = program.written()
    allocator = CachingAllocator()
    allocator.run(events.codes.tolist())
    assert events.kept_left_over_bytes(allocator.left_over_bytes) / MIB == pytest.approx(measured_mib, abs=0.2)


LOADED = """
import sys, threading
import torch
from transformers import AutoConfig, AutoModelForCausalLM, core_model_loading

def own_bytes():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

core_model_loading.GLOBAL_WORKERS = 4  # as on any machine with as many cores
with torch.device("meta"):
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(sys.argv[1]))  # imports what it needs
before, highest, done = own_bytes(), 0, threading.Event()

def watch():
    global highest
    while not done.wait(0.001):
        highest = max(highest, own_bytes())

watcher = threading.Thread(target=watch)
watcher.start()
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
done.set()
watcher.join()
print(highest - before)
"""
"""The most memory of its own, without a file's pages, that a process has while it loads a model."""
WIDE = {"hidden_size": 2048, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 1}
LARGE_TABLES = {"model_type": "llama", **WIDE, "intermediate_size": 64, "vocab_size": 8000}
FEW_EXPERTS = {"model_type": "mixtral", **WIDE, "intermediate_size": 4608, "vocab_size": 64, "num_local_experts": 2}


def own_bytes_while_loading(config: dict[str, Any], stored: str, loaded: str, folder: Path) -> int:
    """Save a model, and load it in a process of its own."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {key: value for key, value in config.items() if key != "model_type"}
    made = AutoConfig.for_model(config["model_type"], **values)
    AutoModelForCausalLM.from_config(made, dtype=getattr(torch, stored)).save_pretrained(folder)
    child = subprocess.run(
        [sys.executable, "-c", LOADED, str(folder), loaded], capture_output=True, text=True, check=True
    )
    return int(child.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize(
    ("config", "stored", "loaded"), [(LARGE_TABLES, "float32", "bfloat16"), (FEW_EXPERTS, "bfloat16", "float32")]
)
def test_four_threads_that_read_a_checkpoint_take_no_more_than_is_counted(config, stored, loaded, tmp_path):
    """What they read from are a file's pages, and no memory of the process; experts that are merged are there twice.

    Each of the experts' matrices is larger than what malloc keeps when it is freed, so that nothing stays of them.
    """
    profile = trace("wide", config, a_regime(weights_dtype=loaded))
    width = {"float32": 4, "bfloat16": 2}
    counted = read_bytes(profile, width[stored], width[loaded])
    measured = own_bytes_while_loading(config, stored, loaded, tmp_path)
    weights = profile.num_elements() * width[loaded]
    noise = 8 * MIB
    merged = merged_bytes(profile, width[loaded])
    assert measured < counted + noise
    assert measured > weights + merged / 2 - noise
    assert merged < measured if config is FEW_EXPERTS else not merged
