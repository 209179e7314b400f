"""What of the user's environment is planned with."""

from __future__ import annotations

import pytest

from autofit.cli import with_allocator_of
from autofit.errors import InputError
from tests.search.worlds import a_job


def test_the_allocators_options_of_the_environment_are_planned_with_and_named():
    """A value that the user has set is taken, and stands among what was found."""
    job = with_allocator_of({"PYTORCH_ALLOC_CONF": "expandable_segments:True,max_split_size_mb:128"}, a_job())
    assert job.restrictions.expandable_segments
    assert job.restrictions.max_split_size_mb == 128
    assert "PYTORCH_ALLOC_CONF" in job.found["allocator"]


def test_an_environment_that_sets_nothing_changes_nothing():
    """Without the variables the job is the one that was asked for."""
    assert with_allocator_of({"PATH": "/bin"}, a_job()) == a_job()


def test_an_option_that_is_not_modelled_is_refused():
    """What would change the figures in a way that is not known is no silence."""
    with pytest.raises(InputError, match="roundup_power2_divisions"):
        with_allocator_of({"PYTORCH_CUDA_ALLOC_CONF": "roundup_power2_divisions:4"}, a_job())
