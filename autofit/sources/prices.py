"""`--price`: what an hour of a device costs, as one number or from a list of the user's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from msgspec import Struct
from msgspec.structs import replace

from autofit.errors import InputError, nearest
from autofit.sources.gpus import catalogue
from autofit.spec.hardware import Cluster, Device

Purchase = Literal["on-demand", "spot"]
_FORM = "`A100-80G: 1.39`, or `A100-80G: {on-demand: 1.39, spot: 0.7}`, one a line"


MOST_DOLLARS = 1_000_000
"""For an hour of one device: more is a slip of the pen."""


class Prices(Struct, frozen=True, kw_only=True):
    """Dollars per device-hour that take the place of the catalogue's."""

    origin: str
    """What a plan says of them."""
    of_every_device: float | None = None
    by_name: Mapping[str, float] | None = None
    """By catalogue name; a device that is not in it has no price."""

    def of(self, device: Device) -> Device:
        """Return a device with this price."""
        dollars = self.of_every_device if self.by_name is None else self.by_name.get(device.name)
        return replace(device, dollars_per_hour=dollars, price_origin=None if dollars is None else self.origin)


def priced(cluster: Cluster, prices: Prices | None) -> Cluster:
    """Return a cluster at these prices; at the catalogue's where there are none."""
    return cluster if prices is None else replace(cluster, device=prices.of(cluster.device))


def read_prices(text: str | None) -> Prices | None:
    """Read what `--price` was given.

    Args:
        text: dollars per device-hour, or `FILE[:spot]`: YAML or JSON, from names as `--gpus` takes them to prices.

    Raises:
        InputError: it is neither, or the file cannot be read, names no known GPU, or has a price that is none.
    """
    if text is None:
        return None
    if (dollars := _number(text)) is not None:
        return Prices(origin="as given", of_every_device=_price(dollars, text))
    path, _, last = text.rpartition(":")
    purchase = next((each for each in get_args(Purchase) if each == last), None)
    file = Path(path if purchase else text)
    content = _content(file)
    known = _by_device(content, file)
    chosen = {name: _chosen(price, purchase or "on-demand", f"{file}: {name}") for name, price in known.items()}
    by_name = {name: price for name, price in chosen.items() if price is not None}
    return Prices(origin=f"{purchase or 'on-demand'}, by {file.name}", by_name=by_name)


def _by_device(content: Mapping[Any, Any], file: Path) -> dict[str, Any]:
    """Return what a file says of each device, by its catalogue name."""
    found: dict[str, Any] = {}
    for name, price in content.items():
        device = _name(str(name), file)
        if device in found:
            raise InputError(f"{file}: {device} has two prices, the second as {str(name)!r}.", to_fix="leave one out")
        found[device] = price
    return found


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _price(value: Any, origin: str) -> float:
    dollars = _number(str(value))
    if isinstance(value, bool) or dollars is None or not 0 <= dollars <= MOST_DOLLARS:
        raise InputError(f"{origin}: {value!r} is no price.", to_fix="give dollars per device-hour, for instance 1.39")
    return dollars


def _content(file: Path) -> dict[Any, Any]:
    import yaml

    try:
        text = file.read_text(encoding="utf-8")
        content, written = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, ValueError) as error:  # no text, or a name with a NUL
        raise InputError(
            f"--price: cannot read {str(file)!r}: {getattr(error, 'strerror', None) or error}",
            to_fix="give dollars per device-hour, or a readable .yaml or .json file (FILE:spot for spot prices)",
        ) from error
    except yaml.YAMLError as error:
        raise InputError(f"{str(file)!r} is not YAML: {error}", to_fix="correct the file") from error
    if not isinstance(content, dict) or not content:
        raise InputError(f"{str(file)!r} is no list of prices.", to_fix=f"write {_FORM}")
    assert isinstance(written, yaml.MappingNode), "it was read as one"
    names = [name.value for name, _ in written.value]
    if twice := [name for name in names if names.count(name) > 1]:  # of which YAML would take the last
        raise InputError(f"{str(file)!r} has two prices of {twice[0]!r}.", to_fix="leave one out")
    return content


def _name(name: str, file: Path) -> str:
    """Return the catalogue's name of a GPU; one that is written without its memory where several have it is refused."""
    known = catalogue()
    found = known.called(name)
    if len(found) != 1:
        likely = ", ".join(gpu.name for gpu in found) or nearest(name, known.names)
        words = "comes with different memory" if found else "is not a known GPU"
        raise InputError(f"{file}: {name!r} {words}.", to_fix=f"write one of {likely}")
    return found[0].name


def _chosen(price: Any, purchase: Purchase, origin: str) -> float | None:
    """Return a price, on demand or spot; a bare number is on demand."""
    if not isinstance(price, dict):
        return _price(price, origin) if purchase == "on-demand" else None
    if unknown := set(price) - {*get_args(Purchase)}:
        raise InputError(f"{origin}: {min(map(str, unknown))!r} is no kind of price.", to_fix=f"write {_FORM}")
    return {kind: _price(dollars, origin) for kind, dollars in price.items()}.get(purchase)
