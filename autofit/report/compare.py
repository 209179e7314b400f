"""Hardware side by side for people: a table, and a picture of what is fast against what is cheap."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from string import ascii_lowercase

from msgspec import Struct
from rich.console import Group, RenderableType
from rich.text import Text

from autofit.plan import Plan
from autofit.report.plan import bullets, plain_table
from autofit.report.words import price_words, tokens_words
from autofit.search.compare import Offer
from autofit.spec.hardware import Cluster
from autofit.units import GIB, format_three_digits

PICTURE_ROWS = 12
MOST_PICTURE_COLUMNS = 72
_MARGIN_COLUMNS = 12
_SMALLEST_POINTS = 2
MOST_LISTED = 16


def comparison_report(found: Sequence[Offer], unbeaten: Sequence[Offer], *, width: int) -> Group:
    """Lay out a comparison for a terminal of `width` columns."""
    parts: list[RenderableType] = [Text(verdict(found, unbeaten), style="bold")]
    planned = [offer for offer in found if offer.plan is not None]
    listed = worth_listing(planned, unbeaten)
    if listed:
        parts.append(offers_table(listed, unbeaten, width=width))
    if len(listed) < len(planned):
        parts.append(
            Text(f"{len(planned) - len(listed)} more, none cheaper than the same device above; --json has all.")
        )
    drawn = [offer for offer in planned if is_drawn(offer)]
    if len(drawn) >= _SMALLEST_POINTS:
        parts.append(picture(drawn, unbeaten, names(listed), width=width))
    parts.append(bullets("Not possible", refusals(found)))
    return Group(*parts)


def worth_listing(planned: Sequence[Offer], unbeaten: Sequence[Offer]) -> list[Offer]:
    """Keep all of a short list; of a long one what nothing beats, and of every other device its cheapest offer."""
    if len(planned) <= MOST_LISTED:
        return list(planned)
    best = {id(offer) for offer in unbeaten}
    cheapest: dict[str, Offer] = {}
    for offer in planned:
        cheapest.setdefault(offer.cluster.device.name, offer)
    first = {id(offer) for offer in cheapest.values()}
    return [offer for offer in planned if id(offer) in best | first]


def refusals(found: Sequence[Offer]) -> list[str]:
    """Say why there is no plan, once for all hardware of which the same is true."""
    reasons: dict[str, list[str]] = {}
    for offer in found:
        if offer.refused is not None:
            reasons.setdefault(offer.refused.splitlines()[0], []).append(words(offer.cluster))
    return [f"{', '.join(hardware)}: {reason}" for reason, hardware in reasons.items()]


def verdict(found: Sequence[Offer], unbeaten: Sequence[Offer]) -> str:
    """Say which hardware is cheapest and which is fastest."""
    if not any(offer.plan for offer in found):
        planned = any(offer.fits is not None for offer in found)
        return f"The job {'fits none' if planned else 'cannot be planned on any'} of this hardware."
    fastest = max((offer for offer in found if offer.plan), key=_speed)
    said = f"Fastest: {words(fastest.cluster)}, {tokens_words(_speed(fastest))} tokens/s."
    if not unbeaten:
        if not _speed(fastest):
            return "No speed is known of any of this hardware, and so no price of a token."
        return f"No price is known of any of this hardware whose speed is; --price takes them. {said}"
    cheapest = unbeaten[0]
    first = f"Cheapest: {words(cheapest.cluster)}, {_price(cheapest)} per million tokens"
    return f"{first}; nothing here is faster." if _speed(fastest) <= _speed(cheapest) else f"{first}. {said}"


def words(cluster: Cluster) -> str:
    """Name hardware as it is written for --gpus."""
    nodes = f"{cluster.num_nodes}x" if cluster.num_nodes > 1 else ""
    return f"{nodes}{cluster.num_devices_per_node}x{cluster.device.name}"


def names(listed: Sequence[Offer]) -> dict[int, str]:
    """Give each offer a letter for the picture, by its identity: a to z, then aa, ab ..."""
    letters = [*ascii_lowercase, *(a + b for a in ascii_lowercase for b in ascii_lowercase)]
    return {id(offer): name for offer, name in zip(listed, letters, strict=False)}


class _Column(Struct, frozen=True):
    title: str
    cell: Callable[[Offer, Plan], str]
    min_width: int = 0
    """Narrowest terminal that shows it."""


COLUMNS = (
    _Column("hardware", lambda offer, _: words(offer.cluster)),
    _Column("$/h", lambda offer, _: "?" if offer.dollars_per_hour is None else f"{offer.dollars_per_hour:.2f}", 60),
    _Column("method", lambda _, plan: plan.configuration.method),
    _Column("batch x acc.", lambda _, plan: _batch(plan), 75),
    _Column("sharding", lambda _, plan: plan.configuration.sharding, 85),
    _Column("ckpt", lambda _, plan: "yes" if plan.configuration.gradient_checkpointing else "no", 100),
    _Column("needs GiB", lambda _, plan: f"{plan.memory.needed_bytes / GIB:.1f}", 95),
    _Column("tokens/s", lambda offer, _: tokens_words(offer.tokens_per_second) if offer.tokens_per_second else "?"),
    _Column("$/M tokens", lambda offer, _: _price(offer)),
)


def offers_table(listed: Sequence[Offer], unbeaten: Sequence[Offer], *, width: int) -> RenderableType:
    """Set the best plan of each hardware side by side; a star marks what nothing beats in both speed and price."""
    shown = [column for column in COLUMNS if column.min_width <= width]
    table = plain_table(
        "The best plan of each (*: none is both faster and cheaper)", "", *(column.title for column in shown)
    )
    letters, best = names(listed), {id(offer) for offer in unbeaten}
    for offer in listed:
        assert offer.plan is not None, "only what was planned is listed"
        mark = "*" if id(offer) in best else " "
        cells = [column.cell(offer, offer.plan) for column in shown]
        table.add_row(f"{letters[id(offer)]} {mark}", *cells, style="bold" if mark == "*" else "")
    table.columns[1].justify = "left"
    return table


def is_drawn(offer: Offer) -> bool:
    """Tell whether an offer has both axes of the picture."""
    return offer.tokens_per_second is not None and offer.dollars_per_million_tokens is not None


def picture(drawn: Sequence[Offer], unbeaten: Sequence[Offer], letters: dict[int, str], *, width: int) -> Text:
    """Draw speed to the right and price upwards, both in proportion; capitals: what nothing beats; dots: not listed."""
    columns = min(MOST_PICTURE_COLUMNS, max(20, width - _MARGIN_COLUMNS))
    speeds = [math.log(offer.tokens_per_second or 1) for offer in drawn]
    prices = [math.log(offer.dollars_per_million_tokens or 1) for offer in drawn]
    grid = [[" "] * columns for _ in range(PICTURE_ROWS)]
    best = {id(offer) for offer in unbeaten}
    # What nothing beats is drawn last, over what shares its place.
    for offer, speed, price in sorted(
        zip(drawn, speeds, prices, strict=True), key=lambda point: (id(point[0]) in best, id(point[0]) in letters)
    ):
        column = _place(speed, speeds, columns - 1)
        row = PICTURE_ROWS - 1 - _place(price, prices, PICTURE_ROWS - 1)
        name = letters.get(id(offer), ".")
        name = name.upper() if id(offer) in best else name
        start = min(column, columns - len(name))
        grid[row][start : start + len(name)] = name
    return Text("\n".join(_framed(grid, speeds, prices)))


def _place(value: float, values: Sequence[float], last: int) -> int:
    low, high = min(values), max(values)
    return 0 if high == low else round((value - low) / (high - low) * last)


def _framed(grid: Sequence[Sequence[str]], speeds: Sequence[float], prices: Sequence[float]) -> list[str]:
    top, bottom = (f"${format_three_digits(math.exp(price))}" for price in (max(prices), min(prices)))
    labels = [top, *[""] * (len(grid) - 2), bottom]
    left, right = tokens_words(math.exp(min(speeds))), tokens_words(math.exp(max(speeds)))
    below = f"{left}{right:>{max(1, len(grid[0]) - len(left))}}"
    return [
        "\nDollars per million tokens (up) against tokens/s (right), both on a scale of proportions; capitals: the *",
        *(f"{label:>8} |{''.join(row).rstrip()}" for label, row in zip(labels, grid, strict=True)),
        f"{'':>8} +{'-' * len(grid[0])}",
        f"{'':>8}  {below}",
    ]


def _batch(plan: Plan) -> str:
    configuration = plan.configuration
    return f"{configuration.per_device_train_batch_size} x {configuration.gradient_accumulation_steps}"


def _price(offer: Offer) -> str:
    assert offer.plan is not None, "only what was planned has a price"
    return ("" if offer.dollars_per_million_tokens is None else "$") + price_words(offer.plan.cost)


def _speed(offer: Offer) -> float:
    return offer.tokens_per_second or 0.0
