"""The command line. Each command parses, makes one call, and prints; what decides anything is below."""

from __future__ import annotations

import copy
import gc
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from msgspec.structs import replace

from autofit.errors import AutofitError, InputError, NothingFitsError
from autofit.options import (
    ACCUMULATION,
    GLOBAL_BATCH,
    GPUS,
    MODEL,
    SEQ_LEN,
    AllowHubOption,
    CommandGroup,
    DataAllOption,
    DataWish,
    EveryWish,
    JsonOption,
    OutputOption,
    RunWish,
    SearchWish,
    SectionedCommand,
    TextColumnOption,
    TokenizerOption,
    given_options,
    restrictions,
    takes_wishes,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

    from autofit.api import Explanation, InferenceEstimate, MeasuredData, Progress
    from autofit.launch import Conduct
    from autofit.plan import Plan
    from autofit.search.compare import Offer
    from autofit.search.whatif import Answer
    from autofit.sources.script_job import Overrides
    from autofit.spec.discovered import Discovered
    from autofit.spec.hardware import Cluster
    from autofit.spec.job import Job


OBJECTS_BETWEEN_COLLECTIONS = 1_000_000
"""A search makes many objects and no cycles: Python's default would look for cycles hundreds of times, for 50 ms."""

app = typer.Typer(
    name="autofit",
    cls=CommandGroup,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 1 training failed, 2 wrong input, 3 nothing fits, 4 every fallback ran out of memory.",
)


def print_version(wanted: bool) -> None:  # noqa: FBT001  (typer calls it so)
    """Print the version and stop, before anything else on the command line is looked at."""
    if wanted:
        typer.echo(f"autofit {installed_version('autofit-launcher')}")
        raise typer.Exit


@app.callback()
def root(
    *,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=print_version)
    ] = False,
) -> None:
    """Find the cheapest training configuration that fits the GPUs, and launch the unmodified script with it."""


