"""Plans and estimates from Python: the keywords are the options of the command line, which calls the same functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import replace

from autofit.errors import InputError, NothingFitsError
from autofit.options import (
    DataWish,
    EveryWish,
    RunWish,
    SearchWish,
    for_inference,
    one_of_each,
    refuse_absurd,
    restrictions,
    wishes_of,
)

if TYPE_CHECKING:
    from autofit.calibrate.fit import Fitted
    from autofit.calibrate.records import RunRecord
    from autofit.calibrate.store import Stored
    from autofit.memory.explain import ExplainedPhase, Symbols
    from autofit.plan import Plan
    from autofit.search.compare import Offer
    from autofit.search.nothing_fits import Change
    from autofit.search.whatif import Answer
    from autofit.search.why import Knob
    from autofit.spec.configuration import Configuration, Sharding
    from autofit.spec.hardware import Cluster
    from autofit.spec.job import Job, Model, RunLength, Workload
    from autofit.spec.lengths import Cut, LengthDistribution
    from autofit.spec.profile import ProfileSet, Regime

MOST_TRAINED = 1e18
"""Tokens, or times over a data set: no model has been trained on a hundred-thousandth."""
Progress = Callable[[str, int, int], None]
Display = Callable[[], AbstractContextManager[Progress]]
"""Opens what shows a trace while it runs."""


class Explanation(Struct, frozen=True, kw_only=True):
    """An estimate taken apart."""

    plan: Plan
    """The estimate, made anew."""
    symbols: Symbols
    phases: tuple[ExplainedPhase, ...]
    stored_peak_allocated_bytes: int | None = None
    """What the plan file said, where one was explained: another figure shows its age."""
    knobs: tuple[Knob, ...] | None = None
    """Of a plan file: what each knob's other values come to; none: the plan is not one that a search here would make.
    None: what was explained was not searched."""


class InferenceEstimate(Struct, frozen=True, kw_only=True):
    """What one device needs to generate text. Of a prompt whose length is not said, activations come on top."""

    weights_bytes: int
    """Parameters and buffers, as they are stored."""
    kv_cache_bytes: int
    """Keys and values of every token of every sequence."""
    growth_bytes: int
    """For a moment, while a token is added."""
    prompt_bytes: int | None
    """While the prompt is read: activations, and its keys and values; None where its length was not said."""
    total_bytes: int
    """The most at one time: the weights, and what reading the prompt or adding the last token takes."""
    process_bytes: int | None
    """With cuBLAS workspaces and the CUDA context; None for a CPU rank."""
    budget_bytes: int
    """What the device has."""

    @property
    def fits(self) -> bool:
        """Whether the widest figure is within the budget."""
        return (self.process_bytes or self.total_bytes) <= self.budget_bytes


class MeasuredData(Struct, frozen=True, kw_only=True):
    """How long a data set's sequences are, and what cutting them would lose."""

    lengths: LengthDistribution
    cuts: tuple[Cut, ...]


@contextmanager
def silent() -> Iterator[Progress]:
    """Show nothing."""
    yield lambda _name, _done, _total: None


def make_plan(
    *,
    model: str | Path,
    gpus: str,
    seq_len: int | None = None,
    global_batch: int,
    allow_hub: bool = False,
    **wishes: Any,
) -> Plan:
    """Find the cheapest configuration that fits, as `autofit plan` does.

    Args:
        model: Hub id from the offline catalogue, a local folder, or a config.json.
        gpus: as `--gpus` takes it, for instance `2xA100-80G`.
        seq_len: tokens in every sequence; with `data`, where sequences are cut (None: the longest).
        global_batch: sequences in one optimizer step.
        allow_hub: whether a config.json may be downloaded.
        wishes: the other options of `autofit plan`, with underscores.

    Raises:
        InputError: something given cannot be used; `message` says what, `to_fix` what to do.
        NothingFitsError: no configuration fits.
    """
    job, cluster = planned_job(
        model=model,
        gpus=gpus,
        seq_len=seq_len,
        global_batch=global_batch,
        wishes=wishes_of(SearchWish, wishes),
        allow_hub=allow_hub,
    )
    return solve_job(job, cluster)


