"""The catalogue of GPUs: names as people write them, figures with their sources, and `Device` made of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from importlib import resources
from typing import Literal

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from autofit.errors import InputError, nearest
from autofit.spec.hardware import Device
from autofit.units import MIB

FIRST_WITH_BF16 = (8, 0)
"""Compute capability of Ampere. Source: CUDA C++ Programming Guide, arithmetic instructions."""


class Figures(Struct, frozen=True, kw_only=True):
    """What a GPU can do, in the units of datasheets. None: not known."""

    usable_mib: int | None = None
    """MiB that torch reports as the device's total memory."""
    compute_capability: str | None = None
    bf16_tflops: float | None = None
    """10^12 operations a second, dense, fp32 accumulate; so are the next two."""
    fp16_tflops: float | None = None
    tf32_tflops: float | None = None
    fp32_tflops: float | None = None
    """Without tensor cores."""
    bandwidth_gb_s: float | None = None
    """10^9 bytes a second of the device's own memory."""
    peer_gb_s: float | None = None
    """10^9 bytes a second to the other devices of a node, one direction, all links together."""
    host_gb_s: float | None = None
    """10^9 bytes a second to the host's memory, one direction."""
    dollars_per_hour: float | None = None


FIGURE_NAMES = Figures.__struct_fields__


class Gpu(Struct, frozen=True, kw_only=True):
    """A row of the catalogue, or a device that the user described."""

    name: str
    aliases: tuple[str, ...] = ()
    reported_names: tuple[str, ...] = ()
    """What `nvidia-smi` prints."""
    platform: Literal["cuda", "rocm", "hpu"] = "cuda"
    label_gb: int
    """The size in the product's name."""
    usable_from: str = "torch"
    """`torch` where its figure is published, else the rule the figure was derived by."""
    figures: Figures
    sources: tuple[str, ...] = ()
    price_sources: tuple[str, ...] = ()


class Catalogue(Struct, frozen=True, kw_only=True):
    """Every known GPU, and how to derive usable memory on the safe side where torch's figure is not published."""

    gpus: tuple[Gpu, ...]
    smallest_usable_per_label: float
    """The smallest share that a CUDA GPU's usable memory is of its label in GiB."""

    def called(self, name: str) -> tuple[Gpu, ...]:
        """Return the GPUs a name may mean: with or without the memory size, however it is spelt.

        What no GPU is called is read word by word, in any order: `A100 80GB PCIe` is an `A100-PCIe-80G`.
        """
        key = fold(name)
        whole = tuple(gpu for gpu in self.gpus if key in _spellings(gpu))
        return whole or tuple(gpu for gpu in self.gpus if _words(name) in _word_spellings(gpu))

    def sizes(self, name: str) -> tuple[Gpu, ...]:
        """Return the GPUs that would be meant if only the memory size in `name` were another."""
        sized = split_size(name)
        return () if sized.size is None else self.called(sized.base)

    def reported_as(self, name: str) -> tuple[Gpu, ...]:
        """Return the GPUs for which the driver prints this name."""
        return tuple(gpu for gpu in self.gpus if name in gpu.reported_names)

    @property
    def names(self) -> tuple[str, ...]:
        """One name per GPU: the shortest that means it alone."""
        return tuple(min(_complete_names(gpu), key=len) for gpu in self.gpus if gpu.platform == "cuda")


@cache
def catalogue() -> Catalogue:
    """Read the catalogue that ships with autofit."""
    text = resources.files("autofit.sources").joinpath("data/gpus.json").read_bytes()
    return msgspec.json.decode(text, type=Catalogue)


def fold(name: str) -> str:
    """Drop what does not matter in a GPU's name: case, dashes, spaces, underscores, and the B of GB."""
    return re.sub(r"[-_\s]", "", re.sub(r"(?<=\d)\s*g(i?b)?$", "g", name.strip().casefold()))


_MAKERS = frozenset({"nvidia", "geforce", "tesla", "quadro", "amd", "instinct", "intel"})
_MEMORY_KINDS = re.compile(r"hbm\d\w?|gddr\d\w?")
_FORMS = {"sxm2": "sxm", "sxm3": "sxm", "sxm4": "sxm", "sxm5": "sxm", "smx": "sxm"}
"""Sockets, each of one generation, and a spelling that tables have."""


def _words(name: str) -> tuple[str, ...]:
    """Split a name into its words without those that tell no GPUs apart, in an order of their own."""
    if re.search(r"[^\w .()/,-]", name):  # no name has such a character
        return (name,)
    spaced = re.sub(r"(\d)\s*g(?:i?b)?\b", r"\1g", name.casefold())
    words = [_FORMS.get(word, word) for word in re.split(r"[^a-z0-9.]+", spaced) if word]
    telling = [word for word in words if word not in _MAKERS and not _MEMORY_KINDS.fullmatch(word)]
    sizes = [word for word in telling if re.fullmatch(r"\d+g", word)]
    forms = [word for word in telling if word in {"sxm", "pcie", "nvl"}]
    rest = "".join(word for word in telling if word not in {*sizes, *forms})
    return (rest, *sorted({*forms}), *sorted({*sizes}))


