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

import psutil
import pytest

from bnaudit.report import Report, ReportError, load

PLUGIN = '''
import os
import time


def batch_norm(x, weight, bias, running_mean, running_var, *, training, momentum, eps, grad_output=None):
    """The input itself; slowly, and saying in which process."""
    with open({log!r}, "a") as log:
        print(os.getpid(), file=log)
    time.sleep(0.05)
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

    def __init__(self, folder: Path, cases: int = 100, shape: str = "[2, 4]") -> None:
        self.folder = folder
        self.log = folder / "log"
        self.children: list[psutil.Process] = []
        (folder / "slow.py").write_text(PLUGIN.format(log=str(self.log)))
        (folder / "s.yaml").write_text(SCENARIO % (list(range(cases)), shape))

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


def test_tensors_that_find_no_room_cost_their_own_cases_only(tmp_path: Path) -> None:
    run = Run(tmp_path, 1, "[[2, 4], [300000, 1], [150000, 1], [2, 5]]")
    scratch = tmp_path / "scratch"
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


def test_a_scratch_folder_that_vanishes_costs_the_case_that_is_running(run: Run) -> None:
    run.start("--json", "r.json", "--fail-on", "never")
    run.until(lambda: len(run.calls()) > 10)
    (scratch,) = run.scratch()
    shutil.rmtree(scratch, ignore_errors=True)
    code, err = run.wait()
    assert err == ""
    results = run.report().results
    assert len(results) == 100
    assert sum(result.status == "crash" for result in results) <= 1
    assert code in (0, 3)


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


def test_a_killed_worker_costs_one_case(run: Run) -> None:
    run.start("--json", "r.json", "--fail-on", "never")
    run.until(lambda: len(run.calls()) > 10)
    os.kill(run.calls()[-1], signal.SIGKILL)
    code, err = run.wait()
    assert (code, err) == (3, "")
    results = run.report().results
    assert len(results) == 100
    (killed,) = [result for result in results if result.status == "crash"]
    assert (killed.reason or "").startswith("killed by SIGKILL")


def test_a_signal_that_has_no_name_has_its_number(run: Run) -> None:
    run.start("--json", "r.json", "-x")
    run.until(run.calls)
    os.kill(run.calls()[-1], signal.SIGRTMIN + 3)
    run.wait()
    assert run.report().results[0].reason == f"killed by signal {signal.SIGRTMIN + 3}"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_that_come_twice_end_the_run_once(run: Run, number: signal.Signals) -> None:
    run.start("--json", "r.json")
    run.until(lambda: len(run.calls()) > 4)
    run.children = psutil.Process(run.process.pid).children(recursive=True)
    for _ in range(20):
        run.process.send_signal(number)
        time.sleep(0.005)
    code, err = run.wait()
    saved = run.report()
    assert code in (130, -number)  # the last ones may meet a process that has done all it had to
    assert saved.verdict == "interrupted"
    assert len(run.calls()) - 2 <= 2 * len(saved.results) <= len(run.calls())
    assert err.startswith(f"bnaudit: interrupted after {len(saved.results)} results")


# --- standard output -------------------------------------------------------------------------------


def test_a_closed_standard_output_does_not_disturb_the_audit(run: Run) -> None:
    Run(run.folder, 2)
    run.start("--json", "r.json", prefix=("sh", "-c", 'exec "$@" >&-', "sh"))
    code, err = run.wait()
    assert (code, err) == (1, "")
    assert len(run.report().results) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("arguments", [["list", "cases"], ["schema", "report"], ["--help"]])
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
