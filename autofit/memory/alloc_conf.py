"""PYTORCH_ALLOC_CONF: the caching allocator's options as an environment variable, written and read."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from autofit.errors import InputError
from autofit.spec.configuration import Configuration
from autofit.spec.hardware import Device

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Both are written, with one value: torch before 2.9 reads only the second; of two, releases differ in which wins.

Source: torch v2.13 c10/core/AllocatorConfig.h (the first has priority) and c10/cuda/CUDAAllocatorConfig.h (the second).
"""
MIN_SPLIT_SIZE_MB = 20
"""torch refuses less. Source: torch v2.13 c10/core/AllocatorConfig.cpp, parseMaxSplitSize."""
WITHOUT_EFFECT = frozenset(
    {
        "garbage_collection_threshold",
        "pinned_use_background_threads",
        "pinned_use_cuda_host_register",
        "pinned_num_register_threads",
        "pinned_reserve_segment_size_mb",
        "pinned_max_round_threshold_mb",
        "pinned_max_cached_size_mb",
        "pinned_free_catch_all",
        "release_lock_on_cudamalloc",
        "graph_capture_record_stream_reuse",
        "throw_on_cudamalloc_oom",
    }
)
"""Options that do not change what is reserved on the device.

They are about host memory, locks or graphs; and cached blocks are only collected where a memory fraction is set too.
Source: torch v2.13 c10/cuda/CUDACachingAllocator.cpp, malloc and setMemoryFraction.
"""


class UserSetting(Struct, frozen=True, kw_only=True):
    """What the user's environment says about the allocator."""

    variable: str
    text: str
    expandable_segments: bool
    max_split_size_mb: int | None

    def agrees_with(self, configuration: Configuration) -> bool:
        """Whether a configuration was planned with it."""
        planned = (configuration.expandable_segments, configuration.max_split_size_mb)
        return planned == (self.expandable_segments, self.max_split_size_mb)


def alloc_conf(configuration: Configuration) -> str | None:
    """Write a configuration's options as torch reads them; None where all are torch's own defaults."""
    options = []
    if configuration.expandable_segments:
        options.append("expandable_segments:True")
    if configuration.max_split_size_mb is not None:
        options.append(f"max_split_size_mb:{configuration.max_split_size_mb}")
    return ",".join(options) or None


def alloc_conf_variables(configuration: Configuration) -> dict[str, str]:
    """Return the environment variables that put a configuration's options into effect; none for torch's defaults."""
    text = alloc_conf(configuration)
    return {} if text is None else dict.fromkeys(VARIABLES, text)


def user_setting(environment: Mapping[str, str]) -> UserSetting | None:
    """Read what the user has set; None if nothing.

    Raises:
        InputError: two variables contradict each other, or an option changes what is reserved and is not modelled.
    """
    found = {name: environment[name] for name in VARIABLES if environment.get(name)}
    if not found:
        return None
    if len(set(found.values())) > 1:
        raise InputError(
            f"{' and '.join(f'{name}={text}' for name, text in found.items())} contradict each other.",
            to_fix=f"set only {VARIABLES[0]}; torch before 2.9 reads {VARIABLES[1]}",
        )
    name, text = next(iter(found.items()))
    options = _options(name, text)
    return UserSetting(
        variable=name,
        text=text,
        expandable_segments=options.get("expandable_segments", "False") == "True",
        max_split_size_mb=_megabytes(name, options.get("max_split_size_mb")),
    )


def refuse_other_setting(configuration: Configuration, environment: Mapping[str, str]) -> None:
    """Refuse to start a plan that relies on options which the user's environment sets otherwise.

    A plan with torch's defaults runs with whatever the user has set.

    Raises:
        InputError: the two differ; or see `user_setting`.
    """
    if alloc_conf(configuration) is None:
        return
    user = user_setting(environment)
    if user is not None and not user.agrees_with(configuration):
        raise InputError(
            f"the plan was made for {VARIABLES[0]}={alloc_conf(configuration)}; set is {user.variable}={user.text}.",
            to_fix=f"unset {user.variable}, or plan again with what it says",
        )


def expandable_segments_problem(device: Device, *, is_linux: bool = True, is_wsl: bool = False) -> str | None:
    """Say why a device cannot have segments that grow; None if it can.

    torch asks for no compute capability: CUDA's virtual memory management is there on every 64-bit Linux. Windows
    builds of torch leave it out. Under WSL the driver refuses the calls on some machines and passes for out of memory.
    Source: torch v2.13 c10/cuda/CUDAAllocatorConfig.h, `expandable_segments`; pytorch/pytorch#192330.
    """
    if device.kind != "cuda":
        return f"{device.name} has no caching allocator"
    if not is_linux:
        return "torch has expandable_segments on Linux only"
    if is_wsl:
        return "under WSL the driver refuses expandable_segments on some machines (pytorch/pytorch#192330)"
    return None


def refuse_small_split_size(max_split_size_mb: int | None) -> None:
    """Refuse what torch refuses when it starts.

    Raises:
        InputError: fewer than 20 MiB.
    """
    if max_split_size_mb is not None and max_split_size_mb < MIN_SPLIT_SIZE_MB:
        raise InputError(
            f"max_split_size_mb is {max_split_size_mb}; torch takes no less than {MIN_SPLIT_SIZE_MB}.",
            to_fix=f"give {MIN_SPLIT_SIZE_MB} or more, or leave it out",
        )


def _options(name: str, text: str) -> dict[str, str]:
    """Split `key:value,key:value`.

    Raises:
        InputError: it is not of that form, or an option that changes what is reserved is not modelled.
    """
    options = {}
    for part in text.replace(" ", "").split(","):
        key, colon, value = part.partition(":")
        if not colon or key not in {"expandable_segments", "max_split_size_mb", "backend", *WITHOUT_EFFECT}:
            raise InputError(
                f"{name}={text}: what {key!r} makes torch reserve is not modelled.",
                to_fix=f"leave {key!r} out of it; modelled are expandable_segments and max_split_size_mb",
            )
        options[key] = value
    if options.get("backend", "native") != "native":
        raise InputError(
            f"{name}={text}: what CUDA's own allocator reserves is not modelled.",
            to_fix=f"unset {name}, or choose backend:native",
        )
    if options.get("expandable_segments", "False") not in {"True", "False"}:
        raise InputError(f"{name}={text}: expandable_segments is True or False.", to_fix=f"correct {name}")
    return options


def _megabytes(name: str, text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isdigit():
        raise InputError(f"{name}: max_split_size_mb:{text} is not a whole number.", to_fix=f"correct {name}")
    refuse_small_split_size(int(text))
    return int(text)