@cache
def _word_spellings(gpu: Gpu) -> frozenset[tuple[str, ...]]:
    return frozenset(map(_words, (*gpu.aliases, *_complete_names(gpu), *gpu.reported_names)))


class SizedName(Struct, frozen=True, kw_only=True):
    """A name such as `A100-80GB` split into `A100-`, 80 and `GB`."""

    whole: str
    base: str
    size: float | None
    """None where the name ends in no size."""
    unit: str

    @property
    def label_gb(self) -> float | None:
        """The size where its unit is that of a GPU's label."""
        return self.size if self.unit.upper() in {"G", "GB", "GIB"} else None


def split_size(name: str) -> SizedName:
    """Split a name at the memory size it ends in.

    A size must follow a letter or a separator: in RTX409024G nothing says where the model's number ends.
    """
    whole = name.strip()
    size = r"(?P<base>.*?[-_\s]|.*[A-Za-z])(?P<size>\d+(?:\.\d+)?)\s*(?P<unit>[KMGT]i?B?)"
    match = re.fullmatch(size, whole, re.IGNORECASE)
    if match is None:
        return SizedName(whole=whole, base=whole, size=None, unit="")
    return SizedName(whole=whole, base=match["base"], size=float(match["size"]), unit=match["unit"])


def find(name: str, known: Catalogue) -> Gpu:
    """Return the GPU that a name means.

    Raises:
        InputError: no GPU or more than one is called so, it has no such memory size, or it is not a CUDA device.
    """
    matches = known.called(name)
    if len(matches) > 1:
        raise InputError(f"{name!r} comes with different memory.", to_fix=f"say which: {_listed(matches)}")
    if not matches and (sizes := known.sizes(name)):
        raise InputError(f"there is no {name!r}.", to_fix=f"the sizes there are: {_listed(sizes)}")
    if not matches:
        raise InputError(
            f"{name!r} is not a known GPU.",
            to_fix=f"the nearest known names are {nearest(name, known.names)}; or describe a new one as NAME-48G:"
            f"KEY=VALUE,... or in a .yaml file, with the keys {', '.join(FIGURE_NAMES)}",
        )
    if matches[0].platform != "cuda":
        raise InputError(
            f"{matches[0].name} is known, but autofit has no measured memory model for "
            f"{matches[0].platform.upper()} devices yet.",
            to_fix="plan for an NVIDIA GPU",
        )
    return matches[0]


def device(gpu: Gpu, given: Figures | None = None) -> Device:
    """Return the device to plan for; figures that the user gave replace the catalogue's."""
    own = {name: value for name in FIGURE_NAMES if (value := getattr(given, name, None)) is not None}
    figures = replace(gpu.figures, **own)
    if figures.usable_mib is None:
        raise InputError(f"the memory of {gpu.name} is not known.", to_fix="give it as usable_mib=...")
    capability = parse_capability(figures.compute_capability)
    return Device(
        name=gpu.name,
        kind="cuda",
        memory_bytes=figures.usable_mib * MIB,
        memory_is_estimated=gpu.usable_from != "torch" and "usable_mib" not in own,
        compute_capability=capability,
        computes_bf16=capability >= FIRST_WITH_BF16 if capability else figures.bf16_tflops is not None,
        bf16_flops_per_second=_scaled(figures.bf16_tflops, 1e12),
        fp16_flops_per_second=_scaled(figures.fp16_tflops, 1e12),
        fp32_flops_per_second=_scaled(figures.fp32_tflops, 1e12),
        tf32_flops_per_second=_scaled(figures.tf32_tflops, 1e12),
        memory_bytes_per_second=_scaled(figures.bandwidth_gb_s, 1e9),
        peer_bytes_per_second=_scaled(figures.peer_gb_s, 1e9),
        host_bytes_per_second=_scaled(figures.host_gb_s, 1e9),
        dollars_per_hour=figures.dollars_per_hour,
        price_origin="as given" if "dollars_per_hour" in own or not gpu.price_sources else None,
        sources=(*gpu.sources, *gpu.price_sources, *([f"given: {', '.join(own)}"] if own else [])),
    )


def parse_capability(text: str | None) -> tuple[int, int] | None:
    """Read a CUDA compute capability such as `12.0`.

    Raises:
        InputError: it is not two numbers with a point between.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)\.(\d+)", text)
    if match is None:
        raise InputError(f"{text!r} is not a CUDA compute capability.", to_fix="write it as 8.6 or 12.0")
    return int(match[1]), int(match[2])


def _scaled(figure: float | None, factor: float) -> float | None:
    return None if figure is None else figure * factor


def _complete_names(gpu: Gpu) -> tuple[str, ...]:
    sized = tuple(f"{alias}-{gpu.label_gb}G" for alias in gpu.aliases if split_size(alias).size is None)
    return (gpu.name, *sized)


def _spellings(gpu: Gpu) -> frozenset[str]:
    return frozenset(fold(name) for name in (*gpu.aliases, *_complete_names(gpu), *gpu.reported_names))


def _listed(gpus: Iterable[Gpu]) -> str:
    return ", ".join(min(_complete_names(gpu), key=len) for gpu in gpus)
