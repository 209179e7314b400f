"""Launches a plan: writes the run folder, climbs down the ladder, and sums up."""

from __future__ import annotations

import os
import secrets
import signal
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from autofit.calibrate.records import Ending, record_of
from autofit.calibrate.store import append
from autofit.errors import InputError, LadderExhaustedError, TrainingFailedError
from autofit.files import replace_text
from autofit.launch.command import Command, Invocation, build_command
from autofit.launch.evidence import LOG_FILE, RANK_EVENTS_PATTERN, Evidence, gather_evidence, read_events
from autofit.launch.ladder import probe_folder, rung_folder, rung_plans
from autofit.launch.process import run_process
from autofit.launch.road import choose_road, flags_of
from autofit.launch.script import check_script
from autofit.launch.summary import EVENTS_FILE, SUMMARY_FILE, log_excerpt, log_path, memory_summary, summarize
from autofit.launch.supervise import Attempt, supervise
from autofit.launch.verdict import judge
from autofit.plan import Plan, adaptation, planned_rows, to_json
from autofit.sources.detect import num_gpus_here
from autofit.spec.libraries import installed_versions
from autofit.units import format_bytes
from autofit.writers.files import refuse_foreign_files, write_files
from autofit.writers.render import render_files


class Outcome(Struct, frozen=True, kw_only=True):
    """A launch that ended well, or that the user stopped."""

    exit_code: int
    """0; or 128 and the signal's number where the user stopped it, as a shell says it."""
    rung: int
    """0: what was planned; otherwise the number of the fallback that ran."""
    run_folder: Path
    summary: dict[str, Any]
    """The content of summary.json."""


class Conduct(Struct, frozen=True, kw_only=True):
    """How a launch is to go about it."""

    road: str | None = None
    """How the plan reaches the script, see autofit.launch.road; None: as the script asks for it."""
    is_strict: bool = True
    """Whether a planned setting that is not in effect stops the training."""
    probes: bool = False
    """Whether each rung takes two steps on the longest batch before it is started."""
    store: Path | None = None
    """The file of remembered runs that this one is added to; None: nothing is remembered."""


def launch(
    plan: Plan,
    run_folder: Path,
    script: Path,
    arguments: Sequence[str] = (),
    *,
    stream: BinaryIO | None = None,
    conduct: Conduct | None = None,
) -> Outcome:
    """Train as planned, on the next fallback if memory runs out, and leave everything in the run folder.

    Args:
        plan: what to run.
        run_folder: where its files go; made if missing.
        script: the user's script.
        arguments: the script's arguments.
        stream: where the script's output goes besides log.txt; standard output unless given.
        conduct: how to go about it; strictly, without probes and without remembering unless given.

    Raises:
        InputError: the script or the run folder cannot be used.
        TrainingFailedError: the script failed, or a planned setting was not in effect.
        LadderExhaustedError: the plan and all its fallbacks ran out of memory.
    """
    conduct = conduct or Conduct()
    refuse_useless_conduct(conduct)
    refuse_packed(plan)
    refuse_absent_devices(plan, num_gpus_here(os.environ))
    run_folder = run_folder.absolute()
    source = check_script(script).read_text(encoding="utf-8", errors="replace")
    road = choose_road(conduct.road, source)
    invocation = Invocation(
        script=check_script(script),
        source=source,
        road=road,
        arguments=tuple(arguments),
        environment=os.environ,
        num_cores=os.cpu_count() or 1,
        is_strict=conduct.is_strict,
    )
    if (words := adaptation(plan)) is not None:
        _say(words)
    probed: dict[int, dict[str, Any]] = {}

    def start(rung: Plan, folder: Path, how: Invocation) -> Evidence:
        evidence = run_command(prepare(rung, folder, how), folder, stream or sys.stdout.buffer)
        return replace(evidence, is_watched=road != "flags")

    def run(number: int, rung: Plan) -> Evidence:
        if conduct.probes:
            evidence = start(rung, probe_folder(run_folder, number), replace(invocation, is_probe=True))
            if judge(evidence).failure != "none":
                return replace(evidence, is_of_probe=True)
            probed[number] = memory_summary(rung, evidence.events)
            _say(f"probe: {probe_words(probed[number], rung)}; starting the training")
        return start(rung, rung_folder(run_folder, number), invocation)

    attempts = supervise(startable_rungs(plan, invocation), run, _say)
    if conduct.store is not None:
        remember(attempts, conduct.store)
    return conclude(attempts, run_folder, probed.get(attempts[-1].number))


