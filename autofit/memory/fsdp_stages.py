"""What FSDP needs outside the steady steps: while accelerate shards the model, in an evaluation, and while saving.

Figures are of one process: its device's, and its share of the host's. Sources, unless said otherwise: accelerate 1.15
accelerator.py (`prepare_model`, `_prepare_fsdp2`, `get_state_dict`) and utils/fsdp_utils.py (`fsdp2_prepare_model`,
`fsdp2_load_full_state_dict`, `save_fsdp_model`, `save_fsdp_optimizer`); torch v2.13 distributed/fsdp/ for FSDP1,
distributed/checkpoint/state_dict.py and distributed/_state_dict_utils.py for FSDP2.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from msgspec import Struct
from msgspec.structs import replace

from autofit.memory.evaluation import EngineForward
from autofit.memory.fsdp_script import forward_in_evaluation
from autofit.memory.fsdp_units import (
    MASTER_BYTES,
    Sharded,
    Units,
    between_steps,
    make_units,
    num_shards,
    sharded,
)
from autofit.memory.host import fsdp_buffers
from autofit.memory.optimizers import OPTIMIZERS, State
from autofit.memory.static import optimizer_bytes
from autofit.memory.tensors import Tensor
from autofit.spec.configuration import Configuration
from autofit.spec.profile import RegimeProfile

NUM_GATHERED_SHARDS = 2
"""While FSDP1 gathers a second state of a unit, its shard is joined beside the one that was sent before.