def estimate(
    *,
    model: str | Path,
    gpus: str,
    seq_len: int | None = None,
    gradient_accumulation_steps: int = 1,
    allow_hub: bool = False,
    **wishes: Any,
) -> Plan:
    """Estimate one configuration, as `autofit estimate` does: `.memory`, `.time` and `.cost` of what is returned.

    Args:
        model: Hub id from the offline catalogue, a local folder, or a config.json.
        gpus: as `--gpus` takes it, for instance `2xA100-80G`.
        seq_len: tokens in every sequence; with `data`, where sequences are cut (None: the longest).
        gradient_accumulation_steps: micro-batches in one step.
        allow_hub: whether a config.json may be downloaded.
        wishes: the other options of `autofit estimate`, with underscores: `method="lora"`, `lora_r=8` ...

    Raises:
        InputError: something given cannot be used; `message` says what, `to_fix` what to do.
    """
    job, cluster = estimated_job(
        model=model,
        gpus=gpus,
        seq_len=seq_len,
        gradient_accumulation_steps=gradient_accumulation_steps,
        wishes=wishes_of(EveryWish, wishes),
        allow_hub=allow_hub,
    )
    return estimate_job(job, cluster)


def explain(
    plan: str | Path | None = None,
    *,
    model: str | Path | None = None,
    gpus: str | None = None,
    seq_len: int | None = None,
    gradient_accumulation_steps: int = 1,
    allow_hub: bool = False,
    **wishes: Any,
) -> Explanation:
    """Take an estimate apart, as `autofit explain` does: each term with its formula and source.

    Args:
        plan: a plan.json; or else what `estimate` takes.
        model: see `estimate`, as all that follows.
        gpus: see `estimate`.
        seq_len: see `estimate`.
        gradient_accumulation_steps: see `estimate`.
        allow_hub: see `estimate`.
        wishes: see `estimate`.

    Raises:
        InputError: something given cannot be used; `message` says what, `to_fix` what to do.
    """
    if plan is not None:
        return explain_plan(Path(plan))
    if model is None or gpus is None:
        raise InputError("explain needs a plan.json, or a model, gpus and seq_len.", to_fix="give them")
    job, cluster = estimated_job(
        model=model,
        gpus=gpus,
        seq_len=seq_len,
        gradient_accumulation_steps=gradient_accumulation_steps,
        wishes=wishes_of(EveryWish, wishes),
        allow_hub=allow_hub,
    )
    return explain_job(job, cluster)


def explain_plan(path: Path, display: Display = silent, *, num_cores: int = 1) -> Explanation:
    """Explain the configuration of a plan file, estimated anew.

    Args:
        path: of the plan.
        display: shows how far tracing is.
        num_cores: see `solve_job`.

    Raises:
        InputError: the file is no plan, or its configuration cannot be estimated with what is installed.
    """
    from autofit.plan import load_plan

    stored = load_plan(path)
    job, cluster, configuration = stored.inputs.job, stored.inputs.cluster, stored.configuration
    explained = _explained(job, cluster, configuration, display)
    return replace(
        explained,
        stored_peak_allocated_bytes=stored.memory.peak_allocated_bytes,
        knobs=_knobs(stored, display, num_cores),
    )


def _knobs(stored: Plan, display: Display, num_cores: int) -> tuple[Knob, ...]:
    from autofit.search.solve import required_regimes
    from autofit.search.why import knobs

    job, cluster = stored.inputs.job, stored.inputs.cluster
    try:
        profiles, _ = traceable_of(job.model, required_regimes(job, cluster), job.workload.sequence_tokens, display)
        return knobs(stored, profiles, num_cores=num_cores)
    except InputError:
        return ()


def explain_job(job: Job, cluster: Cluster, display: Display = silent) -> Explanation:
    """Explain the one configuration that a job leaves."""
    return _explained(job, cluster, only_configuration(job, cluster), display)


def _explained(job: Job, cluster: Cluster, configuration: Configuration, display: Display) -> Explanation:
    from autofit.memory.explain import explain_phases, symbols_of
    from autofit.spec.regimes import regime_of

    made, profiles = _estimated(job, cluster, configuration, display)
    profile = profiles[regime_of(configuration, cluster.device, job.model.fp32_modules)]
    tokens = job.workload.sequence_tokens
    return Explanation(
        plan=made,
        symbols=symbols_of(profile, configuration, tokens),
        phases=explain_phases(made.memory, profile, configuration, tokens),
    )


