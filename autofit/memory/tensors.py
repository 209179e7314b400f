"""The parameters and buffers of the real model, one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby

from autofit.spec.profile import RegimeProfile, StaticTensor
from autofit.units import BYTES_PER_ELEMENT

_OTHER_DTYPES = {"bool": 1, "int64": 8, "int32": 4, "float64": 8, "int16": 2}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the real model."""

    num_elements: int
    bytes_per_element: int
    trains: bool
    embeds: bool
    kind: str
    rows: int = 1
    """First dimension, 1 for a vector or scalar."""
    columns: int = 0
    """Last dimension, 0 where it is what is left of the first."""
    outside_linear: bool = False
    """Whether it is a matrix of a module that is neither nn.Linear nor nn.Embedding."""
    num_bytes: int = field(init=False, repr=False, compare=False)
    """Without an allocator's rounding; asked for a hundred thousand times in a search."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_bytes", self.num_elements * self.bytes_per_element)

    @property
    def is_matrix(self) -> bool:
        """Whether it has two dimensions or more."""
        return self.rows > 1 or self.columns not in {0, self.num_elements}

    @property
    def row_sums(self) -> int:
        """Elements of a sum over the last dimension."""
        return self.num_elements // self.columns if self.columns else self.rows

    @property
    def column_sums(self) -> int:
        """Elements of a sum over the dimension before the last."""
        columns = self.columns or self.num_elements // self.rows
        return self.rows * columns if self.rows * columns < self.num_elements else columns


def tensors(profile: RegimeProfile) -> tuple[Tensor, ...]:
    """Every parameter and buffer of the real model, layer by layer."""
    made = {id(tensor): _tensor(tensor) for tensor in profile.tensors}
    return tuple(made[id(tensor)] for tensor, _ in in_model_order(profile))


def in_model_order(profile: RegimeProfile) -> Iterator[tuple[StaticTensor, int | None]]:
    """Every parameter, then every buffer, in the order of the model's modules, with the layer it is one of, if any."""
    for repeats, group in groupby(profile.tensors, key=lambda tensor: tensor.repeats):
        members = list(group)
        layers = range(profile.num_layers) if repeats else (None,)
        yield from ((tensor, layer) for layer in layers for tensor in members)


def num_bytes_of(tensor: StaticTensor) -> int:
    """Bytes of one such tensor, without an allocator's rounding."""
    return _tensor(tensor).num_bytes


def _tensor(tensor: StaticTensor) -> Tensor:
    size = BYTES_PER_ELEMENT.get(tensor.dtype) or _OTHER_DTYPES[tensor.dtype]
    return Tensor(
        tensor.num_elements,
        size,
        tensor.trains,
        tensor.embeds,
        tensor.kind,
        rows=tensor.rows,
        columns=tensor.columns,
        outside_linear=tensor.outside_linear,
    )
