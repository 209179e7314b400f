"""Which configurations of a space may be chosen: a rule is asked once for all that it cannot tell apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator

import numpy as np
import numpy.typing as npt
from msgspec import Struct
from msgspec.structs import replace

from autofit.errors import InputError
from autofit.memory.limits import unmodelled_but_optim, unmodelled_optim
from autofit.search.rules import Rule, Site, rules_for
from autofit.search.space import Block, blocks
from autofit.spec.configuration import Configuration, Dtype
from autofit.spec.hardware import Cluster
from autofit.spec.job import Job
from autofit.spec.profile import Regime
from autofit.spec.regimes import regime_of

Mask = npt.NDArray[np.bool_]
"""One row for each optimizer of a block and one column for each split, or a single one for all."""


class Allowed(Struct, frozen=True, kw_only=True):
    """A space with what is left of it."""

    blocks: tuple[Block, ...]
    """Those of which anything is left."""
    masks: tuple[Mask, ...]
    """What is left of each, whole masks."""
    fallen: Counter[Rule]
    """How many configurations fell to which rule."""
    unmodelled: Counter[str]
    """How many have a knob, or a combination of them, that is not modelled."""
    fp32_modules: frozenset[Dtype]
    """Dtypes that the model may be loaded in with modules in fp32."""

    def regimes(self, cluster: Cluster) -> tuple[Regime, ...]:
        """Return the code paths that are left."""
        return tuple(dict.fromkeys(regime_of(block.first, cluster.device, self.fp32_modules) for block in self.blocks))

    def of_smallest_micro_batch(self) -> Allowed:
        """Return what has the smallest micro-batch of all that is left."""
        smallest = min(
            micro_batch
            for block, mask in self._each()
            for (micro_batch, _), is_left in zip(block.splits, np.any(mask, axis=0).tolist(), strict=True)
            if is_left
        )
        masks = [mask & [micro_batch == smallest for micro_batch, _ in block.splits] for block, mask in self._each()]
        left = [(block, mask) for block, mask in zip(self.blocks, masks, strict=True) if mask.any()]
        return replace(self, blocks=tuple(block for block, _ in left), masks=tuple(mask for _, mask in left))

    def _each(self) -> Iterator[tuple[Block, Mask]]:
        return zip(self.blocks, self.masks, strict=True)


def allowed(job: Job, cluster: Cluster) -> Allowed:
    """Take out of a space what a rule forbids and what is not modelled.

    Raises:
        InputError: see `blocks`; or nothing is left.
    """
    every = blocks(job, cluster)
    verdicts = Verdicts(Site(cluster=cluster, config=job.model.config), rules_for(cluster.software, job.restrictions))
    masks = [verdicts.mask(block) for block in every]
    left = [(block, mask) for block, mask in zip(every, masks, strict=True) if mask.any()]
    if left:
        return Allowed(
            blocks=tuple(block for block, _ in left),
            masks=tuple(mask for _, mask in left),
            fallen=verdicts.fallen,
            unmodelled=verdicts.unmodelled,
            fp32_modules=job.model.fp32_modules,
        )
    reasons = [f"{rule.reason} ({rule.name})" for rule in verdicts.fallen]
    raise InputError(
        f"{job.model.name} cannot be trained as asked on {cluster.device.name}: "
        + "; ".join([*reasons, *(f"{knob} is not modelled" for knob in verdicts.unmodelled)]),
        to_fix="leave the precision, optimizer or attention open, or choose another",
    )


class Verdicts:
    """Asks rules about blocks, and counts what falls to which.

    A configuration falls to the first rule that it breaks. What a rule looks at it says itself (`Rule.axes`): about a
    block's path and engine it is asked once for the block, about optimizers and splits once for all blocks with the
    same path, or engine, if it looks at that too.

    Args:
        site: what configurations would run on.
        rules: those that hold, in their order.
    """

    def __init__(self, site: Site, rules: tuple[Rule, ...]) -> None:
        self._site = site
        self._of_blocks = [not {"optim", "split"} & {*rule.axes} for rule in rules]
        self._rules = rules
        self._known: dict[Hashable, Mask] = {}
        self._made: dict[tuple[int, int], Configuration] = {}
        """Of the block that is asked about, by the places of optimizer and split: many rules ask about the same."""
        self._known_unmodelled: dict[Hashable, dict[str, Mask]] = {}
        self.fallen: Counter[Rule] = Counter()
        self.unmodelled: Counter[str] = Counter()

    def mask(self, block: Block) -> Mask:
        """Return what is left of a block."""
        left = np.ones(block.shape, dtype=np.bool_)
        self._made = {}
        for rule, of_block in zip(self._rules, self._of_blocks, strict=True):
            if of_block:
                if rule.breaks(block.first, self._site):
                    self.fallen[rule] += int(left.sum())
                    return np.zeros_like(left)
            elif (broken := left & self._broken(rule, block)).any():
                self.fallen[rule] += int(broken.sum())
                left &= ~broken
        for knob, unmodelled in self._unmodelled(block).items():
            if (hit := left & unmodelled).any():
                self.unmodelled[knob] += int(hit.sum())
                left &= ~hit
        return left

    def _broken(self, rule: Rule, block: Block) -> Mask:
        key = (
            rule.name,
            block.path if "path" in rule.axes else None,
            block.engine if "engine" in rule.axes else None,
            block.optims if "optim" in rule.axes else None,
            block.splits if "split" in rule.axes else None,
        )
        if key not in self._known:
            optims = range(block.shape[0]) if "optim" in rule.axes else (0,)
            columns, of_each = _kinds_of_splits(block) if "split" in rule.axes else ([0], [0])
            asked = [[rule.breaks(self._configuration(block, o, s), self._site) for s in columns] for o in optims]
            self._known[key] = np.array(asked)[:, of_each]
        return self._known[key]

    def _unmodelled(self, block: Block) -> dict[str, Mask]:
        knob = unmodelled_but_optim(block.first)
        if knob is not None:
            return {knob: np.ones((1, 1), dtype=np.bool_)}
        key = block.engine, block.optims, block.splits
        if key not in self._known_unmodelled:
            self._known_unmodelled[key] = self._unmodelled_optims(block)
        return self._known_unmodelled[key]

    def _unmodelled_optims(self, block: Block) -> dict[str, Mask]:
        found: dict[str, Mask] = {}
        columns, of_each = _kinds_of_splits(block)
        for row in range(block.shape[0]):
            for kind, column in enumerate(columns):
                knob = unmodelled_optim(self._configuration(block, row, column))
                if knob is not None:
                    found.setdefault(knob, np.zeros(block.shape, dtype=np.bool_))[row] |= np.array(of_each) == kind
        return found

    def _configuration(self, block: Block, optim: int, split: int) -> Configuration:
        if (optim, split) not in self._made:
            self._made[optim, split] = block.configuration(optim, split)
        return self._made[optim, split]


def _kinds_of_splits(block: Block) -> tuple[list[int], list[int]]:
    """Return a split of each kind, one that accumulates and one that does not, and of which kind every split is."""
    accumulates = [num_micro_steps > 1 for _, num_micro_steps in block.splits]
    kinds = list(dict.fromkeys(accumulates))
    return [accumulates.index(kind) for kind in kinds], [kinds.index(each) for each in accumulates]