def why_not(plan: str | Path, changes: Sequence[str], display: Display = silent) -> tuple[Plan, tuple[Answer, ...]]:
    """Say what a plan would be with other options, as `autofit explain PLAN --why-not NAME=VALUE` does.

    Args:
        plan: a plan.json.
        changes: options of `autofit plan`, each as NAME=VALUE.
        display: shows what is traced.

    Returns:
        The plan, made anew, and an answer for each change.

    Raises:
        InputError: the file is no plan, or a change is none.
    """
    from autofit.options import with_option
    from autofit.plan import load_plan
    from autofit.search.nothing_fits import Change

    inputs = load_plan(Path(plan)).inputs
    asked = [
        Change(
            words=text,
            kind=text,
            job=lambda job, text=text: replace(job, restrictions=with_option(job.restrictions, text)),  # type: ignore[misc]
        )
        for text in changes
    ]
    for change in asked:  # a misspelt option is said before anything is searched
        change.job(inputs.job)
    return _answered(inputs.job, inputs.cluster, lambda _: asked, display)


def what_if(plan: str | Path, display: Display = silent) -> tuple[Plan, tuple[Answer, ...]]:
    """Say what a plan would be on other hardware and for other lengths, as `autofit explain PLAN --what-if` does.

    Args:
        plan: a plan.json.
        display: shows what is traced.

    Raises:
        InputError: the file is no plan.
    """
    from autofit.plan import load_plan
    from autofit.search.whatif import counterfactuals
    from autofit.sources.market import other_sizes

    inputs = load_plan(Path(plan)).inputs
    sizes = other_sizes(inputs.cluster.device)
    return _answered(inputs.job, inputs.cluster, lambda made: tuple(counterfactuals(made, sizes)), display)


def _answered(
    job: Job, cluster: Cluster, changes_of: Callable[[Plan], Sequence[Change]], display: Display
) -> tuple[Plan, tuple[Answer, ...]]:
    from autofit.search.whatif import answers

    def plan_anew(job: Job, cluster: Cluster) -> Plan:
        return solve_job(job, cluster, display)

    made = plan_anew(job, cluster)
    return made, answers(job, cluster, changes_of(made), plan_anew)


def estimate_stages(job: Job, cluster: Cluster, display: Display = silent) -> tuple[Plan, ...]:
    """Estimate a job under DDP and every ZeRO stage.

    Raises:
        InputError: there is one device, or a stage cannot be estimated.
    """
    shardings: tuple[Sharding, ...] = ("ddp", "zero1", "zero2", "zero3")
    jobs = [replace(job, restrictions=replace(job.restrictions, shardings=(sharding,))) for sharding in shardings]
    return tuple(estimate_job(each, cluster, display) for each in jobs)


def estimate_inference(
    *,
    model: str | Path,
    gpus: str,
    seq_len: int,
    prompt_tokens: int | None = None,
    allow_hub: bool = False,
    **wishes: Any,
) -> InferenceEstimate:
    """Estimate what generating text needs, as `autofit estimate --inference` does.

    Args:
        model: see `estimate`.
        gpus: one device.
        seq_len: tokens of a sequence, prompt and answer together.
        prompt_tokens: of these, the prompt's, whose activations are then counted; reading it is traced.
        allow_hub: see `estimate`.
        wishes: `micro_batch` (sequences at one time), `weights_dtype`, and how weights are quantised.

    Raises:
        InputError: something given cannot be used; `message` says what, `to_fix` what to do.
    """
    read = wishes_of(EveryWish, wishes)
    return infer(model=model, gpus=gpus, seq_len=seq_len, prompt_tokens=prompt_tokens, wishes=read, allow_hub=allow_hub)