def refuse_absent_devices(plan: Plan, num_gpus: int | None) -> None:
    """Refuse to start where the planned GPUs are not: ranks would train on the processor, or fail one by one.

    Args:
        plan: what is to run.
        num_gpus: how many are here; None: that is not known.

    Raises:
        InputError: they are fewer than the plan uses on a node.
    """
    cluster = plan.inputs.cluster
    needed = min(plan.configuration.num_processes, cluster.num_devices_per_node)
    if cluster.device.kind == "cuda" and num_gpus is not None and num_gpus < needed:
        raise InputError(
            f"the plan trains on {needed} x {cluster.device.name}; GPUs that can be seen here: {num_gpus}.",
            to_fix="start it where they are, from its files or with --plan; --dry-run shows a plan and starts nothing",
            hint="--gpus auto plans for what is here",
        )


def refuse_packed(plan: Plan) -> None:
    """Refuse to start on a checkpoint that comes packed: no road loads one.

    Raises:
        InputError: the plan or one of its fallbacks has such weights.
    """
    every = (plan.configuration, *(rung.configuration for rung in plan.fallbacks))
    if any(each.quantization is not None and each.quantization.comes_packed for each in every):
        raise InputError(
            "the plan's checkpoint comes packed (GPTQ or AWQ), which autofit plans and does not load.",
            to_fix="start the script without autofit: it must load its model with a GPTQConfig or AwqConfig itself",
        )


def refuse_useless_conduct(conduct: Conduct) -> None:
    """Refuse to probe where nothing in the script's process could end it and measure.

    Raises:
        InputError: a probe is asked for, and flags are the road.
    """
    if conduct.probes and conduct.road == "flags":
        raise InputError(
            "--probe needs hooks in the script's process, and --road flags has none.",
            to_fix="leave one of them out",
        )


def startable_rungs(plan: Plan, invocation: Invocation) -> tuple[Plan, ...]:
    """Return the rungs that the road can put into effect; the first has to be one.

    Raises:
        InputError: a value that was planned has no flag, and flags are the road.
    """
    rungs = rung_plans(plan)
    if invocation.road != "flags":
        return rungs
    flags_of(plan, invocation.source, invocation.arguments)
    kept = [rung for rung in rungs if _has_flags(rung, invocation)]
    if len(kept) < len(rungs):
        _say(f"{len(rungs) - len(kept)} of {len(rungs) - 1} fallbacks have no flags in this script and are left out")
    return tuple(kept)


def _has_flags(plan: Plan, invocation: Invocation) -> bool:
    try:
        flags_of(plan, invocation.source, invocation.arguments)
    except InputError:
        return False
    return True


def probe_words(memory: dict[str, Any], plan: Plan) -> str:
    """Put the measured peak of a probe beside the predicted one, and say on what batch it was."""
    predicted, measured = memory["predicted_peak_allocated_bytes"], memory["measured_peak_allocated_bytes"]
    longest = max((rank["longest_batch_tokens"] or 0 for rank in memory["ranks"]), default=0)
    rows, tokens = planned_rows(plan)
    short = "" if longest >= tokens else f" of the {tokens} that were planned for"
    return (
        f"predicted {format_bytes(predicted)}, measured {format_bytes(measured)} "
        f"({memory['prediction_error_fraction']:+.2%}) on {rows} x {longest} tokens{short}"
    )


def remember(attempts: Sequence[Attempt], store: Path) -> None:
    """Add each attempt to the remembered runs; where that fails, the training has still been, and it is said."""
    records = [
        record_of(
            attempt.plan,
            attempt.evidence.events,
            Ending(
                rung=attempt.number,
                failure=attempt.verdict.failure,
                is_probe=attempt.evidence.is_of_probe,
                in_effect=not attempt.evidence.not_in_effect,
            ),
            record_id=secrets.token_hex(8),
            ended_at=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            autofit_version=installed_versions(["autofit-launcher"]).get("autofit-launcher", "unknown"),
        )
        for attempt in attempts
    ]
    try:
        append(store, records)
    except OSError as error:
        _say(f"the run is not remembered: {error}")


