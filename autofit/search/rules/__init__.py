"""Combinations that libraries refuse or break, each with its reason, the releases it holds for and its source.

To add a rule, add an entry to the table it belongs to; nothing else knows of single rules.
"""

from autofit.search.rules.every import LIBRARIES, RULES, broken_rule, rules_for, rules_for_given
from autofit.search.rules.rule import Rule, Site

__all__ = ["LIBRARIES", "RULES", "Rule", "Site", "broken_rule", "rules_for", "rules_for_given"]