def infer(
    *,
    model: str | Path,
    gpus: str,
    seq_len: int,
    wishes: EveryWish,
    allow_hub: bool,
    prompt_tokens: int | None = None,
    display: Display = silent,
) -> InferenceEstimate:
    """Estimate generating; the weights are those of a traced model, without what trains.

    Raises:
        InputError: something given cannot be used, or what is asked for is not modelled.
    """
    from autofit.memory.inference import inference_memory, kv_cache_elements, prompt_bytes
    from autofit.memory.overheads import context_bytes, workspace_bytes
    from autofit.memory.static import static_bytes
    from autofit.memory.tensors import tensors
    from autofit.sources.models import resolve_model
    from autofit.sources.packed import refuse_generating
    from autofit.spec.regimes import regime_of

    if prompt_tokens is not None and not 0 < prompt_tokens < seq_len:
        raise InputError(
            f"a prompt of {prompt_tokens} tokens does not leave an answer in sequences of {seq_len}.",
            to_fix=f"give --prompt-tokens from 1 to {seq_len - 1}, or a longer --seq-len: prompt and answer together"
            if seq_len > 1
            else "give a longer --seq-len: prompt and answer together",
        )
    refuse_generating(resolve_model(str(model), allow_hub=allow_hub).config)
    job, cluster = estimated_job(
        model=model,
        gpus=gpus,
        seq_len=seq_len,
        gradient_accumulation_steps=1,
        wishes=for_inference(wishes),
        allow_hub=allow_hub,
    )
    if cluster.num_devices > 1:
        raise InputError("generating on several devices is not modelled.", to_fix="give one device")
    configuration, device = only_configuration(job, cluster), cluster.device
    regime = regime_of(configuration, device, job.model.fp32_modules)
    batch = configuration.per_device_train_batch_size
    reading = None
    if prompt_tokens is not None:
        kv_cache_elements(job.model.config, batch=batch, tokens=seq_len)  # refused before it is traced
        regime = replace(regime, generates=True)
    profile = profiles_of(job.model, (regime,), prompt_tokens or seq_len, display)[regime]
    if prompt_tokens is not None:
        reading = prompt_bytes(profile, batch=batch, prompt_tokens=prompt_tokens)
    held = static_bytes(tuple(t for t in tensors(profile) if t.kind != "adapter"), device.kind)
    memory = inference_memory(
        held.frozen_weights + held.trained_weights + held.quantized_weights + held.buffers,
        job.model.config,
        batch=batch,
        tokens=seq_len,
        dtype=configuration.weights_dtype,
        prompt_bytes=reading,
    )
    context = context_bytes(device, 1)
    return InferenceEstimate(
        weights_bytes=memory.weights_bytes,
        kv_cache_bytes=memory.kv_cache_bytes,
        growth_bytes=memory.growth_bytes,
        prompt_bytes=memory.prompt_bytes,
        total_bytes=memory.total_bytes,
        process_bytes=None if context is None else context + workspace_bytes(device) + memory.total_bytes,
        budget_bytes=device.memory_bytes,
    )


def measure_data(
    data: str | Path,
    *,
    model: str | Path | None = None,
    tokenizer: str | Path | None = None,
    text_column: str | Sequence[str] = (),
    data_all: bool = False,
    allow_hub: bool = False,
) -> MeasuredData:
    """Measure how long a data set's sequences are, as `autofit data` does.

    Args:
        data: a file of JSON lines, JSON or Parquet, a folder of them, or one that `datasets` saved.
        model: whose tokenizer counts; as `--model` takes it.
        tokenizer: another tokenizer: a folder, a tokenizer.json, a GGUF file, or a Hub id.
        text_column: the column that holds text, messages, token ids or lengths; several are joined.
        data_all: whether a large data set is tokenised whole.
        allow_hub: whether a tokenizer may be downloaded.

    Raises:
        InputError: the data cannot be read, or something that is needed for it is not here.
    """
    from autofit.sources.models import resolve_model

    resolved = None if model is None else resolve_model(str(model), allow_hub=allow_hub)
    wish = DataWish(
        data=str(data),
        tokenizer=None if tokenizer is None else str(tokenizer),
        text_column=[text_column] if isinstance(text_column, str) else [*text_column],
        data_all=data_all,
    )
    return with_cuts(lengths_of(wish, resolved, allow_hub=allow_hub))


