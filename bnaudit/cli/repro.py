"""bnaudit repro: a finding of a report as a stand-alone script."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bnaudit.cli.common import (
    CONFIG,
    INCOMPLETE,
    USAGE,
    Failure,
    explained,
    interruptible,
    make_room,
)

if TYPE_CHECKING:
    from bnaudit.inputs import Inputs
    from bnaudit.report import CaseRecord, Report, ResultRecord
    from bnaudit.repro import Fault, Script
    from bnaudit.scenario import Case

TIMEOUT = 120
"""Seconds that a script may take when it is run for --issue."""


@click.command(
    epilog="Exit: 0, 2 where there can be no script, 3 where --shrink does not find the fault here."
)
@click.argument("report", type=click.Path(path_type=Path), metavar="REPORT.json")
@click.argument("number", type=click.IntRange(min=1), metavar="N")
@click.option("--shrink", is_flag=True, help="First make the input as small as the fault allows.")
@click.option(
    "--issue", is_flag=True, help="Markdown for a bug report: script, output, versions, proof."
)
@click.option(
    "--env",
    "specifications",
    multiple=True,
    metavar="NAME=SPEC",
    help="The finding's environment, as bnaudit run was given it; --shrink and --issue need it.",
)
@CONFIG
@click.option(
    "-o",
    "target",
    type=click.Path(path_type=Path),
    metavar="FILE.py",
    help="Where the script goes (default: stdout); --shrink writes FILE.yaml beside it, --issue FILE.md.",
)
def repro(
    report: Path,
    number: int,
    shrink: bool,
    issue: bool,
    specifications: tuple[str, ...],
    config: str | None,
    target: Path | None,
) -> int:
    """Writes a script that shows finding N of a report with nothing but NumPy and the framework.

    The script exits with 1 while the fault is there, and with 0 when it is gone.
    """
    with explained(), interruptible():
        from bnaudit.report import load
        from bnaudit.repro import ReproError

        if target is not None:
            written = [("-o", target)]
            written += [("--shrink", target.with_suffix(".yaml"))] * shrink
            written += [("--issue", target.with_suffix(".md"))] * issue
            make_room(written, [("REPORT", report)])
        found = load(report)
        try:
            _write(found, number, shrink, issue, specifications, config, target)
        except ReproError as error:
            raise Failure(str(error), USAGE) from error
        except OSError as error:
            raise Failure(f"{error.filename or 'file'}: {error.strerror}", USAGE) from error
        return 0


def _write(
    report: Report,
    number: int,
    shrink: bool,
    issue: bool,
    specifications: tuple[str, ...],
    config: str | None,
    target: Path | None,
) -> None:
    """Writes what the options ask for. Raises ReproError and OSError."""
    from bnaudit import config as settings
    from bnaudit import environments
    from bnaudit import repro as scripts
    from bnaudit.subject import scratch_folder

    record, result = scripts.find(report, number)
    place, backend = environments.split(
        result.backend, [environment.name for environment in report.environments]
    )
    command: tuple[str, ...] = (sys.executable,)
    if shrink or issue:
        known = settings.load(config).environments
        command = _command(place, {**known, **dict(environments.parse_all(specifications))})
    case = scripts.rebuilt(record)
    with scratch_folder() as scratch:
        inputs = _inputs(case, scratch / "inputs")
        if inputs.sha256 != record.input_sha256:
            raise scripts.ReproError(
                f"the inputs of {record.id} are not those of the report: "
                "a file of values has changed, or bnaudit has"
            )
        fault = _fault(record, result, case, inputs)
        threads = next((e.threads for e in report.environments if e.name == place), 2)
        if shrink:
            case, fault = _shrunk(case, fault, backend, place, command, threads, scratch)
            inputs = _inputs(case, scratch / "smaller")
        declared = result.declarations or {}
        is_average = declared.get("running_update", "ema") == "ema"
        script = scripts.script(
            case,
            inputs,
            fault,
            backend,
            threads=threads,
            found=_found(report, record, place, backend),
            correction=declared.get("running_var_correction", 1) if is_average else None,
        )
        if script.files and target is None:
            raise scripts.ReproError(
                "the input is too large for a script and goes into a file beside it: "
                "say where with -o FILE.py, or make it smaller with --shrink"
            )
        _save(script, target)
        if shrink and target is not None:
            _save_scenario(case, fault, record, result.backend, specifications, target)
        if issue:
            text = _markdown(script, report, record, place, fault, command)
            if target is None:
                click.echo(text)
            else:
                path = target.with_suffix(".md")
                path.write_text(text, encoding="utf-8")
                _say(f"issue {path}")
        elif target is None:
            click.echo(script.text, nl=False)


def _inputs(case: Case, folder: Path) -> Inputs:
    from bnaudit.inputs import make

    folder.mkdir()
    return make(case, folder)


def _fault(record: CaseRecord, result: ResultRecord, case: Case, inputs: Inputs) -> Fault:
    """What a script can show of a result. Raises ReproError where that is nothing."""
    from bnaudit.report import restored
    from bnaudit.repro import ReproError, fault_of
    from bnaudit.verdict import Judged
    from bnaudit.worker.rounding import widen64

    weight = inputs.weight
    fault = fault_of(
        result.status,
        {name: restored(quantity, Judged) for name, quantity in result.quantities.items()},
        record.thresholds,
        None if weight is None else widen64(weight, case.parameter_dtype),
    )
    if fault is None:
        raise ReproError(
            f"finding {result.finding} has no deviation that a script could show "
            f"({result.status}: {result.reason})"
        )
    return fault


def _command(place: str, given: Mapping[str, str]) -> tuple[str, ...]:
    """What starts the finding's interpreter."""
    from bnaudit import environments
    from bnaudit.progress import watch

    if place == environments.CURRENT:
        return (sys.executable,)
    if place not in given:
        raise Failure(
            f"the finding is of the environment {place!r}: say where that is, with --env {place}=SPEC",
            USAGE,
        )
    return environments.resolve(place, given[place], watch(quiet=False)).command


