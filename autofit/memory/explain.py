"""Takes an estimate apart: each term with its formula and source, and the tensors that activations consist of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from msgspec import Struct

from autofit.memory.tape import size_table
from autofit.memory.terms import TERM_SOURCES
from autofit.memory.unroll import unroll
from autofit.spec.configuration import Configuration
from autofit.spec.estimate import MemoryEstimate, Phase
from autofit.spec.profile import GRADIENT, INSIDE, MONOMIALS, RegimeProfile, Segment

PHASE_NAMES = {"layer": "layer_forward", "head": "head_and_loss"}
MONOMIAL_WORDS = ("", "b", "s", "b s", "s^2", "b s^2")


class HeldTensors(Struct, frozen=True, kw_only=True):
    """Equal tensors that are alive at a phase's highest moment."""

    born_in: str
    """Stretch of the step that made them."""
    num_tensors: int
    tensor_bytes: int
    formula: str
    """Bytes of one as a polynomial in b (sequences of the micro-batch) and s (tokens of a sequence)."""
    inside_kernel: bool

    @property
    def total_bytes(self) -> int:
        """Of all of them."""
        return self.num_tensors * self.tensor_bytes


class ExplainedTerm(Struct, frozen=True, kw_only=True):
    """One term of a phase."""

    name: str
    bytes: int
    meaning: str
    formula: str
    sources: tuple[str, ...]


class ExplainedPhase(Struct, frozen=True, kw_only=True):
    """One phase, the terms that its bytes are the sum of, and the largest tensors behind its activations."""

    name: str
    bytes: int
    terms: tuple[ExplainedTerm, ...]
    activations: tuple[HeldTensors, ...]
    """Largest first. Without those that the engine gathers, and at the moment when, gradients included, most is
    alive: what is more or less than the term is what a sharding does with gradients there."""


class Symbols(Struct, frozen=True, kw_only=True):
    """What the letters in formulas stand for."""

    num_params: int
    """P, as stored: packed weights two to a byte."""
    num_trained_params: int
    """T."""
    num_processes: int
    """N."""
    micro_batch_sequences: int
    """b."""
    sequence_tokens: int
    """s."""
    num_layers: int
    hidden_size: int
    """h."""


def symbols_of(profile: RegimeProfile, configuration: Configuration, sequence_tokens: int) -> Symbols:
    """Return the numbers behind the formulas."""
    return Symbols(
        num_params=profile.num_elements(),
        num_trained_params=profile.num_elements(trains=True),
        num_processes=configuration.num_processes,
        micro_batch_sequences=configuration.per_device_train_batch_size,
        sequence_tokens=sequence_tokens,
        num_layers=profile.num_layers,
        hidden_size=profile.hidden_size,
    )


def explain_phases(
    memory: MemoryEstimate, profile: RegimeProfile, configuration: Configuration, sequence_tokens: int
) -> tuple[ExplainedPhase, ...]:
    """Explain each phase of an estimate.

    Args:
        memory: the estimate.
        profile: the traced step that it was made from.
        configuration: what was estimated.
        sequence_tokens: tokens of every sequence.
    """
    held = held_tensors(profile, configuration.per_device_train_batch_size, sequence_tokens)
    return tuple(_explained(phase, held.get(phase.name, ()), configuration) for phase in memory.phases)


def _explained(phase: Phase, held: tuple[HeldTensors, ...], configuration: Configuration) -> ExplainedPhase:
    terms = []
    for name, num_bytes in phase.terms.items():
        term = TERM_SOURCES[name]
        terms.append(
            ExplainedTerm(
                name=name,
                bytes=num_bytes,
                meaning=term.meaning,
                formula=term.formula_under(configuration.sharding),
                sources=term.sources_under(configuration.sharding),
            )
        )
    largest_first = tuple(sorted(terms, key=lambda term: -term.bytes))
    return ExplainedPhase(name=phase.name, bytes=phase.bytes, terms=largest_first, activations=held)


_Origin = tuple[str, int, bool]
"""(where it was born, bytes, whether inside a kernel)."""


