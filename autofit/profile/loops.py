"""Steps that loop over tokens: they have as many operators as tokens, and a bound on how many are traced."""

from __future__ import annotations

from msgspec import Struct

from autofit.errors import AutofitError, InputError

MAX_OPERATORS = 250_000
"""Of one traced step. The tracer takes about 0.3 ms of one core for each, and goes through three steps."""
MAX_OPERATORS_OF_SEVERAL = 40_000
"""Of one step where several lengths are traced: a step with more loops over tokens, and is traced at one length."""
SHORT_LENGTHS = (16, 32)
"""Lengths at which a loop over tokens is quick to run, and shows how its operators grow."""
ROUND_TOKENS = 8
"""The length that is offered instead is a multiple of it."""


class TooManyOperatorsError(AutofitError):
    """A step has more operators than are traced."""


class Growth(Struct, frozen=True, kw_only=True):
    """How the operators of a step grow with its length: the straight line through two lengths that were run."""

    tokens: tuple[int, int]
    operators: tuple[int, int]

    @property
    def per_token(self) -> float:
        """Operators that one more token takes; 0 where there is no loop, or both have one length."""
        (short, longer), (few, more) = self.tokens, self.operators
        return (more - few) / (longer - short) if longer > short else 0.0

    def at(self, sequence_tokens: int) -> int:
        """Operators of a step of that length."""
        return round(self.operators[0] + self.per_token * (sequence_tokens - self.tokens[0]))

    def of_layers(self, times: float) -> Growth:
        """Return the growth of a model with so many times the layers."""
        few, more = (round(operators * times) for operators in self.operators)
        return Growth(tokens=self.tokens, operators=(few, more))

    def longest_tokens(self) -> int:
        """The longest sequence whose step has no more operators than are traced."""
        tokens = int(self.tokens[0] + (MAX_OPERATORS - self.operators[0]) / self.per_token)
        return tokens - tokens % ROUND_TOKENS


def refuse_long_loop(model_class: str, sequence_tokens: int, growth: Growth) -> None:
    """Refuse a length at which a loop would have more operators than are traced.

    Raises:
        InputError: says up to which length it is traced.
    """
    if growth.per_token <= 0 or growth.at(sequence_tokens) <= MAX_OPERATORS:
        return
    raise InputError(
        f"{model_class} loops over its tokens: a step at {sequence_tokens:,} tokens has about "
        f"{growth.at(sequence_tokens):,} operators, and up to {MAX_OPERATORS:,} are traced.",
        to_fix=f"plan for sequences of up to {growth.longest_tokens():,} tokens (--seq-len), or choose a model without "
        "such a loop",
    )