def lengths_of(
    wish: DataWish, model: Model | None, *, allow_hub: bool, display: Display = silent
) -> LengthDistribution:
    """Measure a data set."""
    from autofit.sources.lengths import read_lengths

    assert wish.data is not None, "asked for only where there is one"
    with display() as progress:
        return read_lengths(
            wish.data,
            model=model,
            tokenizer=wish.tokenizer,
            text_columns=wish.text_column or (),
            measures_all=wish.data_all,
            allow_hub=allow_hub,
            progress=progress,
        )


def workload_of(
    wishes: DataWish,
    model: Model,
    *,
    seq_len: int | None,
    sequences: int,
    packs: bool,
    allow_hub: bool,
    display: Display,
) -> Workload:
    """Say what a step trains: the data, if it is given, cut where the user says or the model ends.

    Raises:
        InputError: neither the data nor a length is given, or an option would be without effect.
    """
    from autofit.spec.job import Workload

    refuse_absurd("global-batch", sequences)
    refuse_absurd("seq-len", seq_len or 0)
    if wishes.data is None:
        for field in fields(DataWish):
            if getattr(wishes, field.name) != field.default:
                name = field.name.replace("_", "-")
                raise InputError(f"--{name} has no effect without --data.", to_fix="give --data, or leave it out")
        if seq_len is None:
            raise InputError("the length of a sequence is not given.", to_fix="give --seq-len, or --data to measure it")
        return Workload(sequence_tokens=seq_len, global_batch_sequences=sequences)
    from autofit.sources.lengths import planned_tokens

    if packs and seq_len is None:
        raise InputError("batching packed fills rows, and no length of a row is given.", to_fix="give --seq-len")
    lengths = lengths_of(wishes, model, allow_hub=allow_hub, display=display)
    tokens = planned_tokens(lengths, seq_len, model, packs=packs)
    return Workload(sequence_tokens=tokens, global_batch_sequences=sequences, lengths=lengths)


def with_data(job: Job, wishes: DataWish, *, allow_hub: bool, display: Display) -> Job:
    """Give a script's job the lengths of its data; the script has said where sequences are cut, and its model counts.

    Raises:
        InputError: the data cannot be measured.
    """
    if wishes.data is None:
        return job
    lengths = lengths_of(wishes, job.model, allow_hub=allow_hub, display=display)
    return replace(job, workload=replace(job.workload, lengths=lengths))


def run_length(wishes: RunWish) -> RunLength | None:
    """Say how much is trained, if the user does.

    Raises:
        InputError: tokens and epochs are both given, neither is a positive number, or there is no data to go over.
    """
    from autofit.spec.job import RunLength

    given = {name: value for name in ("tokens", "epochs") if (value := getattr(wishes, name)) is not None}
    if not given:
        return None
    if len(given) > 1:
        raise InputError("--tokens and --epochs are both given.", to_fix="leave one of them out")
    if not all(0 < value <= MOST_TRAINED for value in given.values()):
        name, value = next(iter(given.items()))
        raise InputError(
            f"--{name} {value:g} is not a positive number, or beyond all reason.", to_fix="give one, for instance 3"
        )
    if "epochs" in given and wishes.data is None:
        raise InputError("--epochs has no effect without --data.", to_fix="give --data, or --tokens instead")
    return RunLength(**given)


def with_cuts(lengths: LengthDistribution) -> MeasuredData:
    """Add what cutting at the usual lengths would lose."""
    from autofit.timing.batches import cut_at, usual_cuts

    return MeasuredData(lengths=lengths, cuts=tuple(cut_at(lengths, tokens) for tokens in usual_cuts(lengths)))


def planned_job(
    *,
    model: str | Path,
    gpus: str,
    seq_len: int | None,
    global_batch: int,
    wishes: SearchWish,
    allow_hub: bool,
    measuring: Display = silent,
) -> tuple[Job, Cluster]:
    """Read what is to be planned, and on what."""
    cluster = cluster_of(gpus, wishes)
    job = job_of(
        model=model,
        seq_len=seq_len,
        global_batch=global_batch,
        wishes=wishes,
        allow_hub=allow_hub,
        measuring=measuring,
    )
    return job, cluster