@app.command(cls=SectionedCommand)
@takes_wishes(SearchWish)
def plan(
    model: Annotated[str, MODEL],
    global_batch: Annotated[int, GLOBAL_BATCH],
    gpus: Annotated[str, GPUS],
    wishes: SearchWish,
    seq_len: Annotated[int | None, SEQ_LEN] = None,
    output: OutputOption = None,
    *,
    allow_hub: AllowHubOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find the cheapest configuration that fits, and write its files."""
    from autofit.api import planned_job, solve_job
    from autofit.search.ahead import num_usable_cores

    job, cluster = planned_job(
        model=model,
        gpus=gpus,
        seq_len=seq_len,
        global_batch=global_batch,
        wishes=wishes,
        allow_hub=allow_hub,
        measuring=measuring,
    )
    made = solve_job(job, cluster, tracing, num_cores=num_usable_cores())
    show_plan(made, output, as_json=as_json)


@app.command(cls=SectionedCommand)
@takes_wishes(SearchWish)
def launch(
    context: typer.Context,
    script: Annotated[Path, typer.Argument(help="The training script, as it is.", show_default=False)],
    wishes: SearchWish,
    arguments: Annotated[
        list[str] | None, typer.Argument(help="The script's own arguments, after --.", show_default=False)
    ] = None,
    gpus: Annotated[str | None, GPUS] = None,
    plan_file: Annotated[
        Path | None, typer.Option("--plan", metavar="FILE", help="Use this plan.json instead of searching.")
    ] = None,
    model: Annotated[str | None, MODEL] = None,
    seq_len: Annotated[int | None, SEQ_LEN] = None,
    global_batch: Annotated[int | None, GLOBAL_BATCH] = None,
    output: OutputOption = None,
    *,
    allow_hub: AllowHubOption = False,
    road: Annotated[
        str | None,
        typer.Option(
            "--road",
            metavar="hooks|flags|api",
            help="How the plan reaches the script (default: hooks; api if it calls autofit.current_plan).",
            show_default=False,
        ),
    ] = None,
    probe: Annotated[
        bool,
        typer.Option("--probe", help="First take two steps on the longest batch; if memory runs out, the next rung."),
    ] = False,
    strict: Annotated[
        bool,
        typer.Option("--strict/--no-strict", help="Stop before the first step if a planned setting is not in effect."),
    ] = True,
    override: Annotated[
        bool,
        typer.Option(
            "--override",
            help="Plan freely what the script says of precision, dtype, optimizer, attention and checkpointing, and "
            "how a loop of its own splits its batch.",
        ),
    ] = False,
    discovers: Annotated[
        bool,
        typer.Option(
            "--discover/--no-discover",
            help="Run the script up to its first step (or read it if it fails), or only read it.",
        ),
    ] = True,
    discovery_limit: Annotated[
        float, typer.Option("--discovery-limit", metavar="SECONDS", help="How long that may take.", min=1)
    ] = 120,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, and start nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Plan for a script, start it unmodified with the plan, and watch over it."""
    if (gpus is None) == (plan_file is None):
        raise InputError(
            "launch needs either --gpus, to plan for, or --plan, to use.",
            to_fix="give one of the two, for instance --gpus 2xA100-80G",
        )
    if plan_file is not None:
        beside = {"model": model, "seq_len": seq_len, "global_batch": global_batch, "override": override or None}
        refuse_beside_plan([*given_options(wishes), *(name for name, value in beside.items() if value is not None)])
    from autofit.launch.launch import Conduct, refuse_useless_conduct
    from autofit.launch.road import choose_road
    from autofit.launch.script import check_script

    conduct = Conduct(road=road, is_strict=strict, probes=probe, store=runs_file())
    refuse_useless_conduct(conduct)
    choose_road(road, check_script(script).read_text(encoding="utf-8", errors="replace"))
    if plan_file is not None:
        from autofit.plan import load_plan

        made = load_plan(plan_file)
    else:
        made = plan_for_script(
            script,
            arguments or [],
            gpus or "",
            wishes,
            replace(
                overrides(wishes, model=model, seq_len=seq_len, global_batch=global_batch, allow_hub=allow_hub),
                frees_settings=override,
            ),
            allow_hub=allow_hub,
            runs_it=discovers,
            limit_seconds=discovery_limit,
        )
    if dry_run:
        show_plan(made, output, as_json=as_json)
    else:
        if plan_file is None and discovers:
            refuse_unasked_guess(made, context.obj)
        folder = output or new_run_folder(script)
        raise typer.Exit(train(made, folder, script, arguments or [], conduct, as_json=as_json))


def refuse_beside_plan(names: Sequence[str]) -> None:
    """Refuse options that would change a plan that is made already."""
    if names:
        raise InputError(
            f"--{names[0].replace('_', '-')} has no effect with --plan: it is planned already.",
            to_fix="leave one of them out; or plan anew with --gpus",
        )


def refuse_unasked_guess(made: Plan, arguments: Sequence[str]) -> None:
    """Let a training begin on guesses only where that was asked for.

    Raises:
        InputError: the script could not be run, so that the plan rests on what its source says.
    """
    found = made.inputs.job.found
    if "guessed" not in found:
        return
    from autofit.report.console import side_console
    from autofit.report.plan import decision, found_table, memory_line

    side_console().print(found_table(found))
    kept = [word for word in arguments[1:] if word != "--discover"]
    command = shlex.join(["autofit", *arguments[:1], "--no-discover", *kept])
    raise InputError(
        "nothing was started: the script could not be run up to its first step, and all that is planned was guessed "
        f"from its source.\n    {decision(made)}, {memory_line(made.memory).plain}",
        to_fix="correct what kept it from running; or check each line above, and start on the guess",
        hint=command,
    )


def runs_file() -> Path:
    """Return the file of remembered runs."""
    from autofit.calibrate.store import store_path
    from autofit.files import user_cache_folder

    return store_path(user_cache_folder())


def overrides(
    wishes: SearchWish, *, model: str | None, seq_len: int | None, global_batch: int | None, allow_hub: bool
) -> Overrides:
    """Collect what the user says beside the script."""
    from autofit.sources.models import resolve_model
    from autofit.sources.script_job import Overrides

    return Overrides(
        model=None if model is None else resolve_model(model, allow_hub=allow_hub),
        sequence_tokens=seq_len,
        global_batch_sequences=global_batch,
        restrictions=restrictions(wishes),
    )


def plan_for_script(
    script: Path,
    arguments: Sequence[str],
    gpus: str,
    wishes: RunWish,
    said: Overrides,
    *,
    allow_hub: bool,
    runs_it: bool,
    limit_seconds: float,
) -> Plan:
    """Find out what a script is about to train, by running or reading it, and plan it."""
    from autofit.api import cluster_of, run_length, solve_script, with_data
    from autofit.report.console import side_console
    from autofit.report.errors import guess_warning
    from autofit.report.progress import discovery_display
    from autofit.sources.models import resolve_model
    from autofit.sources.script import NotRunError, discover
    from autofit.sources.script_job import job_from_discovery, method_of
    from autofit.sources.script_reading import read_instead, read_script

    cluster, run = here(cluster_of(gpus, wishes)), run_length(wishes)
    find = partial(resolve_model, allow_hub=allow_hub)
    if runs_it:
        try:
            with discovery_display(side_console(), script) as progress:
                discovered = discover(
                    script, arguments, allow_hub=allow_hub, time_limit_seconds=limit_seconds, progress=progress
                )
        except NotRunError as refusal:
            discovered = read_instead(refusal, script, arguments, find_model=find, model=said.model)
            side_console().print(guess_warning(refusal))
    else:
        discovered = read_script(script, arguments, find_model=find, model=said.model)
    job = job_from_discovery(discovered, cluster, said, script=script, arguments=arguments)
    job = replace(job, script_method=method_of(discovered), script_settings=script_settings(discovered))
    job = with_data(job, wishes, allow_hub=allow_hub, display=measuring)
    job = with_allocator_of(os.environ, replace(job, run=run))
    with shown_if_refused(job.found):
        return solve_script(job, cluster, tracing)


@contextmanager
def shown_if_refused(found: Mapping[str, str]) -> Iterator[None]:
    """Show what was read from a script also where there is no plan to show it with: it may be what is wrong."""
    try:
        yield
    except AutofitError:
        from autofit.report.console import side_console
        from autofit.report.plan import found_table

        side_console().print(found_table(found))
        raise


def script_settings(discovered: Discovered) -> dict[str, str]:
    """Say in a plan's words what the script does by itself."""
    from autofit.launch.road import adapter_words

    adapter, quantization = discovered.adapter, discovered.quantization
    words = adapter_words(
        None if adapter is None else (adapter.kind, adapter.r, adapter.lora_alpha, adapter.lora_dropout),
        None if quantization is None else quantization.quant_type,
    )
    dtype = {} if discovered.weights_dtype is None else {"weights_dtype": discovered.weights_dtype}
    return {"method": words, "attention": discovered.attention, **dtype}


def here(cluster: Cluster) -> Cluster:
    """Say of a cluster that what is installed here is what will train on it: a launch starts here."""
    from autofit.search.rules import LIBRARIES
    from autofit.spec.libraries import software_here

    return replace(cluster, software=software_here(LIBRARIES, trains_here=True))


def with_allocator_of(environment: Mapping[str, str], job: Job) -> Job:
    """Plan with the allocator's options that the user's environment sets, and name them among what was found.

    Raises:
        InputError: the environment contradicts itself, or sets an option that is not modelled.
    """
    from autofit.memory.alloc_conf import user_setting

    setting = user_setting(environment)
    if setting is None:
        return job
    restrictions = replace(
        job.restrictions,
        expandable_segments=setting.expandable_segments,
        max_split_size_mb=setting.max_split_size_mb,
    )
    said = f"{setting.text} (the environment's {setting.variable})"
    return replace(job, restrictions=restrictions, found={**job.found, "allocator": said})


def new_run_folder(script: Path) -> Path:
    """Name a run folder that no run has had: the script's name and the time."""
    from datetime import datetime

    return Path("autofit-runs") / f"{script.stem}-{datetime.now().astimezone():%Y%m%d-%H%M%S}"


def train(
    made: Plan, run_folder: Path, script: Path, arguments: Sequence[str], conduct: Conduct, *, as_json: bool
) -> int:
    """Start the training, and at its end set predicted beside measured; return the exit code."""
    from autofit.launch import launch as start

    if not as_json:
        print_plan(made, as_json=False)
    stream = sys.stderr.buffer if as_json else sys.stdout.buffer
    outcome = start(made, run_folder, script, arguments, stream=stream, conduct=conduct)
    from autofit.report.run import run_report

    report = run_report(outcome.summary, outcome.run_folder / "summary.json")
    show(report, outcome.summary, as_json=as_json)
    return outcome.exit_code


@app.command(cls=SectionedCommand)
@takes_wishes(EveryWish)
def estimate(
    wishes: EveryWish,
    model: Annotated[str | None, MODEL] = None,
    seq_len: Annotated[int | None, SEQ_LEN] = None,
    gpus: Annotated[str | None, GPUS] = None,
    gradient_accumulation_steps: Annotated[int, ACCUMULATION] = 1,
    batch: Annotated[
        Path | None,
        typer.Option(
            "--batch",
            metavar="FILE",
            help="Estimate one configuration a line of FILE (- is stdin), and print one JSON object for each.",
        ),
    ] = None,
    *,
    inference: Annotated[
        bool,
        typer.Option(
            "--inference",
            help="What generating needs instead: weights, and keys and values of --micro-batch x --seq-len tokens.",
        ),
    ] = False,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            "--prompt-tokens",
            min=1,
            metavar="N",
            help="Of --inference: the prompt's tokens of --seq-len; what reading it takes is then counted.",
            show_default=False,
        ),
    ] = None,
    replay: Annotated[
        bool,
        typer.Option(
            "--replay/--no-replay",
            help="Of --batch: send allocations through the allocator's policy, a fraction of a second a row.",
        ),
    ] = True,
    allow_hub: AllowHubOption = False,
    as_json: JsonOption = False,
) -> None:
    """Estimate memory, time and cost of one configuration; nothing is searched.

    What is left out: full fine-tuning, micro-batch 1, adamw_torch_fused, no checkpointing, DDP on several devices.
    """
    if prompt_tokens is not None and not inference:
        raise InputError("--prompt-tokens has no effect on training.", to_fix="leave it out, or add --inference")
    if batch is not None:
        if (model, seq_len, gpus, wishes) != (None, None, None, EveryWish()):
            raise InputError("with --batch the rows say what is estimated.", to_fix="write the options into the rows")
        print_batch(batch, replay=replay, allow_hub=allow_hub)
        return
    from autofit.api import estimate_job, estimated_job, infer

    if model is None or gpus is None or (seq_len is None and (inference or wishes.data is None)):
        raise InputError("estimate needs --model, --seq-len and --gpus, or --batch.", to_fix="give them")
    if inference and seq_len is not None:
        print_inference(
            infer(
                model=model,
                gpus=gpus,
                seq_len=seq_len,
                prompt_tokens=prompt_tokens,
                wishes=wishes,
                allow_hub=allow_hub,
                display=tracing,
            ),
            as_json=as_json,
        )
        return
    job, cluster = estimated_job(
        model=model,
        gpus=gpus,
        seq_len=seq_len,
        gradient_accumulation_steps=gradient_accumulation_steps,
        wishes=wishes,
        allow_hub=allow_hub,
        measuring=measuring,
    )
    made = estimate_job(job, cluster, tracing)
    print_plan(made, as_json=as_json)


