"""Context, workspaces and communicators, held to what was published for single runs."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from autofit.memory.overheads import _figures, context_bytes, workspace_sizes
from autofit.units import GIB, KIB, MIB
from tests.plans import A100, CPU_RANK

T4 = replace(A100, name="T4-16G", compute_capability=(7, 5))


def test_a_t4s_context_is_what_was_measured():
    """140.875 MiB beside what torch reserved, in every run of three sessions (fitcheck-llm 0.3.1, cuda_context_mib)."""
    assert context_bytes(T4, 1) == 140.875 * MIB


@pytest.mark.parametrize(
    ("nvidia_smi_gib", "reserved_gib"), [(75.445, 73.7324), (28.883, 27.2246), (42.219, 40.5605), (44.971, 43.3809)]
)
def test_an_a100s_context_is_not_underestimated(nvidia_smi_gib, reserved_gib):
    """nvidia-smi's figure for four runs of Mistral-7B lies at most 0.15 GiB below reserved and context, and not above.

    Source: foundation-model-stack/fms-acceleration, a100_80gb.csv (fms-009, -017, -019, -031); reserved as replayed.
    """
    process = reserved_gib + context_bytes(A100, 1) / GIB
    assert nvidia_smi_gib - 0.01 <= process <= nvidia_smi_gib + 0.15


def test_every_figure_says_where_it_is_from():
    """No figure without what was measured and who published it; contexts in ascending order of generation."""
    figures = _figures()
    assert all(each["what"] and each["source"] for kind in figures.values() for each in kind)
    begins = [each["from_compute_capability"] for each in figures["contexts"]]
    assert begins == sorted(begins)
    assert begins[0] == [0, 0]


def test_communicators_add_up():
    """One device has none; three groups take three times what one takes."""
    alone, one, three = (context_bytes(A100, n, num_communicators=m) for n, m in ((1, 3), (2, 1), (2, 3)))
    assert alone < one
    assert three - alone == 3 * (one - alone)
    assert one - alone >= 1.45 * GIB


def test_an_unknown_generation_is_taken_for_a_recent_one():
    """A device without a known compute capability, and one newer than all that were measured, count as an A100."""
    for capability in (None, (9, 0), (12, 0)):
        assert context_bytes(replace(A100, compute_capability=capability), 1) == context_bytes(A100, 1)
    assert context_bytes(CPU_RANK, 2) is None


@pytest.mark.parametrize(
    ("capability", "size"), [((8, 6), 8 * MIB + 128 * KIB), ((9, 0), 32 * MIB), ((12, 0), 32 * MIB)]
)
def test_hopper_and_blackwell_have_larger_workspaces(capability, size):
    """4096 KiB x 2 + 16 KiB x 8, from Hopper on 4096 KiB x 8 (CublasHandlePool.cpp); a CPU rank has none."""
    assert workspace_sizes(replace(A100, compute_capability=capability)) == (size, size)
    assert workspace_sizes(CPU_RANK) == ()