Source: torch v2.13 distributed/fsdp/_optim_utils.py, _allgather_orig_param_states (`local_shard`)."""


class Held(Struct, frozen=True, kw_only=True):
    """What one process holds at most."""

    device: int
    host: int = 0
    """Of every process."""
    first_process: int = 0
    """Of the host, for the first process besides."""


@dataclass(frozen=True)
class FsdpStages:
    """Works the stages of one configuration out."""

    configuration: Configuration
    profile: RegimeProfile
    """As FSDP runs it; see `adapter_casts`."""

    @cached_property
    def units(self) -> Units:
        """What is gathered together."""
        return make_units(self.configuration, self.profile)

    @cached_property
    def parameters(self) -> list[Sharded]:
        """What is sharded."""
        return sharded(self.configuration, self.profile)

    @property
    def is_second(self) -> bool:
        """Whether it is FSDP2."""
        return self.configuration.sharding == "fsdp2"

    @property
    def offloads(self) -> bool:
        """Whether shards are the host's."""
        return self.configuration.offload != "none"

    @property
    def is_quantized(self) -> bool:
        """Whether the model was loaded on the device, packed."""
        return self.configuration.quantization is not None

    def forward(self) -> EngineForward:
        """What FSDP does around an evaluation's forward pass."""
        return forward_in_evaluation(self.configuration, self.profile, self.units)

    def preparing(self) -> Held:
        """While accelerate shards the model, up to where every process has its shards in the dtype that is stored."""
        held = self._preparing_second() if self.is_second else self._preparing_first()
        return replace(held, device=held.device + sum(self.units.replicated.values()))

    def _preparing_second(self) -> Held:
        """Every process makes what trains fp32 on its host; then the first one's parameters are sent, one by one.

        The whole model stays in the host memory of every process until the last of its shards is there, for a state
        dict names it. A model in four bits is on every device already, and stays there beside all of its shards.
        """
        parameters = self.parameters
        shards = sum(each.shard for each in parameters)
        if self.is_quantized:
            whole = sum(each.loaded for each in parameters)
            largest = max((each.shard for each in parameters), default=0)
            if self.offloads:  # a shard is copied to the host, and then into pinned memory
                return Held(device=whole + largest, host=shards + largest)
            return Held(device=whole + shards)
        device = done = 0
        for each in parameters:
            device = max(device, done + each.whole + each.shard)
            done += 0 if self.offloads else each.shard
        host = sum(each.loaded for each in parameters)
        highest = host
        for each in parameters:
            if each.whole != each.loaded:
                highest = max(highest, host + each.whole)
                host += each.whole - each.loaded
        return Held(device=device, host=max(highest, host + (shards if self.offloads else 0)))

    def _preparing_first(self) -> Held:
        """Layer by layer, then all else: parameters come to the device, are flattened beside themselves, and cut.

        Shards that were loaded in 16 bits then become fp32; the old ones stay, for the model's own parameters are views
        of them until the first forward.
        Source: torch v2.13 distributed/fsdp/_init_utils.py, `_init_param_handle_from_module`; _flat_param.py, `shard`,
        `_use_sharded_views`.
        """
        units = self._wrapped()
        loaded = [sum(each.loaded for each in unit) for unit in units]
        shards = [sum(each.shard_elements * each.loaded_bytes for each in unit) for unit in units]
        waiting, done, device, host = sum(loaded), 0, 0, 0
        for whole, shard in zip(loaded, shards, strict=True):
            on_host = (0 if self.is_quantized else waiting) + (done if self.offloads else 0)
            on_device = (waiting - whole if self.is_quantized else 0) + (0 if self.offloads else done)
            device, host = max(device, on_device + 2 * whole + shard), max(host, on_host)
            waiting, done = waiting - whole, done + shard
        stored = [sum(each.shard for each in unit) for unit in units]
        converted = done + sum(each for each, shard in zip(stored, shards, strict=True) if each != shard)
        if self.offloads:
            return Held(device=device, host=max(host, converted))
        return Held(device=max(device, converted), host=host)

    def _wrapped(self) -> list[list[Sharded]]:
        """FSDP1's units in the order in which they are wrapped: what lies within a layer before it, the root last."""
        units: dict[str, list[Sharded]] = {}
        for each in self.parameters:
            units.setdefault(each.unit, []).append(each)
        return [*units.values()]

    def host_in_first_step(self) -> int:
        """Host memory of a process in its first step, where everything is offloaded: FSDP1 has made no zeros yet.

        Before the optimizer's state is there, FSDP1 has each shard twice: it copies all of them into pinned memory when
        forward begins, and lets go of the first ones unit by unit, when it has freed what it gathered.
        Source: torch v2.13 distributed/fsdp/_flat_param.py, `init_flat_param_attributes`, `_use_sharded_flat_param`.
        """
        device, units = self.profile.regime.device, self.units
        parts = [part for unit in units.all() for part in unit.parts]
        shards = [part.shard for part in parts]
        optimizer = optimizer_bytes(units.state, self.configuration.optim, "cpu")
        gradients = [part.kept for part in parts] if self.is_second else shards
        again = 0 if self.is_second else sum(shards)
        return fsdp_buffers(shards, gradients, max(again, optimizer.state + optimizer.step)).num_bytes(device)

    def host_between_steps(self) -> int:
        """Host memory of a process between two steps, where everything is offloaded, once it has evaluated.

        FSDP2 has let go of its gradients, whose pinned memory torch keeps. FSDP1 has them, and zeros of as much: it
        makes those for each unit when it gathers that again, and drops them in a backward pass.
        """
        device = self.profile.regime.device
        parts = [part for unit in self.units.all() for part in unit.parts]
        shards = [part.shard for part in parts]
        state_bytes = optimizer_bytes(self.units.state, self.configuration.optim, "cpu").state
        if self.is_second:
            gradients = [part.kept for part in parts] if device == "cuda" else []
            return fsdp_buffers(shards, gradients, state_bytes).num_bytes(device)
        zeros = sum(part.kept for part in parts)
        return fsdp_buffers(shards, shards, state_bytes + zeros).num_bytes(device)

    def last_gradients(self) -> int:
        """What the device has besides until an evaluation's forward pass, or a save, begins."""
        return sum(between_steps(self.configuration, self.units).values())

    def saving(self) -> Held:
        """While the full state dicts are gathered, of the model and then of the optimizer; above what is always held.

        Both come to the host of the first process, in the dtype that is stored, an adapter's base too.
        """
        return self._saving_second() if self.is_second else self._saving_first()

    def _saving_second(self) -> Held:
        """Parameter by parameter, then state by state. An optimizer without state makes zeros of gradients, and steps.

        Source: torch v2.13 distributed/checkpoint/state_dict.py, `_init_optim_state`.
        """
        ranks = num_shards(self.configuration)
        parameters = self.parameters
        fetched = [each.shard if self.offloads else 0 for each in parameters]
        gathered = max((each.shard * ranks + own for each, own in zip(parameters, fetched, strict=True)), default=0)
        states = [self._state(tensor).device for tensor in self.units.state]
        largest = max((size for sizes in states for size in sizes), default=0)
        gathered = max(gathered, largest * (ranks + self.offloads))
        if not any(states) and not self.offloads:
            optim, device = self.configuration.optim, self.profile.regime.device
            stepping = optimizer_bytes(self.units.state, optim, device, clips=False).step
            gathered = max(gathered, self.units.total("kept") + stepping)
        whole = sum(each.whole for each in parameters) + sum(self.units.replicated.values())
        return Held(device=gathered, first_process=max(whole, ranks * sum(map(sum, states))))

    def _saving_first(self) -> Held:
        """Unit by unit, in the dtype that is stored: on the host the root is there twice, once all is collected.

        A root that an evaluation has gathered in that dtype stays on the device meanwhile; one in another is freed.
        Source: torch v2.13 distributed/fsdp/_unshard_param_utils.py, `_unshard_fsdp_state_params`;
        _state_dict_utils.py, `_full_post_state_dict_hook`; _flat_param.py, `to_cpu`;
        _optim_utils.py, `_allgather_orig_param_states`.
        """
        ranks = num_shards(self.configuration)
        units = self._wrapped()
        wholes = [ranks * sum(each.shard for each in unit) for unit in units]
        root = ranks * sum(each.shard for each in self.parameters if each.unit == "root")
        stays = root if not self.units.root.total("cast") else 0
        gathered = max([root, *(stays + whole for whole in wholes if whole != root)])
        for unit in units:
            flat = sum(each.shard_elements for each in unit if each.trains)
            if flat:
                sizes = self._state(Tensor(flat, MASTER_BYTES, trains=True, embeds=False, kind="parameter")).device
                joined = min(len(sizes), NUM_GATHERED_SHARDS)
                gathered = max(gathered, stays + max(sizes, default=0) * (ranks + joined))
        whole = sum(each.whole for each in self.parameters)
        states = sum(sum(self._state(tensor).device) for tensor in self.units.state)
        return Held(device=gathered, first_process=max(whole + root, ranks * states))

    def _state(self, tensor: Tensor) -> State:
        return OPTIMIZERS[self.configuration.optim].state(tensor)