def _shrunk(
    case: Case,
    fault: Fault,
    backend: str,
    place: str,
    command: tuple[str, ...],
    threads: int,
    scratch: Path,
) -> tuple[Case, Fault]:
    from bnaudit.shrink import attempt, shrink
    from bnaudit.subject import Subject

    with Subject(name=place, command=command, threads=threads, scratch=scratch) as subject:
        reason = subject.describe([backend])[backend]
        if reason is not None:
            raise Failure(f"{backend} cannot run: {reason}", INCOMPLETE)
        found = shrink(
            case,
            lambda candidate: attempt(candidate, backend, subject, scratch, fault),
            scratch,
            _say,
        )
    if found is None:
        raise Failure(
            f"{backend} is not off here as it is in the report (another version, processor or number of "
            "threads?), so there is nothing to shrink",
            INCOMPLETE,
        )
    return found


def _found(report: Report, record: CaseRecord, place: str, backend: str) -> str:
    """Where a finding was made, in a sentence."""
    words = [f"Found by bnaudit in {record.id}"]
    libraries = f"numpy {backend} {'jax' if 'flax' in backend else ''}"
    for environment in report.environments:
        if environment.name == place:
            packages = environment.packages.items()
            words += [f"{p} {v}" for p, v in packages if v and p.partition("-")[0] in libraries]
            words += [f"{environment.threads} threads", environment.cpu.isa or ""]
    return f"{', '.join(filter(None, words))}."


def _save(script: Script, target: Path | None) -> None:
    import numpy as np

    if target is None:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(script.text, encoding="utf-8")
    for name, array in script.files.items():
        np.save(f"{target}.{name}.npy", array)
    _say(f"script {target} ({len(script.text.splitlines())} lines)")


def _save_scenario(
    case: Case,
    fault: Fault,
    record: CaseRecord,
    backend: str,
    specifications: tuple[str, ...],
    target: Path,
) -> None:
    """The case as a scenario beside the script, with the files of values that it has."""
    from bnaudit.distributions import File
    from bnaudit.repro import scenario_text

    files = {}
    for name in ("input", "grad_output"):
        source = getattr(case, name)
        if isinstance(source, File) and (name == "input" or case.backward):
            path = target.with_suffix(f".{name}.npy")
            shutil.copyfile(source.source, path)
            files[name] = path.name
    text = scenario_text(
        case,
        f"{record.scenario}-shrunk",
        f"Shrunk from {record.id}, for {backend}: {fault.summary()}.",
        files,
    )
    path = target.with_suffix(".yaml")
    path.write_text(text, encoding="utf-8")
    options = [option for given in specifications for option in ("--env", given)]
    command = shlex.join(["bnaudit", "run", str(path), "-b", backend, *options])
    _say(f"scenario {path}: {command}")


def _markdown(
    script: Script,
    report: Report,
    record: CaseRecord,
    place: str,
    fault: Fault,
    command: tuple[str, ...],
) -> str:
    """The script with what it prints here, a proof of what it should, and versions."""
    code, output = _run(command, script.text, script)
    parts = [
        f"### {fault.summary()}",
        "```python\n" + script.text + "```",
        f"It prints ({f'exit code {code}' if code >= 0 else f'killed by signal {-code}'}):",
        "```\n" + output + "```",
    ]
    if script.proof is not None:
        _, proven = _run((sys.executable,), script.proof, script)
        parts += [
            "What it should be, in exact rational arithmetic:",
            "```python\n" + script.proof + "```",
            "```\n" + proven + "```",
        ]
    versions = []
    for environment in report.environments:
        if environment.name == place:
            cpu = " ".join(filter(None, (environment.cpu.model, environment.cpu.isa)))
            devices = [device.name for device in environment.devices]
            versions += [environment.summary(), environment.platform, cpu, *devices]
            versions.append(f"{environment.threads} threads")
    listed = "\n".join(f"- {text}" for text in versions if text)
    return "\n\n".join([*parts, f"Versions:\n\n{listed}"]) + "\n"


def _run(command: tuple[str, ...], text: str, script: Script) -> tuple[int, str]:
    """A script's exit code and output, in a folder of its own."""
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "repro.py"
        path.write_text(text, encoding="utf-8")
        for name, array in script.files.items():
            np.save(f"{path}.{name}.npy", array)
        try:
            done = subprocess.run(
                [*command, str(path)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=TIMEOUT,
                cwd=folder,
            )
        except subprocess.TimeoutExpired:
            return 1, f"(no end within {TIMEOUT} s)\n"
    return done.returncode, done.stdout.decode(errors="replace")


def _say(text: str) -> None:
    click.echo(f"bnaudit: {text}", err=True)
