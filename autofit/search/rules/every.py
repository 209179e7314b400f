"""Every rule, in the order in which they are tried, and which of them hold."""

from __future__ import annotations

from collections.abc import Sequence

from autofit.search.rules.engines import ENGINE_RULES
from autofit.search.rules.fsdp import FSDP_RULES
from autofit.search.rules.hardware import HARDWARE_RULES
from autofit.search.rules.optimizers import OPTIMIZER_RULES
from autofit.search.rules.rule import Rule, Site
from autofit.search.rules.software import SOFTWARE_RULES
from autofit.spec.configuration import Configuration
from autofit.spec.job import Restrictions
from autofit.spec.software import Software

RULES: tuple[Rule, ...] = (*HARDWARE_RULES, *ENGINE_RULES, *FSDP_RULES, *OPTIMIZER_RULES, *SOFTWARE_RULES)
"""In the order in which they are tried: a configuration falls to the first that it breaks."""

LIBRARIES: tuple[str, ...] = tuple(sorted({rule.library for rule in RULES}))
"""The distributions whose releases decide which rules hold."""


def rules_for(software: Software, restrictions: Restrictions) -> tuple[Rule, ...]:
    """Return the rules for a search: those that hold for what is installed, but for what the user asked for."""
    holding = (rule for rule in RULES if rule.holds_for(software))
    return tuple(rule for rule in holding if rule.waived_by is None or not rule.waived_by(restrictions))


def rules_for_given(software: Software) -> tuple[Rule, ...]:
    """Return the rules for a configuration that was given: what does not work with what is installed."""
    breaking = (rule for rule in RULES if rule.waived_by is None and not rule.for_plans_only)
    return tuple(rule for rule in breaking if rule.holds_for(software))


def broken_rule(configuration: Configuration, site: Site, rules: Sequence[Rule]) -> Rule | None:
    """Return the first rule that leaves a configuration out, None where it may be chosen."""
    return next((rule for rule in rules if rule.breaks(configuration, site)), None)
