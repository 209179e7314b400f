"""Hardware to choose from: what was named, or all that the catalogue has a price for, within a budget."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from autofit.errors import InputError
from autofit.search.rules import LIBRARIES
from autofit.sources.gpus import catalogue, device
from autofit.sources.hardware import parse_cluster
from autofit.sources.prices import Prices, priced
from autofit.spec.hardware import Cluster, Device
from autofit.spec.libraries import software_here

ANY = "any"
NUM_DEVICES_OFFERED = (1, 2, 4, 8)
"""Of one node, as clouds rent them."""


def hardware(
    named: Sequence[str], max_dollars_per_hour: float | None, prices: Prices | None = None
) -> tuple[Cluster, ...]:
    """Return the hardware to compare, each once, in the order it was named.

    Args:
        named: as `--gpus` takes it; `any` stands for 1, 2, 4 and 8 of every GPU that has a price.
        max_dollars_per_hour: for all devices together; what costs more, or has no price, is left out.
        prices: take the place of the catalogue's; `any` is then every GPU that has one of these.

    Raises:
        InputError: something named is not known, `any` has no budget, or nothing is within it.
    """
    if any(name.strip().casefold() == ANY for name in named) and max_dollars_per_hour is None:
        raise InputError("--gpus any needs a budget.", to_fix="add --max-dollars-per-hour, for instance 20")
    clusters: dict[Cluster, None] = {}
    for name in named:
        every = name.strip().casefold() == ANY
        found = every_priced(prices) if every else (priced(parse_cluster(name), prices),)
        clusters.update(dict.fromkeys(found))
    if max_dollars_per_hour is None:
        return tuple(clusters)
    affordable = tuple(each for each in clusters if _costs_at_most(each, max_dollars_per_hour))
    if affordable:
        return affordable
    cheapest = min((each for each in map(dollars_per_hour, clusters) if each is not None), default=None)
    raise InputError(
        f"none of this hardware costs at most ${max_dollars_per_hour:g} an hour.",
        to_fix="give prices with --price" if cheapest is None else f"the cheapest costs ${cheapest:.2f}",
    )


def every_priced(prices: Prices | None = None) -> tuple[Cluster, ...]:
    """Return 1, 2, 4 and 8 of every CUDA GPU that the catalogue, or the list that takes its place, has a price for."""
    software = software_here(LIBRARIES, trains_here=False)
    devices = [device(gpu) for gpu in catalogue().gpus if gpu.platform == "cuda"]
    every = [
        Cluster(device=each, num_devices_per_node=n, software=software) for each in devices for n in NUM_DEVICES_OFFERED
    ]
    return tuple(each for each in (priced(one, prices) for one in every) if each.device.dollars_per_hour is not None)


def other_sizes(of: Device) -> tuple[Device, ...]:
    """Return the same device with other amounts of memory, as far as the catalogue has them.

    Where the user has said what this one costs, nobody has said what they do.
    """
    known = catalogue()
    named = next((gpu for gpu in known.gpus if gpu.name == of.name), None)
    if named is None or named.platform != "cuda":
        return ()
    others = (device(gpu) for gpu in known.sizes(named.name) if gpu.name != named.name)
    return tuple(others if of.price_origin is None else (replace(each, dollars_per_hour=None) for each in others))


def dollars_per_hour(cluster: Cluster) -> float | None:
    """Return what all devices of a cluster cost; None where they have no price."""
    price = cluster.device.dollars_per_hour
    return None if price is None else price * cluster.num_devices


def _costs_at_most(cluster: Cluster, limit: float) -> bool:
    price = dollars_per_hour(cluster)
    return price is not None and price <= limit
