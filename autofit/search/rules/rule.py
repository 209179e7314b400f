"""What a rule is: a combination that a library refuses or breaks, for some of its releases."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import zip_longest
from typing import Any, Literal

from msgspec import Struct, field

from autofit.spec.configuration import Configuration
from autofit.spec.hardware import Cluster, Device
from autofit.spec.job import Restrictions
from autofit.spec.software import Software

Axis = Literal["path", "engine", "optim", "split"]
"""The four independent choices that a configuration is made of; see autofit.search.space.

`path`: method, adapter, quantisation, precision, checkpointing, attention, loss; `engine`: sharding, offload, replicas,
processes; `optim`; `split`: of how the batch is split only whether a step accumulates. The dtype that weights are
loaded in, the dtype that packed ones are stored in and the kind of checkpoint follow from path and engine.
"""


class Site(Struct, frozen=True, kw_only=True):
    """What a configuration would run on, and with which model."""

    cluster: Cluster
    config: Mapping[str, Any] = field(default_factory=dict)
    """Content of the model's config.json."""

    @property
    def software(self) -> Software:
        """What is installed there."""
        return self.cluster.software

    @property
    def device(self) -> Device:
        """Each of the cluster's devices."""
        return self.cluster.device

    @property
    def is_cpu(self) -> bool:
        """Whether ranks run on the CPU."""
        return self.device.kind == "cpu"

    def is_before(self, compute_capability: tuple[int, int]) -> bool:
        """Tell a GPU that is known to be older."""
        found = self.device.compute_capability
        return found is not None and found < compute_capability


_CURRENT = "999999"
"""A release that is not known, and taken to come after every bound."""


class Rule(Struct, frozen=True, kw_only=True):
    """A named reason for which configurations are left out."""

    name: str
    reason: str
    """What happens otherwise, as the end of a sentence that begins with "because"."""
    library: str
    """Name of its distribution."""
    releases: str
    """Releases of the library that the rule holds for, as pip writes them."""
    source: str
    """The thread, or the line of source with its release."""
    axes: tuple[Axis, ...]
    """The choices that `breaks` looks at: configurations that differ in others alone fare the same."""
    breaks: Callable[[Configuration, Site], bool]
    """Whether a configuration is one of those, where the releases are."""
    waived_by: Callable[[Restrictions], bool] | None = None
    """Of what works, but is not chosen unasked: whether the user asked for it. None: it does not work."""
    for_plans_only: bool = False
    """Whether it keeps from planning alone: a run that was set up by hand, or saves nothing, may do it."""

    def holds_for(self, software: Software) -> bool:
        """Tell whether the releases are those that are installed; a library that was not found counts as current."""
        return is_in(software.versions.get(self.library, _CURRENT), self.releases)

    def described(self, software: Software) -> DescribedRule:
        """Say what the rule is, and whether it holds for what is installed."""
        return DescribedRule(
            name=self.name,
            reason=self.reason,
            library=self.library,
            releases=self.releases,
            installed=software.versions.get(self.library),
            holds=self.holds_for(software),
            only_avoided=self.waived_by is not None,
            source=self.source,
        )


class DescribedRule(Struct, frozen=True, kw_only=True):
    """A rule as data, beside what is installed."""

    name: str
    reason: str
    library: str
    releases: str
    installed: str | None
    """None: not found."""
    holds: bool
    """Whether the rule holds for the release that is installed, or for a current one."""
    only_avoided: bool
    """Whether it works and is merely not chosen unasked."""
    source: str


def is_in(version: str, releases: str) -> bool:
    """Tell whether a version is in a range such as `>=1.6,<2`; what follows a version's numbers is not compared."""
    return all(_holds(_numbers(version), condition) for condition in releases.split(","))


def _holds(version: tuple[int, ...], condition: str) -> bool:
    operator, bound = re.fullmatch(r"\s*(>=|<)\s*([\d.]+)\s*", condition).groups()  # type: ignore[union-attr]
    pairs = list(zip_longest(version, _numbers(bound), fillvalue=0))
    is_older = [a for a, _ in pairs] < [b for _, b in pairs]
    return is_older if operator == "<" else not is_older


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"[\d.]*", version)
    return tuple(int(part) for part in (found.group() if found else "").split(".") if part)


def autocast_dtype(configuration: Configuration) -> str | None:
    """Return the half dtype of a mixed precision."""
    return {"bf16": "bfloat16", "fp16": "float16"}.get(configuration.mixed_precision)


def trains_in_fp16(configuration: Configuration) -> bool:
    """Tell whether something that trains is loaded in fp16; peft makes adapters fp32, and copies modules as they are.

    Source: peft/tuners/tuners_utils.py 0.21, cast_adapter_dtype; utils/other.py, ModulesToSaveWrapper.
    """
    whole = configuration.lora is None or bool(configuration.lora.modules_to_save)
    return whole and configuration.weights_dtype == "float16"


def is_from_bitsandbytes(optim: str) -> bool:
    """Tell an optimizer that steps with bitsandbytes' kernels; `adamw_torch_8bit` is torchao's."""
    return optim.startswith(("paged_", "lion_", "ademamix", "rmsprop_bnb")) or optim in {"adamw_8bit", "adamw_bnb_8bit"}