def job_of(
    *,
    model: str | Path,
    seq_len: int | None,
    global_batch: int,
    wishes: SearchWish,
    allow_hub: bool,
    measuring: Display = silent,
) -> Job:
    """Read what is to be planned."""
    from autofit.sources.models import resolve_model
    from autofit.sources.packed import with_packed_weights
    from autofit.spec.job import Job

    resolved = resolve_model(str(model), allow_hub=allow_hub)
    wanted = with_packed_weights(restrictions(wishes), resolved.config)
    workload = workload_of(
        wishes,
        resolved,
        seq_len=seq_len,
        sequences=global_batch,
        packs="packed" in wanted.batchings,
        allow_hub=allow_hub,
        display=measuring,
    )
    return Job(model=resolved, workload=workload, restrictions=wanted, run=run_length(wishes))


def cluster_of(gpus: str, wishes: RunWish) -> Cluster:
    """Read what is planned on, at the price that the user gives."""
    from autofit.sources.hardware import parse_cluster
    from autofit.sources.prices import priced, read_prices

    return calibrated((priced(parse_cluster(gpus), read_prices(wishes.price)),), wishes)[0]


def calibrated(clusters: Sequence[Cluster], wishes: RunWish) -> tuple[Cluster, ...]:
    """Give clusters what runs on such devices have taught, unless it is to be left out.

    Raises:
        InputError: the calibration of this machine cannot be read.
    """
    from autofit.files import calibration_path, user_cache_folder

    path = calibration_path(user_cache_folder())
    if not wishes.calibration or not path.exists():
        return tuple(clusters)
    from autofit.calibrate.store import calibration_of, read_calibrations
    from autofit.spec.libraries import installed_versions

    known = read_calibrations(path)
    if not known:
        return tuple(clusters)
    installed = installed_versions()
    return tuple(replace(cluster, calibration=calibration_of(known, cluster.device, installed)) for cluster in clusters)


def remembered_runs() -> Stored:
    """Return every run that was launched on this machine or imported, as `autofit runs` lists them.

    Raises:
        InputError: the file of runs cannot be read.
    """
    from autofit.calibrate.store import read, store_path
    from autofit.files import user_cache_folder

    path = store_path(user_cache_folder())
    try:
        return read(path)
    except OSError as error:
        raise InputError(f"the runs in {str(path)!r} cannot be read: {error}", to_fix="correct its rights") from error


def import_runs(path: str | Path) -> tuple[RunRecord, ...]:
    """Add the runs of a file that `export_runs` wrote to those of this machine, and return the new ones.

    Raises:
        InputError: the file is none, or one of its records is not valid; then nothing is added.
    """
    from autofit.calibrate.records import import_text
    from autofit.calibrate.store import append, new_ones

    stored = remembered_runs()
    try:
        given = import_text(Path(path).read_bytes(), origin=str(path))
        added = new_ones(stored.records, given)
        append(stored.path, added)
    except OSError as error:
        raise InputError(f"cannot import {str(path)!r}: {error}", to_fix="give a file that can be read") from error
    return added


def export_runs(path: str | Path) -> tuple[RunRecord, ...]:
    """Write every remembered run into one JSON file, to be shared, and return them.

    Raises:
        InputError: the file is there already, or cannot be written.
    """
    from autofit.calibrate.records import export_text
    from autofit.files import replace_text

    records = remembered_runs().records
    try:
        if Path(path).exists():
            raise InputError(f"{str(path)!r} is there already.", to_fix="give another name, or move it away")
        replace_text(Path(path), export_text(records))
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r}: {error}", to_fix="give a file that can be written") from error
    return records


def calibrate(*, dry_run: bool = False) -> tuple[Fitted, ...]:
    """Fit corrections to the remembered runs, and keep them for later plans, as `autofit calibrate` does.

    Args:
        dry_run: whether to keep nothing.

    Raises:
        InputError: there are no runs, or the corrections cannot be written.
    """
    from autofit.calibrate.fit import fit_all
    from autofit.calibrate.store import write_calibrations
    from autofit.files import calibration_path, user_cache_folder

    stored = remembered_runs()
    if not stored.records:
        raise InputError(
            f"there are no runs to calibrate with in {str(stored.path)!r}.",
            to_fix="train with `autofit launch`, or `autofit runs --import FILE`",
        )
    fitted = fit_all(stored.records)
    path = calibration_path(user_cache_folder())
    try:
        if not dry_run:
            write_calibrations(path, [each.calibration for each in fitted if each.calibration.num_runs])
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r}: {error}", to_fix="correct its rights") from error
    return fitted


