"""The allocator's environment variables, held to torch's own parser."""

from __future__ import annotations

import pytest
import torch

from autofit.errors import InputError
from autofit.memory.alloc_conf import (
    alloc_conf,
    alloc_conf_variables,
    expandable_segments_problem,
    refuse_other_setting,
    refuse_small_split_size,
    user_setting,
)
from tests.plans import A100, CPU_RANK, a_configuration

PLANNED = a_configuration(expandable_segments=True, max_split_size_mb=128)


def parse(text: str) -> None:
    """Let torch parse allocator options."""
    torch._C._accelerator_setAllocatorSettings(text)


@pytest.fixture(autouse=True)
def _restores_torchs_settings():
    yield
    parse("expandable_segments:False")


@pytest.mark.parametrize(
    "knobs", [{"expandable_segments": True}, {"max_split_size_mb": 20}, {"max_split_size_mb": 512}]
)
def test_torch_accepts_what_is_written(knobs):
    """torch's parser takes the text, and reading it back gives the configuration's own values."""
    configuration = a_configuration(**knobs)
    parse(alloc_conf(configuration))
    assert user_setting(alloc_conf_variables(configuration)).agrees_with(configuration)


def test_defaults_write_nothing():
    """A plan with torch's own policy leaves the user's environment as it is."""
    assert alloc_conf_variables(a_configuration()) == {}
    refuse_other_setting(a_configuration(), {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"})


def test_both_names_are_written():
    """torch before 2.9 knows one of the names, and of two that differ releases prefer different ones."""
    assert set(alloc_conf_variables(PLANNED)) == {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
    assert len(set(alloc_conf_variables(PLANNED).values())) == 1


@pytest.mark.parametrize("megabytes", [1, 19])
def test_what_torch_refuses_is_refused_before_the_start(megabytes):
    """torch takes no max_split_size_mb below 20."""
    with pytest.raises((RuntimeError, ValueError)):
        parse(f"max_split_size_mb:{megabytes}")
    with pytest.raises(InputError):
        refuse_small_split_size(megabytes)


def test_a_plan_does_not_run_under_other_options():
    """A plan that fits only with expandable segments is not started where the user has turned them off."""
    with pytest.raises(InputError, match="expandable_segments:False"):
        refuse_other_setting(PLANNED, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"})
    refuse_other_setting(PLANNED, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:128, expandable_segments:True"})


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTORCH_ALLOC_CONF": "roundup_power2_divisions:[256:1,>:4]"},
        {"PYTORCH_ALLOC_CONF": "per_process_memory_fraction:0.5"},
        {"PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"},
        {"PYTORCH_ALLOC_CONF": "expandable_segments:yes"},
        {"PYTORCH_ALLOC_CONF": "expandable_segments"},
        {"PYTORCH_ALLOC_CONF": "max_split_size_mb:much"},
        {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"},
    ],
)
def test_what_is_not_modelled_is_refused(environment):
    """An option that changes what is reserved, or two that contradict each other, is never passed over."""
    with pytest.raises(InputError, match="PYTORCH_ALLOC_CONF"):
        user_setting(environment)


def test_options_about_other_things_are_let_through():
    """Host memory and locks have nothing to do with what the device reserves."""
    found = user_setting({"PYTORCH_ALLOC_CONF": "pinned_use_background_threads:True,garbage_collection_threshold:0.8"})
    assert not found.expandable_segments
    assert user_setting({}) is None


def test_segments_that_grow_need_cuda_on_linux():
    """A CPU rank has no allocator, Windows no support, and WSL a driver that may refuse."""
    assert expandable_segments_problem(A100) is None
    assert "Linux" in expandable_segments_problem(A100, is_linux=False)
    assert "WSL" in expandable_segments_problem(A100, is_wsl=True)
    assert "no caching allocator" in expandable_segments_problem(CPU_RANK)
