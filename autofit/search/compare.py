"""One job on several kinds of hardware: the best plan of each, and which of them nothing else beats."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from msgspec import Struct

from autofit.errors import InputError, NothingFitsError
from autofit.plan import Plan
from autofit.search.ahead import Ahead
from autofit.search.evaluate import MemoryEstimator
from autofit.search.solve import required_regimes, solve
from autofit.spec.hardware import Cluster
from autofit.spec.job import Job
from autofit.spec.profile import ProfileSet, Regime


class Offer(Struct, frozen=True, kw_only=True):
    """Hardware with what the job would be there: a plan, or why there is none."""

    cluster: Cluster
    plan: Plan | None
    refused: str | None
    fits: bool | None = True
    """Whether some configuration fits; None: what was asked for cannot be planned there, whatever memory it has."""

    @property
    def dollars_per_hour(self) -> float | None:
        """Of the devices that are used, without a plan of all; None where a device has no price."""
        price = self.cluster.device.dollars_per_hour
        num_devices = self.plan.configuration.num_processes if self.plan else self.cluster.num_devices
        return None if price is None else price * num_devices

    @property
    def dollars_per_million_tokens(self) -> float | None:
        """None without a plan, a price or a time."""
        return self.plan.cost.dollars_per_million_tokens if self.plan else None

    @property
    def tokens_per_second(self) -> float | None:
        """Over all devices; None without a plan or a time."""
        return self.plan.time.tokens_per_second if self.plan else None


def regimes_of_all(job: Job, clusters: Iterable[Cluster]) -> tuple[Regime, ...]:
    """Return every code path that has to be traced before `offers`; what cannot be planned needs none."""
    regimes: dict[Regime, None] = {}
    for cluster in clusters:
        try:
            regimes.update(dict.fromkeys(required_regimes(job, cluster)))
        except InputError:
            continue
    return tuple(regimes)


def offers(
    job: Job,
    clusters: Sequence[Cluster],
    profiles: ProfileSet,
    progress: Callable[[str, int, int], None] = lambda _name, _done, _total: None,
    *,
    estimate_memory: MemoryEstimator | None = None,
    num_cores: int = 1,
) -> tuple[Offer, ...]:
    """Plan the job on each hardware; the cheapest per token first, then what has no price, then what is refused.

    Args:
        job: what is trained; the same on all.
        clusters: the hardware.
        profiles: of `regimes_of_all`.
        progress: called with (hardware, planned, of how many).
        estimate_memory: takes the place of the memory model; for tests.
        num_cores: how many processes may work; with more than 1 this one is copied, see `autofit.search.ahead`.
    """

    def offer(number: int) -> Offer:
        return _offer(job, clusters[number], profiles, estimate_memory)

    found = []
    with Ahead(offer, range(len(clusters)), num_cores) as ahead:
        for number, cluster in enumerate(clusters):
            progress(f"{cluster.num_devices} x {cluster.device.name}", number, len(clusters))
            found.append(ahead.get(number) or offer(number))
    return tuple(sorted(found, key=_order))


def _offer(job: Job, cluster: Cluster, profiles: ProfileSet, estimate_memory: MemoryEstimator | None) -> Offer:
    try:
        plan = solve(job, cluster, profiles, estimate_memory=estimate_memory)
        return Offer(cluster=cluster, plan=plan, refused=None)
    except (InputError, NothingFitsError) as error:
        fits = False if isinstance(error, NothingFitsError) else None
        return Offer(cluster=cluster, plan=None, refused=error.message, fits=fits)


def _order(offer: Offer) -> tuple[int, float]:
    if offer.plan is None:
        return 3, 0.0
    if offer.dollars_per_million_tokens is not None:
        return 0, offer.dollars_per_million_tokens
    hours = offer.plan.cost.device_hours_per_million_tokens
    return (2, 0.0) if hours is None else (1, hours)


def unbeaten(found: Sequence[Offer]) -> tuple[Offer, ...]:
    """Return the offers than which none is both as fast and as cheap per token: the Pareto front, cheapest first.

    Offers without a price or a time cannot be compared, and are not in it.
    """
    priced = [each for each in found if None not in {each.dollars_per_million_tokens, each.tokens_per_second}]
    front: list[Offer] = []
    for offer in sorted(priced, key=lambda each: (_dollars(each), -_speed(each))):
        if not front or _speed(offer) > _speed(front[-1]):
            front.append(offer)
    return tuple(front)


def _dollars(offer: Offer) -> float:
    return offer.dollars_per_million_tokens or 0.0


def _speed(offer: Offer) -> float:
    return offer.tokens_per_second or 0.0
