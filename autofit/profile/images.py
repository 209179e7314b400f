"""The images of a batch, as a processor of the model would make them, found from its config and its own code.

A model says how many tokens an image becomes by running: `get_image_features` is called on fake images of the shapes
that its signature and config admit, and what gives the tokens that were asked for is taken.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers
from msgspec import Struct, field
from msgspec.structs import replace
from torch import nn
from torch.utils import _pytree as pytree

from autofit.errors import InputError
from autofit.profile.known import KnownValues
from autofit.profile.parts import base_model, language_model

MAX_ASPECT_RATIO = 200
"""Source: transformers/models/qwen2_vl/image_processing_qwen2_vl.py 5.23, smart_resize."""
USUAL_IMAGE_TOKENS = 64
"""Tried where an image may become any number; of several images, none becomes fewer."""
GRID, SIZES = "image_grid_thw", "image_sizes"
"""What a model is told of its images: frames, rows and columns of patches; or height and width in pixels."""
_CHANNELS = 3
_MERGES = (2, 1, 4, 3)
"""Patches along a side that become one token, where a config does not say."""
_ID_NAMES = ("image_token_id", "image_token_index")


class Images(Struct, frozen=True, kw_only=True):
    """The images of one sequence."""

    num_images: int = 1
    pixels_shape: tuple[int, ...]
    """Of one image's `pixel_values`, without a dimension that counts images."""
    is_row: bool = False
    """Whether the first dimension counts patches, and images lie one after another in it."""
    by_sequence: bool = False
    """Whether `pixel_values` has a dimension for sequences before that for their images."""
    fills: bool = False
    """Whether its size was chosen for the tokens asked for; otherwise there are as many images as it takes."""
    integers: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """What else the model reads of each image, by the name of its argument."""

    def inputs(self, num_sequences: int, known: KnownValues) -> dict[str, torch.Tensor]:
        """Make the images of a micro-batch; their values are known, as some models look for empty ones."""
        total = num_sequences * self.num_images
        if self.by_sequence:
            shape = (num_sequences, self.num_images, *self.pixels_shape)
        elif self.is_row:
            shape = (total * self.pixels_shape[0], *self.pixels_shape[1:])
        else:
            shape = (total, *self.pixels_shape)
        with known.making(known=True):
            pixels = torch.ones(shape)
        return {"pixel_values": pixels, **{name: torch.tensor([row] * total) for name, row in self.integers.items()}}


def image_token_id(config: Any) -> int | None:
    """Return the id that stands for an image's tokens in a sequence."""
    return next((value for name in _ID_NAMES if isinstance(value := getattr(config, name, None), int)), None)


