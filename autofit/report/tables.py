"""Lists people choose from: devices, models, templates, and what is installed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from msgspec import Struct
from rich.table import Table
from rich.text import Text

from autofit.report.words import params_words
from autofit.spec.hardware import Device
from autofit.units import GIB


class Requirement(Struct, frozen=True, kw_only=True):
    """A package that some of autofit needs, and what is not to be had without it."""

    package: str
    min_version: str
    needed_for: str


REQUIREMENTS = (
    Requirement(package="torch", min_version="2.4", needed_for="tracing a model without a stored profile; launching"),
    Requirement(package="transformers", min_version="4.45", needed_for="tracing; measuring text; launching"),
    Requirement(package="peft", min_version="0.12", needed_for="LoRA and QLoRA"),
    Requirement(package="bitsandbytes", min_version="0.43", needed_for="QLoRA, 8-bit and paged optimizers"),
    Requirement(package="pyarrow", min_version="15", needed_for="measuring Parquet files and saved data sets"),
    Requirement(package="accelerate", min_version="1.3", needed_for="launching"),
    Requirement(package="deepspeed", min_version="0.16", needed_for="launching with ZeRO-1, 2 and 3"),
)


def devices_table(devices: Iterable[Device]) -> Table:
    """List devices by name with what a planner needs of them; a blank is a figure nobody has published."""
    table = _plain("name for --gpus", "memory GiB", "bf16 TFLOPS", "GB/s", "$/h")
    for device in devices:
        memory = f"{device.memory_bytes / GIB:.2f}" + ("~" if device.memory_is_estimated else "")
        table.add_row(
            device.name,
            memory,
            _scaled(device.bf16_flops_per_second, 1e12, ".0f"),
            _scaled(device.memory_bytes_per_second, 1e9, ".0f"),
            _scaled(device.dollars_per_hour, 1, ".2f"),
        )
    return table


def models_table(num_params: Mapping[str, int | None]) -> Table:
    """List models by Hub id with the exact number of parameters, where one is published."""
    table = _plain("name for --model", "parameters")
    for name, count in num_params.items():
        table.add_row(name, params_words(count))
    return table


def templates_table(templates: Mapping[str, str]) -> Table:
    """List templates with the line that says what each is for."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("template", header_style="dim", no_wrap=True)
    table.add_column("for", header_style="dim", overflow="fold")
    for name, purpose in templates.items():
        table.add_row(name, purpose)
    return table


def doctor_table(versions: Mapping[str, str | None]) -> Table:
    """List what is installed and what a missing or old package forbids."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("package", "installed", "needs", "for"):
        table.add_column(title, header_style="dim", overflow="fold")
    for requirement in REQUIREMENTS:
        version = versions.get(requirement.package)
        good = satisfies(version, requirement.min_version)
        style = "green" if good else "bold red"
        shown = Text(version or "missing", style=style)
        table.add_row(requirement.package, shown, f">={requirement.min_version}", requirement.needed_for)
    return table


def inference_table(parts: Mapping[str, int | None]) -> Table:
    """List what generating needs, in GiB; what is not known is left out."""
    table = _plain("for generating", "GiB")
    for name, num_bytes in parts.items():
        if num_bytes is not None:
            table.add_row(name, f"{num_bytes / GIB:.2f}")
    return table


def satisfies(version: str | None, min_version: str) -> bool:
    """Compare releases by their first two numbers, which is what the requirements name."""
    return version is not None and _release(version) >= _release(min_version)


def _release(version: str) -> tuple[int, ...]:
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in version.split(".", 2)[:2])


def _scaled(figure: float | None, factor: float, form: str) -> str:
    return "" if figure is None else format(figure / factor, form)


def _plain(*titles: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for number, title in enumerate(titles):
        first = number == 0
        table.add_column(title, justify="left" if first else "right", header_style="dim", no_wrap=first)
    return table