def print_inference(estimated: InferenceEstimate, *, as_json: bool) -> None:
    """Print what generating needs for a program or for a person."""
    if as_json:
        print_json(estimated)
        return
    from autofit.report.console import result_console
    from autofit.report.tables import inference_table

    parts = {
        "weights": estimated.weights_bytes,
        "keys and values": estimated.kv_cache_bytes,
        "to add a token": estimated.growth_bytes,
        "to read the prompt, its keys and values included": estimated.prompt_bytes,
        "together; the activations of a prompt come on top (--prompt-tokens)"
        if estimated.prompt_bytes is None
        else "the most at one time": estimated.total_bytes,
        "whole process": estimated.process_bytes,
        f"the device has{'' if estimated.fits else ': does not fit'}": estimated.budget_bytes,
    }
    result_console().print(inference_table(parts))


def print_batch(path: Path, *, replay: bool, allow_hub: bool) -> None:
    """Estimate the rows of a file and print one line for each, as soon as it is there."""
    from autofit.batch import estimate_rows, read_rows

    try:
        content = sys.stdin.buffer.read() if path == Path("-") else path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r}: {error}", to_fix="give a readable file of JSON lines") from error
    rows = read_rows(content)
    with tracing() as progress:
        for line in estimate_rows(rows, replays=replay, allow_hub=allow_hub, progress=progress):
            typer.echo(line)


