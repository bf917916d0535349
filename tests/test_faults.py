"""Machines that fail: a full disk, a folder that vanishes, a killed process, a reader that does not read.

Whatever happens, what was measured is in the report, nothing lies around, and the user gets a sentence.
"""

from __future__ import annotations

import fcntl
import gzip
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from correct import prepare

from bnaudit import audit, subject
from bnaudit.audit import CaseFacts, Result, Selected
from bnaudit.distributions import read_array
from bnaudit.report import Report, ReportError, load
from bnaudit.scenario import load as load_scenarios
from bnaudit.subject import Subject, scratch_folder

PLUGIN = '''
import os
import time


def batch_norm(x, weight, bias, running_mean, running_var, *, training, momentum, eps, grad_output=None):
    """The input itself; slowly, and saying in which process."""
    with open({log!r}, "a") as log:
        print(os.getpid(), file=log)
    time.sleep(0.03)
    return x
'''

SCENARIO = """
name: many
input: {distribution: normal, mean: %s}
shape: %s
"""

FULL = "No space left on device"


class Run:
    """bnaudit run of a slow plug-in in a process and a folder of its own, with a log of its calls."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        self.children: list[psutil.Process] = []
        (folder / "slow.py").write_text(PLUGIN.format(log=str(self.log)))
        self.write_scenario(100)

    def write_scenario(self, cases: int, shape: str = "[2, 4]") -> None:
        (self.folder / "s.yaml").write_text(SCENARIO % (list(range(cases)), shape))

    def start(self, *arguments: str, prefix: tuple[str, ...] = (), **options: Any) -> None:
        command = [
            sys.executable,
            "-m",
            "bnaudit",
            "run",
            "s.yaml",
            "-b",
            "slow.py:batch_norm",
            "-q",
        ]
        self.process = subprocess.Popen(
            [*prefix, *command, *arguments],
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options},
            cwd=self.folder,
        )

    def wait(self) -> tuple[int, str]:
        """Exit code and standard error; all that it started must have ended, and left nothing behind."""
        if not self.children:
            self.children = psutil.Process(self.process.pid).children(recursive=True)
        _, err = self.process.communicate(timeout=60)
        _, alive = psutil.wait_procs(self.children, timeout=10)
        assert not alive
        assert not list(self.scratch())
        assert not list(self.folder.glob(".*.tmp"))
        return self.process.returncode, err or ""

    def scratch(self) -> Iterator[Path]:
        for folder in (Path("/dev/shm"), Path("/tmp")):
            yield from folder.glob(f"bnaudit-{self.process.pid}-*")

    def calls(self) -> list[int]:
        """The process of each call of the plug-in that was begun."""
        return [int(line) for line in self.log.read_text().split()] if self.log.exists() else []

    def until(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def report(self) -> Report:
        return load(self.folder / "r.json")


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    made = Run(tmp_path)
    yield made
    if made.process.poll() is None:
        made.process.kill()
        made.process.communicate()


@pytest.fixture
def short(run: Run) -> Run:
    """One that ends soon."""
    run.write_scenario(16)
    return run


def mounted(*mounts: str) -> tuple[str, ...]:
    """Runs what follows where these are mounted, which nothing outside sees; skips where that is refused."""
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare")
    script = " && ".join([f"mount -t tmpfs {mount}" for mount in mounts])
    prefix = (
        "unshare",
        "--user",
        "--map-root-user",
        "--mount",
        "sh",
        "-c",
        f'{script} && exec "$@"',
        "sh",
    )
    tried = subprocess.run([*prefix, "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no file system can be mounted: {tried.stderr.strip()}")
    return prefix


# --- disks -----------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_ends_the_run_and_keeps_what_was_saved(run: Run) -> None:
    disk = run.folder / "disk"
    disk.mkdir()
    prefix = mounted(f"-o size=64k none {disk}")
    keep = ("sh", "-c", '"$@"; code=$?; cp -a disk/. kept; exit $code', "sh")
    run.start("--json", "disk/r.json", prefix=(*prefix, *keep))
    code, err = run.wait()
    assert code == 2
    assert err.startswith("bnaudit: cannot write the report ")
    assert err.endswith(f": {FULL}\n")
    assert err.count("\n") == 1
    kept = load(run.folder / "kept" / "r.json")
    assert kept.verdict == "interrupted"
    assert len(run.calls()) - 2 <= 2 * len(kept.results) + 2  # each case is called twice
    assert [path.name for path in (run.folder / "kept").iterdir()] == ["r.json"]


def test_tensors_that_find_no_room_cost_their_own_cases_only(run: Run) -> None:
    run.write_scenario(1, "[[2, 4], [300000, 1], [150000, 1], [2, 5]]")
    scratch = run.folder / "scratch"
    scratch.mkdir()
    prefix = mounted("-o size=1m none /dev/shm", f"-o size=1m none {scratch}")
    keep = ("sh", "-c", 'TMPDIR=scratch "$@"; code=$?; ls -A scratch; exit $code', "sh")
    run.start("--json", "r.json", "--fail-on", "never", prefix=(*prefix, *keep))
    out, err = run.process.communicate(timeout=60)
    assert (run.process.returncode, err) == (3, "")
    small, inputs, outputs, last = run.report().results
    assert (small.status, last.status) == ("fail", "fail")
    assert (inputs.status, inputs.reason) == (
        "unsupported",
        f"the inputs could not be made: {FULL}",
    )
    assert outputs.status == "crash"
    assert (outputs.reason or "").startswith("y.npy could not be written: ")
    assert out.endswith("\nreport r.json\n")  # and nothing is left in the folder


def test_without_a_folder_to_write_to_nothing_runs() -> None:
    prefix = mounted(*(f"-o ro none {folder}" for folder in ("/tmp", "/var/tmp", "/dev/shm")))
    command = [*prefix, sys.executable, "-m", "bnaudit", "run", "smoke", "-b", "one-pass@cpu"]
    done = subprocess.run(command, cwd="/proc", capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stderr.startswith("bnaudit: the system refuses: ")
    assert done.stderr.count("\n") == 1


def test_a_scratch_folder_that_vanishes_costs_the_case_that_is_running(short: Run) -> None:
    run = short
    run.start("--json", "r.json", "--fail-on", "never")
    run.until(lambda: len(run.calls()) > 10)
    (scratch,) = run.scratch()
    shutil.rmtree(scratch, ignore_errors=True)
    code, err = run.wait()
    assert err == ""
    results = run.report().results
    assert len(results) == 16
    assert sum(result.status == "crash" for result in results) <= 1
    assert code in (0, 3)


def test_a_file_of_values_that_vanishes_costs_its_own_cases(tmp_path: Path) -> None:
    values = tmp_path / "x.npy"
    np.save(values, np.ones((2, 4), np.float32))
    text = "input: [{distribution: file, path: x.npy}, {distribution: normal}]\nshape: [2, 4]\n"
    (tmp_path / "s.yaml").write_text(f"name: vanishing\n{text}")
    scenarios = load_scenarios([str(tmp_path / "s.yaml")])
    values.unlink()
    read_array.cache_clear()
    with scratch_folder() as scratch, Subject(scratch=scratch) as current:
        events = list(audit.run(scenarios, [Selected("one-pass@cpu", True)], current, scratch))
    lost, kept = (event for event in events if isinstance(event, Result))
    assert (lost.status, kept.status) == ("unsupported", "pass")
    assert "x.npy cannot be read: No such file" in (lost.reason or "")
    assert [event.input_sha256 is None for event in events if isinstance(event, CaseFacts)] == [
        True,
        False,
    ]


# --- reports ---------------------------------------------------------------------------------------


def test_a_report_that_was_cut_is_refused_in_a_sentence(tmp_path: Path) -> None:
    whole = (Path(__file__).parent / "fuzz" / "corpus" / "report" / "small.json").read_bytes()
    path = tmp_path / "r.json"
    for content in (whole, gzip.compress(whole)):
        for stop in [*range(12), *range(12, len(content) - 2, 997)]:
            path.write_bytes(content[:stop])
            with pytest.raises(ReportError, match=r"r\.json is not "):
                load(path)
    compared = subprocess.run(
        [sys.executable, "-m", "bnaudit", "compare", path, path], capture_output=True, text=True
    )
    assert compared.returncode == 2
    assert compared.stderr.count("\n") == 1


# --- processes -------------------------------------------------------------------------------------


def test_a_killed_worker_costs_one_case(short: Run) -> None:
    run = short
    run.start("--json", "r.json", "--fail-on", "never")
    run.until(lambda: len(run.calls()) > 10)
    os.kill(run.calls()[-1], signal.SIGKILL)
    code, err = run.wait()
    assert (code, err) == (3, "")
    results = run.report().results
    assert len(results) == 16
    (killed,) = [result for result in results if result.status == "crash"]
    assert (killed.reason or "").startswith("killed by SIGKILL")


def test_a_signal_that_has_no_name_has_its_number(run: Run) -> None:
    run.start("--json", "r.json", "-x")
    run.until(run.calls)
    os.kill(run.calls()[-1], signal.SIGRTMIN + 3)
    run.wait()
    assert run.report().results[0].reason == f"killed by signal {signal.SIGRTMIN + 3}"


def test_signals_that_come_twice_end_the_run_once(run: Run) -> None:
    run.start("--json", "r.json")
    run.until(lambda: len(run.calls()) > 4)
    run.children = psutil.Process(run.process.pid).children(recursive=True)
    for _ in range(20):
        run.process.send_signal(signal.SIGINT)
        time.sleep(0.005)
    code, err = run.wait()
    saved = run.report()
    assert code in (
        130,
        -signal.SIGINT,
    )  # the last ones may meet a process that has done all it had to
    assert saved.verdict == "interrupted"
    assert len(run.calls()) - 2 <= 2 * len(saved.results) <= len(run.calls())
    assert err.startswith(f"bnaudit: interrupted after {len(saved.results)} results")


def test_a_killed_auditor_takes_its_worker_along_and_the_next_one_tidies_up(run: Run) -> None:
    run.start("--json", "r.json")
    run.until(lambda: len(run.calls()) > 4)
    children = psutil.Process(run.process.pid).children(recursive=True)
    run.process.kill()
    run.process.communicate()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert 2 * len(run.report().results) >= len(run.calls()) - 2
    with scratch_folder():
        assert not list(run.scratch())


def answering(*commands: str) -> tuple[str, ...]:
    """A worker that does this, one command for each request."""
    greeting = """echo '{"id": 0, "outcome": "done"}'"""
    return ("sh", "-c", "; read request; ".join([greeting, *commands, "sleep 60"]), "sh")


def test_a_worker_that_reads_nothing_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "LEAST_START", 0.5)
    command = ("sh", "-c", answering()[2].replace("read request; ", ""), "sh")
    backend = f"my.py:{'a' * 200_000}"  # more than a pipe holds
    with (
        scratch_folder() as scratch,
        Subject(command=command, scratch=scratch, timeout=0.1) as late,
    ):
        assert late.describe([backend])[backend] == "not loaded within 0.5 s"


def test_a_pipe_in_place_of_an_output_is_not_read(tmp_path: Path) -> None:
    case, inputs = prepare(tmp_path, "input: {distribution: normal}\nshape: [2, 4]\n")
    command = answering(
        """echo '{"id": 1, "outcome": "done", "unavailable": {"exact@cpu": null}}'""",
        "mkfifo ../outputs-*/y.npy; echo '"
        '{"id": 2, "outcome": "done", "outputs": ["y"], "kernel": null, "seconds": 1, '
        '"not_repeatable": null, "declarations": {}}\'',
    )
    with scratch_folder() as scratch, Subject(command=command, scratch=scratch) as odd:
        reply = odd.run("exact@cpu", case, inputs)
        assert reply.outcome == "crash"
        assert (reply.reason or "").endswith("ValueError: y.npy is no file")


# --- standard output -------------------------------------------------------------------------------


def test_a_closed_standard_output_does_not_disturb_the_audit(run: Run) -> None:
    run.write_scenario(2)
    run.start("--json", "r.json", prefix=("sh", "-c", 'exec "$@" >&-', "sh"))
    code, err = run.wait()
    assert (code, err) == (1, "")
    assert len(run.report().results) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("arguments", [["list", "cases"], ["--help"]])
def test_a_full_standard_output_is_one_sentence(arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "bnaudit", *arguments]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 3
    assert done.stderr.startswith("bnaudit: the system refuses: ")
    assert FULL in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_interrupt_ends_a_run_whose_output_nobody_reads(run: Run) -> None:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    os.write(writing, b"x" * 4096)
    run.start("--json", "r.json", stdout=writing)
    os.close(writing)
    try:
        run.until(lambda: list(run.scratch()))
        time.sleep(1)
        run.process.send_signal(signal.SIGTERM)
        code, _ = run.wait()
        assert code == 130
        assert run.report().verdict == "interrupted"
    finally:
        os.close(reading)
