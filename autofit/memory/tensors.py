"""The parameters and buffers of the real model, one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache
from itertools import groupby

from msgspec import Struct
from msgspec.structs import force_setattr

from autofit.spec.profile import RegimeProfile, StaticTensor
from autofit.units import BYTES_PER_ELEMENT

PARAMETER_KINDS = frozenset({"parameter", "adapter", "quantized"})
_OTHER_DTYPES = {"bool": 1, "int64": 8, "int32": 4, "float64": 8, "int16": 2}


class Tensor(Struct, frozen=True):
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
    loaded_in_fp32: bool = False
    """Whether transformers loads it in fp32, though an engine gathers it in 16 bits."""
    num_bytes: int = 0
    """Without an allocator's rounding; asked for a hundred thousand times in a search."""

    def __post_init__(self) -> None:
        force_setattr(self, "num_bytes", self.num_elements * self.bytes_per_element)

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


class Model(tuple[Tensor, ...]):  # noqa: SLOT001 - it keeps what it has worked out
    """Tensors in the order of a model's modules. Layers that are alike share theirs: most sums take each one once."""

    @cached_property
    def counted(self) -> tuple[tuple[Tensor, int], ...]:
        """Each tensor once, with how many of it there are."""
        by_id = {id(tensor): tensor for tensor in self}
        return tuple((by_id[key], count) for key, count in Counter(map(id, self)).items())

    @cached_property
    def parameters(self) -> Model:
        """Parameters, adapters and packed weights."""
        return Model(tensor for tensor in self if tensor.kind in PARAMETER_KINDS)

    @cached_property
    def trained(self) -> Model:
        """Those that train."""
        return Model(tensor for tensor in self if tensor.trains)

    @cached_property
    def _hash(self) -> int:
        return super().__hash__()

    def __hash__(self) -> int:
        """Return the tuple's hash, worked out once."""
        return self._hash


def as_model(tensors: Iterable[Tensor]) -> Model:
    """Return tensors as a model's."""
    return tensors if isinstance(tensors, Model) else Model(tensors)


def tensors(profile: RegimeProfile) -> Model:
    """Every parameter and buffer of the real model, layer by layer."""
    found: list[Tensor] = []
    for num_layers, members in _in_groups(profile):
        found += [_tensor(tensor) for tensor in members] * (1 if num_layers is None else num_layers)
    return Model(found)


def in_model_order(profile: RegimeProfile) -> Iterator[tuple[StaticTensor, int | None]]:
    """Every parameter, then every buffer, in the order of the model's modules, with the layer it is one of, if any."""
    for num_layers, members in _in_groups(profile):
        layers = (None,) if num_layers is None else range(num_layers)
        yield from ((tensor, layer) for layer in layers for tensor in members)


def _in_groups(profile: RegimeProfile) -> Iterator[tuple[int | None, list[StaticTensor]]]:
    """What comes once in every layer, with the number of layers, and what does not."""
    for repeats, group in groupby(profile.tensors, key=lambda tensor: tensor.repeats):
        yield profile.num_layers if repeats else None, list(group)


def num_bytes_of(tensor: StaticTensor) -> int:
    """Bytes of one such tensor, without an allocator's rounding."""
    return _tensor(tensor).num_bytes


def _tensor(tensor: StaticTensor) -> Tensor:
    size = BYTES_PER_ELEMENT.get(tensor.dtype) or _OTHER_DTYPES[tensor.dtype]
    return _interned(
        tensor.num_elements,
        size,
        tensor.trains,
        tensor.embeds,
        tensor.kind,
        rows=tensor.rows,
        columns=tensor.columns,
        outside_linear=tensor.outside_linear,
        loaded_in_fp32=tensor.loaded_in_fp32,
    )


_interned = lru_cache(maxsize=4096)(Tensor)
"""Equal tensors are one object, so that models of a few hundred layers compare at once."""