@app.command(cls=SectionedCommand)
@takes_wishes(EveryWish)
def explain(
    wishes: EveryWish,
    plan_file: Annotated[
        Path | None, typer.Argument(metavar="[PLAN]", help="A plan.json; or else give what estimate takes.")
    ] = None,
    model: Annotated[str | None, MODEL] = None,
    seq_len: Annotated[int | None, SEQ_LEN] = None,
    gpus: Annotated[str | None, GPUS] = None,
    gradient_accumulation_steps: Annotated[int, ACCUMULATION] = 1,
    *,
    by_stage: Annotated[
        bool, typer.Option("--by-stage", help="Draw memory under DDP and under ZeRO 1, 2 and 3 instead.")
    ] = False,
    why_not: Annotated[
        list[str] | None,
        typer.Option(
            "--why-not",
            metavar="NAME=VALUE",
            help="Of a plan.json: what it would be with another option of plan, for instance zero_stage=3; repeatable.",
            show_default=False,
        ),
    ] = None,
    what_if: Annotated[
        bool,
        typer.Option("--what-if", help="Of a plan.json: more devices, other lengths, a larger adapter, other memory."),
    ] = False,
    allow_hub: AllowHubOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say of each term of the memory what it is, by which formula and from where."""
    from autofit import api
    from autofit.api import estimate_stages, estimated_job, explain_job, explain_plan
    from autofit.search.ahead import num_usable_cores

    if plan_file is None and (why_not or what_if):
        raise InputError("--why-not and --what-if ask about a plan.", to_fix="give a plan.json; plan -o writes one")
    if plan_file is not None and (why_not or what_if):
        if why_not:
            print_answers(*api.why_not(plan_file, why_not, tracing), as_json=as_json)
        if what_if:
            print_answers(*api.what_if(plan_file, tracing), as_json=as_json)
        return
    if plan_file is not None:
        if (model, seq_len, gpus, wishes, by_stage) != (None, None, None, EveryWish(), False):
            raise InputError("explain takes a plan.json or options, not both.", to_fix="leave one of them out")
        print_explanation(explain_plan(plan_file, tracing, num_cores=num_usable_cores()), as_json=as_json)
        return
    if model is None or gpus is None or (seq_len is None and wishes.data is None):
        raise InputError("explain needs a plan.json, or --model, --seq-len and --gpus.", to_fix="give them")
    job, cluster = estimated_job(
        model=model,
        gpus=gpus,
        seq_len=seq_len,
        gradient_accumulation_steps=gradient_accumulation_steps,
        wishes=wishes,
        allow_hub=allow_hub,
        measuring=measuring,
    )
    if by_stage:
        print_stages(estimate_stages(job, cluster, tracing), as_json=as_json)
    else:
        print_explanation(explain_job(job, cluster, tracing), as_json=as_json)


def print_answers(made: Plan, found: Sequence[Answer], *, as_json: bool) -> None:
    """Print a plan beside what it would be, for a program or for a person."""
    if as_json:
        print_json({"plan": made, "answers": found})
        return
    from autofit.report.console import result_console
    from autofit.report.whatif import whatif_report

    console = result_console()
    console.print(whatif_report(made, found, width=console.width))


def print_explanation(explained: Explanation, *, as_json: bool) -> None:
    """Print an explanation for a program or for a person."""
    if as_json:
        print_json(explained)
        return
    from autofit.report.console import result_console
    from autofit.report.explain import explanation_report

    console = result_console()
    report = explanation_report(
        explained.plan,
        explained.symbols,
        explained.phases,
        stored_peak_allocated_bytes=explained.stored_peak_allocated_bytes,
        knobs=explained.knobs,
        width=console.width,
    )
    console.print(report)


def print_stages(plans: Sequence[Plan], *, as_json: bool) -> None:
    """Print memory by stage for a program or for a person."""
    if as_json:
        print_json({"stages": plans})
        return
    from autofit.report.console import result_console
    from autofit.report.explain import stages_report

    console = result_console()
    console.print(stages_report(plans, width=console.width))


@app.command(cls=SectionedCommand)
@takes_wishes(SearchWish)
def compare(
    model: Annotated[str, MODEL],
    global_batch: Annotated[int, GLOBAL_BATCH],
    gpus: Annotated[
        list[str],
        typer.Option(
            "--gpus",
            metavar="GPUS",
            help="Hardware to compare, as plan takes it; repeatable. any: 1 to 8 of every GPU with a price.",
            show_default=False,
        ),
    ],
    wishes: SearchWish,
    seq_len: Annotated[int | None, SEQ_LEN] = None,
    max_dollars_per_hour: Annotated[
        float | None,
        typer.Option(
            "--max-dollars-per-hour",
            metavar="DOLLARS",
            min=0,
            help="Leave out what costs more, all its devices together.",
            show_default=False,
        ),
    ] = None,
    *,
    allow_hub: AllowHubOption = False,
    as_json: JsonOption = False,
) -> None:
    """Plan the same job on several kinds of hardware: which is cheapest, which is fastest."""
    from autofit.api import calibrated, compare_job, job_of
    from autofit.search.ahead import num_usable_cores
    from autofit.sources.market import hardware
    from autofit.sources.prices import read_prices

    clusters = calibrated(hardware(gpus, max_dollars_per_hour, read_prices(wishes.price)), wishes)
    job = job_of(
        model=model,
        seq_len=seq_len,
        global_batch=global_batch,
        wishes=wishes,
        allow_hub=allow_hub,
        measuring=measuring,
    )
    found = compare_job(job, clusters, tracing, planning, num_cores=num_usable_cores())
    print_comparison(found, as_json=as_json)
    if not any(offer.plan for offer in found):
        is_too_large = any(offer.fits is False for offer in found)
        raise typer.Exit(NothingFitsError.exit_code if is_too_large else InputError.exit_code)


def print_comparison(found: Sequence[Offer], *, as_json: bool) -> None:
    """Print a comparison for a program or for a person."""
    from autofit.search.compare import unbeaten

    best = unbeaten(found)
    if as_json:
        places = {id(offer): number for number, offer in enumerate(found)}
        print_json({"offers": found, "unbeaten": [places[id(offer)] for offer in best]})
        return
    from autofit.report.compare import comparison_report
    from autofit.report.console import result_console

    console = result_console()
    console.print(comparison_report(found, best, width=console.width))


@app.command(cls=SectionedCommand)
def data(
    path: Annotated[
        str, typer.Argument(metavar="DATA", help="File or folder of JSON lines or Parquet, or a saved data set.")
    ],
    model: Annotated[str | None, MODEL] = None,
    tokenizer: TokenizerOption = None,
    text_column: TextColumnOption = None,
    *,
    data_all: DataAllOption = False,
    allow_hub: AllowHubOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say how long a data set's sequences are in tokens, and what cutting them would lose."""
    from autofit.api import lengths_of, with_cuts
    from autofit.report.lengths import lengths_report
    from autofit.sources.models import resolve_model

    wish = DataWish(data=path, tokenizer=tokenizer, text_column=text_column, data_all=data_all)
    resolved = None if model is None else resolve_model(model, allow_hub=allow_hub)
    measured = with_cuts(lengths_of(wish, resolved, allow_hub=allow_hub, display=measuring))
    if as_json:
        print_json(measured)
    else:
        show(lengths_report(measured.lengths, measured.cuts), {}, as_json=False)


@app.command()
def runs(
    export_file: Annotated[
        Path | None,
        typer.Option("--export", metavar="FILE", help="Write all of them into one JSON file.", show_default=False),
    ] = None,
    import_file: Annotated[
        Path | None,
        typer.Option("--import", metavar="FILE", help="Add those of such a file, each once.", show_default=False),
    ] = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """List the runs that were launched here: predicted beside measured."""
    from autofit.api import export_runs, import_runs, remembered_runs
    from autofit.report.runs import runs_report

    if export_file is not None and import_file is not None:
        raise InputError("--export and --import are both given.", to_fix="give one after the other")
    if import_file is not None:
        added = import_runs(import_file)
        typer.echo(f"{len(added)} of its runs are new", err=True)
    if export_file is not None:
        typer.echo(f"{len(export_runs(export_file))} runs are in {export_file}", err=True)
    stored = remembered_runs()
    for line in stored.broken:
        typer.echo(f"line {line.number} of {stored.path} is no run and left alone: {line.reason}", err=True)
    show(
        runs_report(stored),
        {"path": str(stored.path), "runs": stored.records, "broken": stored.broken},
        as_json=as_json,
    )


@app.command()
def calibrate(
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would change, and keep nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Fit corrections to the runs of this machine, for each device and set of library versions; plans then use them."""
    from autofit import api
    from autofit.report.runs import calibration_report

    fitted = api.calibrate(dry_run=dry_run)
    show(calibration_report(fitted, is_kept=not dry_run), {"fitted": fitted, "kept": not dry_run}, as_json=as_json)


@app.command()
def devices(*, as_json: JsonOption = False) -> None:
    """List the GPUs that --gpus knows by name."""
    from autofit.report.tables import devices_table
    from autofit.sources.gpus import catalogue, device

    known = [device(gpu) for gpu in catalogue().gpus if gpu.platform == "cuda"]
    show(devices_table(known), {"devices": known}, as_json=as_json)


@app.command()
def models(*, as_json: JsonOption = False) -> None:
    """List the models that --model knows by name."""
    from autofit.report.tables import models_table
    from autofit.sources.models import model_catalogue

    entries = model_catalogue().models
    known = {name: entry.num_params for entry in entries for name in entry.ids}
    show(models_table(known), {"models": known}, as_json=as_json)


@app.command()
def rules(*, as_json: JsonOption = False) -> None:
    """List the combinations that libraries refuse or break, and which of them hold here."""
    from autofit.report.rules import rules_table
    from autofit.search.rules import LIBRARIES, RULES
    from autofit.spec.libraries import software_here

    software = software_here(LIBRARIES, trains_here=True)
    if as_json:
        print_json({"rules": [rule.described(software) for rule in RULES]})
        return
    from autofit.report.console import result_console

    console = result_console()
    console.print(rules_table(RULES, software, width=console.width))


@app.command()
def templates(
    name: Annotated[str | None, typer.Argument(help="Template to print; without it, all are listed.")] = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """List the launch templates, or print one."""
    from autofit.report.tables import templates_table
    from autofit.writers.templates import template_purposes, template_text

    if name is not None:
        typer.echo(template_text(name), nl=False)
        return
    purposes = template_purposes()
    show(templates_table(purposes), {"templates": purposes}, as_json=as_json)


@app.command()
def doctor(*, as_json: JsonOption = False) -> None:
    """Say what is installed, and what is missing for what."""
    from autofit.report.tables import REQUIREMENTS, doctor_table

    versions = {requirement.package: installed_version(requirement.package) for requirement in REQUIREMENTS}
    show(doctor_table(versions), {"versions": versions}, as_json=as_json)


def installed_version(package: str) -> str | None:
    """Return the version of an installed package, from its metadata: nothing is imported."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


@contextmanager
def measuring() -> Iterator[Progress]:
    """Show on stderr how much of a data set was measured."""
    from autofit.report.console import side_console
    from autofit.report.progress import measuring_display

    with measuring_display(side_console()) as report:
        yield report


@contextmanager
def tracing() -> Iterator[Progress]:
    """Show on stderr what is traced."""
    from autofit.report.console import side_console
    from autofit.report.progress import tracing_display

    with tracing_display(side_console()) as report:
        yield report


@contextmanager
def planning() -> Iterator[Progress]:
    """Show on stderr which hardware is planned for."""
    from autofit.report.console import side_console
    from autofit.report.progress import planning_display

    with planning_display(side_console()) as report:
        yield report


def show_plan(made: Plan, run_folder: Path | None, *, as_json: bool) -> None:
    """Write the plan's files if there is a folder to write them into, and print the plan and what to do with it."""
    files = written(made, run_folder)
    print_plan(made, as_json=as_json)
    if as_json:
        return
    from autofit.report.console import result_console
    from autofit.report.plan import files_report, next_commands

    console = result_console()
    console.print(files_report(files))
    console.print(next_commands(made, run_folder), soft_wrap=True)


def print_plan(made: Plan, *, as_json: bool) -> None:
    """Print a plan for a program or for a person."""
    if as_json:
        print_json(made)
        return
    from autofit.report.console import result_console
    from autofit.report.plan import plan_report

    console = result_console()
    console.print(plan_report(made, width=console.width))


def written(made: Plan, run_folder: Path | None) -> list[Path]:
    """Write the files of a run; nothing where no folder is given."""
    if run_folder is None:
        return []
    from autofit.writers import render_files, write_files

    files = render_files(made, run_folder.absolute())
    write_files(files, run_folder)
    return [run_folder / name for name in files]


def show(renderable: RenderableType, document: dict[str, Any], *, as_json: bool) -> None:
    """Print a list for a program or for a person."""
    if as_json:
        print_json(document)
        return
    from autofit.report.console import result_console

    result_console().print(renderable)


def print_json(document: Plan | Explanation | InferenceEstimate | MeasuredData | dict[str, Any]) -> None:
    """Print one JSON object, the only thing on stdout."""
    from autofit.plan import to_json

    typer.echo(to_json(document))


def main() -> None:
    """Run the command line and end the process with its exit code."""
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS)
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has enough; what is still buffered must not be written at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    gc.freeze()  # the interpreter ends with a look for cycles in all that is left, which takes a tenth of a second
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; a refusal is printed, never raised."""
    try:
        given = list(arguments)
        return _called(given)(given or ["--help"], prog_name="autofit", standalone_mode=False, obj=given) or 0
    except AutofitError as error:
        refusal = error
    except typer.TyperException as error:
        refusal = usage_refusal(error, arguments)
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("interrupted", err=True)
        return 130
    print_refusal(refusal, as_json=asks_for_json(arguments))
    return refusal.exit_code


def _called(arguments: Sequence[str]) -> typer.Typer:
    """Return the app, without the other commands where the first word is one: making all takes a hundredth second."""
    named = [
        each for each in app.registered_commands if each.callback and each.callback.__name__ == "".join(arguments[:1])
    ]
    if not named:
        return app
    alone = copy.copy(app)
    alone.registered_commands = named
    return alone


def asks_for_json(arguments: Sequence[str]) -> bool:
    """Tell whether --json is among autofit's own arguments; those after `--` are the script's."""
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return "--json" in own


def usage_refusal(error: typer.TyperException, arguments: Sequence[str]) -> InputError:
    """Turn typer's complaint about the command line into a refusal like every other."""
    command = next((argument for argument in arguments if not argument.startswith("-")), "")
    known = {registered.callback.__name__ for registered in app.registered_commands if registered.callback}
    own = f" {command}" if command in known else ""
    message = error.format_message().replace("Value error, ", "")
    to_fix = None
    if command == "launch" and message.startswith("No such option"):
        to_fix = "put the script's own arguments after --"
    elif own and message.startswith("No such option: --dry-run"):
        to_fix = f"leave it out: {command} never starts a training"
    return InputError(message, to_fix=to_fix, hint=f"autofit{own} --help")


def print_refusal(refusal: AutofitError, *, as_json: bool) -> None:
    """Print why nothing was done: on stdout as JSON if that was asked for, else on stderr."""
    if as_json:
        from autofit.report.errors import error_json

        print_json(error_json(refusal))
        return
    from autofit.report.console import side_console
    from autofit.report.errors import error_text

    side_console().print(error_text(refusal), soft_wrap=True)