def prepare(plan: Plan, folder: Path, invocation: Invocation) -> Command:
    """Write a rung's files, clear what an earlier launch left there, and return what to start."""
    files = render_files(plan, folder)
    results = dict.fromkeys((LOG_FILE, EVENTS_FILE, SUMMARY_FILE), "")
    refuse_foreign_files(files | results, folder)
    write_files(files, folder)
    for stale in [*folder.glob(RANK_EVENTS_PATTERN), *(folder / name for name in results)]:
        stale.unlink(missing_ok=True)
    return build_command(plan, folder, invocation)


def run_command(command: Command, folder: Path, stream: BinaryIO) -> Evidence:
    """Run a rung to its end and gather what it left, with the ranks' events merged into one file."""

    def find_ranks() -> list[int]:
        return [event.detail["pid"] for event in read_events(folder) if event.kind == "started"]

    exit_code, interrupted_by = run_process(command, folder / LOG_FILE, stream, find_ranks)
    evidence = gather_evidence(folder, exit_code, interrupted_by)
    lines = [msgspec.json.encode(event).decode() + "\n" for event in evidence.events]
    replace_text(folder / EVENTS_FILE, "".join(lines))
    return evidence


def conclude(attempts: Sequence[Attempt], run_folder: Path, probe: dict[str, Any] | None = None) -> Outcome:
    """Write the summary, then return or raise what it says."""
    last = attempts[-1]
    exit_code = _exit_code(last)
    summary = summarize(attempts, run_folder, exit_code, probe)
    replace_text(run_folder / SUMMARY_FILE, to_json(summary) + "\n")
    if last.verdict.failure == "none" and last.evidence.exit_code:
        _say(last.verdict.reason)
    if last.verdict.failure == "out_of_memory":
        raise _ladder_exhausted(attempts, run_folder)
    if last.verdict.failure in {"script_failed", "plan_not_in_effect"}:
        raise _training_failed(last, run_folder)
    return Outcome(exit_code=exit_code, rung=last.number, run_folder=run_folder, summary=summary)


def _exit_code(attempt: Attempt) -> int:
    if attempt.verdict.failure == "interrupted":
        return 128 + (attempt.evidence.interrupted_by or signal.SIGINT)
    codes = {"none": 0, "out_of_memory": LadderExhaustedError.exit_code}
    return codes.get(attempt.verdict.failure, TrainingFailedError.exit_code)


def _training_failed(attempt: Attempt, run_folder: Path) -> TrainingFailedError:
    log = log_path(attempt, run_folder)
    if attempt.verdict.failure == "plan_not_in_effect":
        return TrainingFailedError(
            f"the training was stopped because the plan was not in effect. {attempt.verdict.reason}",
            to_fix="let the script leave these settings to its TrainingArguments, plan with the script's own values, "
            "or train all the same with --no-strict",
            hint=f"the whole log is {log}",
        )
    excerpt = log_excerpt(attempt.evidence.log_tail)
    return TrainingFailedError(
        f"the training failed. {attempt.verdict.reason}\nThe last lines of its log:\n{excerpt}",
        to_fix="correct what the script's own error says",
        hint=f"the whole log is {log}",
    )


def _ladder_exhausted(attempts: Sequence[Attempt], run_folder: Path) -> LadderExhaustedError:
    history = "\n".join(
        f"  rung {attempt.number}: predicted {format_bytes(attempt.plan.memory.peak_allocated_bytes)}, "
        f"budget {format_bytes(attempt.plan.memory.budget_bytes)}: {attempt.verdict.reason}"
        for attempt in attempts
    )
    return LadderExhaustedError(
        f"the plan and its {len(attempts) - 1} fallbacks ran out of memory.\n{history}",
        to_fix="allow a method that needs less (lora, qlora), a shorter sequence, or more devices",
        hint=f"the logs are {', '.join(str(log_path(attempt, run_folder)) for attempt in attempts)}",
    )


def _say(text: str) -> None:
    sys.stderr.write(f"autofit: {text}\n")
    sys.stderr.flush()
