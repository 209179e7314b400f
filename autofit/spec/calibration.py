"""What the runs of a machine have taught about predictions: three corrections, each with how sure it is."""

from __future__ import annotations

from msgspec import Struct

from autofit.spec.estimate import Stages


class Correction(Struct, frozen=True, kw_only=True):
    """How a predicted figure is corrected: what is added to it, as a share of it."""

    applied_fraction: float = 0.0
    """What is added; 0: the figure stays."""
    estimate_fraction: float = 0.0
    """The estimate that it comes from."""
    uncertainty_fraction: float = 0.0
    """Standard deviation of the estimate, of its logarithm."""
    num_runs: int = 0
    """Runs that say something about it."""

    @property
    def factor(self) -> float:
        """What predictions are multiplied by."""
        return 1 + self.applied_fraction


class Calibration(Struct, frozen=True, kw_only=True):
    """Corrections for one kind of device and one set of library versions."""

    device_name: str
    """As the cluster names its devices; CPU ranks are `CPU`, whatever their budget."""
    versions: dict[str, str]
    """Of the libraries that are traced, without what follows a plus sign (+cpu, +cu128)."""
    num_runs: int
    """Runs that any of the corrections comes from."""
    static: Correction
    """Of what is allocated between two steps: weights, optimizer state, buffers."""
    per_token: Correction
    """Of what grows with the tokens of a micro-batch: activations, inputs and outputs."""
    time: Correction
    """Of the time of a step."""

    def __hash__(self) -> int:
        """Return a hash: a dictionary has none."""
        return hash((self.device_name, tuple(self.versions), self.static, self.per_token, self.time))


class Uncalibrated(Struct, frozen=True, kw_only=True):
    """The figures of a calibrated plan as they are without the calibration."""

    peak_allocated_bytes: int
    after_step_allocated_bytes: int | None
    token_bytes: int | None
    """What of the peak grows with the tokens of a micro-batch."""
    needed_bytes: int
    step_seconds: float | None
    stages: Stages | None = None
    """What the run needs outside its steady steps; None: not known."""


def plain_versions(versions: dict[str, str]) -> dict[str, str]:
    """Leave out of each version what names a build (PEP 440, local version identifiers)."""
    return {name: version.partition("+")[0] for name, version in sorted(versions.items())}


def calibrated_device_name(name: str, kind: str) -> str:
    """Name the device that a calibration holds for: a CPU rank's budget is no property of the machine."""
    return "CPU" if kind == "cpu" else name