def find_images(model: nn.Module, image_tokens: int, known: KnownValues) -> Images:
    """Find images that become so many tokens of a sequence; call it under a FakeTensorMode and `known`.

    Raises:
        InputError: the model takes no images, none of its images become as many tokens, or how its images are made is
            not known.
    """
    base = base_model(model)
    if not _takes_images(base):
        raise InputError(
            f"{type(base).__name__} takes no images that become tokens of the sequence, and image_tokens is "
            f"{image_tokens}",
            to_fix="leave image_tokens out, or choose a vision-language model",
        )
    failures: list[str] = []
    fixed: set[int] = set()
    for candidate in _candidates(base, image_tokens):
        tokens = _num_tokens(base, candidate, known, failures)
        if tokens == image_tokens // candidate.num_images:
            return candidate
        if tokens and not candidate.fills:
            if image_tokens % tokens == 0:
                return replace(candidate, num_images=image_tokens // tokens)
            fixed.add(tokens)
    raise _refusal(base, image_tokens, fixed, failures)


def usual_image_tokens(model: nn.Module, known: KnownValues) -> int | None:
    """Return a number of tokens that an image of the model becomes, None where it is not known how one is made."""
    base = base_model(model)
    if not _takes_images(base):
        return None
    counted = (
        (candidate.num_images, _num_tokens(base, candidate, known, []))
        for candidate in _candidates(base, USUAL_IMAGE_TOKENS)
    )
    return next((num_images * tokens for num_images, tokens in counted if tokens), None)


def _takes_images(base: Any) -> bool:
    has_pixels = "pixel_values" in inspect.signature(base.forward).parameters
    return hasattr(base, "get_image_features") and has_pixels and image_token_id(base.config) is not None


def _refusal(base: Any, image_tokens: int, fixed: set[int], failures: Sequence[str]) -> InputError:
    """Say which numbers an image can become, or that nobody knows how one is made."""
    name = type(base).__name__
    if fixed:
        near = {max(1, image_tokens // each + more) * each for each in fixed for more in (0, 1)}
        return InputError(
            f"an image of {name} becomes {' or '.join(map(str, sorted(fixed)))} tokens, and image_tokens is "
            f"{image_tokens}",
            to_fix=f"give a whole number of images, for instance {', '.join(map(str, sorted(near)))}",
        )
    if _rectangle(image_tokens) is None and {GRID, SIZES} & {*_arguments(base)}:
        near = set(itertools.islice((number for number in _outwards(image_tokens) if _rectangle(number)), 2))
        return InputError(
            f"no image of {name} becomes {image_tokens} tokens: they are rows and columns of patches, none more than "
            f"{MAX_ASPECT_RATIO} times as long as the other",
            to_fix=f"the nearest numbers that can be are {' and '.join(map(str, sorted(near)))}",
        )
    return InputError(
        f"how a processor makes images for {name} is not known (transformers {transformers.__version__}): "
        + (failures[-1] if failures else "its config names no size of an image"),
        to_fix="plan with text alone (image_tokens 0)",
    )


def _outwards(number: int) -> Iterator[int]:
    for away in range(1, number):
        yield from (number - away, number + away)


def _arguments(base: Any) -> list[str]:
    """What the features of images are made of; the inner model's own signature names all of it."""
    inner: Any = getattr(base, "model", None)
    owner = inner if hasattr(inner, "get_image_features") else base
    return list(inspect.signature(owner.get_image_features).parameters)


def _candidates(base: Any, image_tokens: int) -> Iterator[Images]:
    """Images that the signature of the model's features and its config admit."""
    arguments = _arguments(base)
    if GRID in arguments:
        yield from _grids(base, image_tokens)
        return
    yield from _of_fixed_size(base)
    if SIZES in arguments:
        yield from _of_any_size(base, image_tokens)


def _grids(base: Any, image_tokens: int) -> Iterator[Images]:
    """Images as rows of patches, with a grid that says how they lie; one of any size for each sequence."""
    for merge, (rows, columns) in _merged_rectangles(base, image_tokens):
        grid = (1, rows * merge, columns * merge)
        for patch in _patch_shapes(base):
            yield Images(pixels_shape=(math.prod(grid), *patch), is_row=True, fills=True, integers={GRID: grid})


def _of_fixed_size(base: Any) -> Iterator[Images]:
    """Images of the config's resolution; where it lists sizes, cut into tiles, and the whole beside them."""
    side, channels = _side(base.config), _channels(base.config)
    if side is None:
        return
    for height, width in getattr(base.config, "image_grid_pinpoints", None) or []:
        tiles = 1 + (height // side[0]) * (width // side[1])
        yield Images(pixels_shape=(tiles, channels, *side), integers={SIZES: (height, width)})
    yield Images(pixels_shape=(channels, *side))
    yield Images(pixels_shape=(channels, *side), by_sequence=True)


def _of_any_size(base: Any, image_tokens: int) -> Iterator[Images]:
    """As few images as it takes, none larger than the config's resolution."""
    side, channels = _side(base.config), _channels(base.config)
    patch = getattr(_vision_config(base.config), "patch_size", None)
    if not isinstance(patch, int):
        return
    most = max(1, image_tokens // USUAL_IMAGE_TOKENS)
    for num_images in (number for number in range(1, most + 1) if image_tokens % number == 0):
        for merge, (rows, columns) in _merged_rectangles(base, image_tokens // num_images):
            size = (rows * merge * patch, columns * merge * patch)
            if side is None or max(size) <= max(side):
                shape = (channels, *size)
                yield Images(num_images=num_images, pixels_shape=shape, fills=True, integers={SIZES: size})


def _vision_config(config: Any) -> Any:
    return getattr(config, "vision_config", config)


def _channels(config: Any) -> int:
    return int(getattr(_vision_config(config), "num_channels", _CHANNELS))


def _side(config: Any) -> tuple[int, int] | None:
    """Height and width that images are brought to, where a config says."""
    size = getattr(_vision_config(config), "image_size", None)
    if isinstance(size, int):
        return size, size
    return (int(size[0]), int(size[1])) if isinstance(size, (list, tuple)) and len(size) == 2 else None


def _merged_rectangles(base: Any, num_tokens: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """Patches along a side that become one token, first as the config says, and an image's tokens as a rectangle."""
    named = [getattr(part, "spatial_merge_size", None) for part in (_vision_config(base.config), base.config)]
    rectangle = _rectangle(num_tokens)
    if rectangle is not None:
        for merge in dict.fromkeys([*(merge for merge in named if isinstance(merge, int)), *_MERGES]):
            yield merge, rectangle


def _rectangle(num_tokens: int) -> tuple[int, int] | None:
    """Rows and columns of the image nearest to a square; None where it would be too long for a processor."""
    rows = next(rows for rows in range(math.isqrt(num_tokens), 0, -1) if num_tokens % rows == 0)
    return (rows, num_tokens // rows) if num_tokens // rows < MAX_ASPECT_RATIO * rows else None


def _patch_shapes(base: Any) -> list[tuple[int, ...]]:
    """How a processor may lay out one patch, from the first layer that reads patches."""
    text = set(language_model(base).modules())
    others = [module for module in base.modules() if module not in text]
    convolution = next((module for module in others if isinstance(module, (nn.Conv2d, nn.Conv3d))), None)
    if convolution is not None:
        shape = tuple(convolution.weight.shape[1:])
        return [(math.prod(shape),), shape]
    linear = next((module for module in others if isinstance(module, nn.Linear)), None)
    return [(linear.in_features,)] if linear is not None else []


def _num_tokens(base: Any, candidate: Images, known: KnownValues, failures: list[str]) -> int | None:
    """Return how many tokens one image becomes, None where the model does not take it."""
    inputs = replace(candidate, num_images=1).inputs(1, known)
    try:
        with torch.no_grad():
            features = base.get_image_features(**inputs)
    except Exception as error:  # noqa: BLE001 - a model refuses shapes in its own way
        failures.append(" ".join(f"{type(error).__name__}: {error}".split())[:200])
        return None
    found = getattr(features, "pooler_output", features)
    leaves = [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, torch.Tensor)]
    return sum(leaf.numel() for leaf in leaves) // int(base.get_input_embeddings().weight.shape[1])