def estimated_job(
    *,
    model: str | Path,
    gpus: str,
    seq_len: int | None,
    gradient_accumulation_steps: int,
    wishes: EveryWish,
    allow_hub: bool,
    measuring: Display = silent,
) -> tuple[Job, Cluster]:
    """Read what is to be estimated: a job that leaves one configuration."""
    from autofit.sources.models import resolve_model
    from autofit.sources.packed import with_packed_weights
    from autofit.spec.job import Job

    refuse_absurd("gradient-accumulation-steps", gradient_accumulation_steps)
    cluster = cluster_of(gpus, wishes)
    resolved = resolve_model(str(model), allow_hub=allow_hub)
    chosen = with_packed_weights(restrictions(one_of_each(wishes)), resolved.config)
    if wishes.packed_kernel and not chosen.quantizations[0].comes_packed:
        raise InputError(
            "--packed-kernel has no effect on a checkpoint that does not come packed.",
            to_fix="leave it out, or give a model whose config.json says that GPTQ packed it",
        )
    num_groups = max(1, cluster.num_devices // chosen.sequence_parallel_size)
    sequences = chosen.micro_batch_sequences[0] * gradient_accumulation_steps * num_groups
    workload = workload_of(
        wishes,
        resolved,
        seq_len=seq_len,
        sequences=sequences,
        packs="packed" in chosen.batchings,
        allow_hub=allow_hub,
        display=measuring,
    )
    return Job(model=resolved, workload=workload, restrictions=chosen, run=run_length(wishes)), cluster


def solve_job(job: Job, cluster: Cluster, display: Display = silent, *, num_cores: int = 1) -> Plan:
    """Plan a job; where nothing fits, look further before saying what would help.

    Args:
        job: what is trained.
        cluster: what it is trained on.
        display: shows how far tracing is.
        num_cores: how many processes may work; with more than 1 this one is copied, see `autofit.search.ahead`.

    Raises:
        NothingFitsError: nothing fits.
    """
    from autofit.search.solve import explaining_regimes, required_regimes, solve

    regimes = required_regimes(job, cluster)
    profiles, refused = traceable_of(job.model, regimes, job.workload.sequence_tokens, display)
    try:
        made = solve(job, cluster, profiles, num_cores=num_cores)
        return replace(made, reasons=(*made.reasons, *(f"left out, for it cannot be traced: {why}" for why in refused)))
    except NothingFitsError as refusal:
        try:
            more = profiles_of(job.model, explaining_regimes(job, cluster), job.workload.sequence_tokens, display)
        except InputError:
            raise refusal from None
    return solve(job, cluster, {**profiles, **more})


def solve_script(job: Job, cluster: Cluster, display: Display = silent) -> Plan:
    """Plan a script's job: where its own method is among those that are allowed, another is taken only if it fails.

    Raises:
        NothingFitsError: nothing that is allowed fits.
    """
    from autofit.search.solve import required_regimes, solve

    own, allowed = job.script_method, job.restrictions.methods
    if own is None or own not in allowed or len(allowed) == 1:
        return solve_job(job, cluster, display)
    as_it_is = replace(job, restrictions=replace(job.restrictions, methods=(own,)))
    try:
        regimes = required_regimes(as_it_is, cluster)
        profiles = profiles_of(job.model, regimes, job.workload.sequence_tokens, display)
        made = solve(as_it_is, cluster, profiles)
    except NothingFitsError:
        return solve_job(job, cluster, display)
    said = f"method {own}: it is the script's own, and fits; of the others that you allow none was tried."
    return replace(made, inputs=replace(made.inputs, job=job), reasons=(said, *made.reasons))


def estimate_job(job: Job, cluster: Cluster, display: Display = silent) -> Plan:
    """Estimate the one configuration that a job leaves.

    Raises:
        InputError: it leaves several, or one that cannot run or is not modelled.
    """
    return _estimated(job, cluster, only_configuration(job, cluster), display)[0]


def only_configuration(job: Job, cluster: Cluster) -> Configuration:
    """Return the one configuration that a job leaves.

    Raises:
        InputError: it leaves several.
    """
    from autofit.search.space import candidates

    found = candidates(job, cluster)
    if len(found) > 1:
        names = ", ".join(dict.fromkeys(each.sharding for each in found))
        raise InputError(f"what is asked for leaves several shardings: {names}.", to_fix="give --sharding")
    return found[0]


def _estimated(job: Job, cluster: Cluster, configuration: Configuration, display: Display) -> tuple[Plan, ProfileSet]:
    from autofit.memory.limits import refuse_unmodelled
    from autofit.search.solve import estimate as estimate_one
    from autofit.spec.regimes import regime_of

    refuse_unmodelled(configuration)
    regime = regime_of(configuration, cluster.device, job.model.fp32_modules)
    profiles = profiles_of(job.model, (regime,), job.workload.sequence_tokens, display)
    return estimate_one(job, cluster, profiles, configuration), profiles


def compare(
    *,
    model: str | Path,
    gpus: Sequence[str],
    seq_len: int | None = None,
    global_batch: int,
    max_dollars_per_hour: float | None = None,
    allow_hub: bool = False,
    **wishes: Any,
) -> tuple[Offer, ...]:
    """Plan one job on several kinds of hardware, as `autofit compare` does: the cheapest per token first.

    Args:
        model: see `make_plan`.
        gpus: hardware as `--gpus` takes it, or `any`.
        seq_len: see `make_plan`.
        global_batch: see `make_plan`.
        max_dollars_per_hour: of all devices of one hardware together; needed for `any`.
        allow_hub: see `make_plan`.
        wishes: the other options of `autofit compare`, with underscores.

    Raises:
        InputError: something given cannot be used; `message` says what, `to_fix` what to do.
    """
    from autofit.sources.market import hardware
    from autofit.sources.prices import read_prices

    read = wishes_of(SearchWish, wishes)
    clusters = calibrated(hardware(gpus, max_dollars_per_hour, read_prices(read.price)), read)
    job = job_of(
        model=model,
        seq_len=seq_len,
        global_batch=global_batch,
        wishes=read,
        allow_hub=allow_hub,
    )
    return compare_job(job, clusters)


def compare_job(
    job: Job,
    clusters: Sequence[Cluster],
    display: Display = silent,
    planning: Display = silent,
    *,
    num_cores: int = 1,
) -> tuple[Offer, ...]:
    """Plan a job on each of several clusters; what is traced is traced once for all.

    Args:
        job: what is trained.
        clusters: what it may be trained on.
        display: shows how far tracing is.
        planning: shows how far planning is.
        num_cores: see `solve_job`.
    """
    from autofit.search.compare import offers, regimes_of_all

    profiles, _ = traceable_of(job.model, regimes_of_all(job, clusters), job.workload.sequence_tokens, display)
    with planning() as progress:
        return offers(job, clusters, profiles, progress, num_cores=num_cores)


def traceable_of(
    model: Model, regimes: Sequence[Regime], sequence_tokens: int, display: Display = silent
) -> tuple[ProfileSet, tuple[str, ...]]:
    """Do the same for a search, which goes on without a code path that cannot be traced; say why it cannot.

    Raises:
        InputError: none can be.
    """
    from autofit.sources.profiles import profiles_and_refusals, stored_profiles

    stored = stored_profiles(model, regimes, sequence_tokens)
    if len(stored) == len(regimes):
        return stored, ()
    with display() as progress:
        found, refused = profiles_and_refusals(model, regimes, sequence_tokens, progress=progress)
    if not found:
        raise next(iter(refused.values()))
    return found, tuple(dict.fromkeys(error.message for error in refused.values()))


def profiles_of(model: Model, regimes: Sequence[Regime], sequence_tokens: int, display: Display = silent) -> ProfileSet:
    """Take the stored profiles of a model for sequences of a length, or trace what has none and show that."""
    from autofit.sources.profiles import profiles_for, stored_profiles

    stored = stored_profiles(model, regimes, sequence_tokens)
    if len(stored) == len(regimes):
        return stored
    with display() as progress:
        return profiles_for(model, regimes, sequence_tokens, progress=progress)