def held_tensors(profile: RegimeProfile, micro_batch: int, sequence_tokens: int) -> dict[str, tuple[HeldTensors, ...]]:
    """Return, for each phase, what besides gradients is alive when activations and gradients are at their highest.

    The whole step is played at full depth, gradients kept.
    """
    formulas = _formulas(profile, micro_batch, sequence_tokens)
    origins: dict[int, _Origin] = {}
    alive: Counter[_Origin] = Counter()
    alive_bytes = gradient_bytes = 0
    highest: dict[str, int] = {}
    found: dict[str, Counter[_Origin]] = {}
    has_gradients = False
    for segment, events in zip(
        _segments(profile), unroll(profile, micro_batch, sequence_tokens).segments(), strict=True
    ):
        best, snapshot, name = -1, None, _phase_name(segment, has_gradients=has_gradients)
        for event in events:
            if event.category == GRADIENT:
                gradient_bytes += event.num_bytes if event.is_birth else -event.num_bytes
                if not has_gradients:
                    _keep(found, highest, name, best, snapshot)
                    has_gradients, best, snapshot = True, -1, None
                    name = _phase_name(segment, has_gradients=True)
            elif event.is_birth:
                origin = (_born_in(segment), event.num_bytes, event.category == INSIDE)
                origins[event.number_of] = origin
                alive[origin] += 1
                alive_bytes += event.num_bytes
            elif event.number_of in origins:
                alive[origins.pop(event.number_of)] -= 1
                alive_bytes -= event.num_bytes
            if alive_bytes + gradient_bytes > max(best, highest.get(name, -1)):
                best, snapshot = alive_bytes + gradient_bytes, alive.copy()
        _keep(found, highest, name, best, snapshot)
    return {name: _largest_first(tensors, formulas) for name, tensors in found.items()}


def _keep(
    found: dict[str, Counter[_Origin]],
    highest: dict[str, int],
    name: str,
    best: int,
    snapshot: Counter[_Origin] | None,
) -> None:
    if snapshot is not None and best > highest.get(name, -1):
        highest[name], found[name] = best, snapshot


def _segments(profile: RegimeProfile) -> Iterator[Segment]:
    """The segment of each stretch that `unroll` writes out, in its order."""
    for segment in profile.segments:
        yield from [segment] * (1 if segment.layer is None else profile.repeats(segment))


def _phase_name(segment: Segment, *, has_gradients: bool) -> str:
    """Name a stretch as the estimate's phases do: the head's backward begins with the first gradient."""
    if segment.name == "loss_backward" and has_gradients:
        return "head_backward"
    return PHASE_NAMES.get(segment.name, segment.name)


def _born_in(segment: Segment) -> str:
    return PHASE_NAMES.get(segment.name, segment.name)


def _formulas(profile: RegimeProfile, micro_batch: int, sequence_tokens: int) -> dict[int, str]:
    """A polynomial in words for each number of bytes; where several come to the same, the first."""
    sizes = size_table(profile, micro_batch, sequence_tokens)[:, 0]
    words: dict[int, str] = {}
    for size, polynomial in zip(sizes, profile.sizes, strict=True):
        words.setdefault(int(size), _words(polynomial))
    return words


def _words(polynomial: tuple[float, ...]) -> str:
    assert len(MONOMIAL_WORDS) == len(MONOMIALS), "every monomial has its words"
    parts = [
        f"{coefficient:,.10g} {word}".strip()
        for coefficient, word in zip(polynomial, MONOMIAL_WORDS, strict=True)
        if coefficient
    ]
    return " + ".join(parts) or "0"


def _largest_first(tensors: Counter[_Origin], formulas: dict[int, str]) -> tuple[HeldTensors, ...]:
    held = [
        HeldTensors(
            born_in=born_in,
            num_tensors=num,
            tensor_bytes=num_bytes,
            formula=formulas.get(num_bytes, "?"),
            inside_kernel=inside,
        )
        for (born_in, num_bytes, inside), num in tensors.items()
        if num > 0 and num_bytes > 0
    ]
    return tuple(sorted(held, key=lambda each: (-each.total_bytes, each.born_in, each.tensor_bytes)))
