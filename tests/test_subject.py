"""Worker processes and what may become of them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from correct import prepare

from bnaudit import subject as subject_module
from bnaudit.inputs import Inputs
from bnaudit.reference import Declarations
from bnaudit.scenario import Case
from bnaudit.subject import Reply, Subject, SubjectError, scratch_folder

PLUGINS = Path(__file__).parent / "plugins"
GOOD = f"{PLUGINS / 'float64_statistics.py'}:batch_norm"
SMALL = "input: {distribution: normal, mean: 3}\nshape: [2, 3, 4, 5]\nbackward: true\n"


def hostile(name: str) -> str:
    return f"{PLUGINS / 'hostile.py'}:{name}"


def echo(name: str) -> str:
    return f"{PLUGINS / 'echo.py'}:{name}"


@pytest.fixture(scope="module")
def subject() -> Iterator[Subject]:
    with scratch_folder() as scratch, Subject(scratch=scratch, timeout=20) as subject:
        yield subject


@pytest.fixture
def impatient() -> Iterator[Subject]:
    with scratch_folder() as scratch, Subject(scratch=scratch, timeout=0.2) as subject:
        yield subject


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Inputs]:
    return prepare(tmp_path_factory.mktemp("small"), SMALL)


def workers() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    ("name", "outcome", "reason"),
    [
        ("segfault", "crash", "killed by SIGSEGV"),
        ("exit_zero", "crash", "exited with code 0"),
        ("killed", "crash", "killed by SIGKILL"),
        ("sys_exit", "crash", "SystemExit: 3"),
        ("keyboard_interrupt", "crash", "KeyboardInterrupt"),
        ("memory_error", "crash", "MemoryError: Unable to allocate"),
        ("recursion", "crash", "RecursionError: maximum recursion depth exceeded"),
        ("boom", "crash", "ValueError: boom"),
        ("undecodable", "crash", r"ValueError: caf\udce9"),
        ("mute", "crash", "_MuteError: (its message cannot be shown)"),
        ("not_implemented", "unsupported", "only on Tuesdays"),
        ("protocol_garbage", "crash", 'the worker\'s reply cannot be read: {"id": 99'),
        ("endless_reply", "crash", "the worker's reply cannot be read: a megabyte without"),
        ("closed_descriptors", "crash", "closed its end of the connection"),
        ("dies_with_a_child", "crash", "exited with code 7"),
        ("removes_its_folder", "crash", "y.npy could not be written: No such file or directory"),
        (
            "relative",
            "crash",
            "'kernel.cu' (plug-ins run in a folder of their own; use Path(__file__).parent)",
        ),
        ("escapes", "crash", "ValueError: \\x1b[31mred\\x00\\x9b\\x7f\\x0d\n\tnext"),
        ("many_lines", "unsupported", "one\ntwo\nthree …"),
        ("long_line", "unsupported", "xxx"),
        ("mute_refusal", "unsupported", "(its message cannot be shown)"),
        ("only_once", "contract", "busy (when called again with the same tensors)"),
        ("nothing", "contract", "no y was returned"),
        ("no_y", "contract", "no y was returned, only batch_mean"),
        ("a_list", "contract", "y is of type list, not a NumPy array"),
        ("wrong_shape", "contract", "y has shape (120,), not (2, 3, 4, 5)"),
        ("wrong_dtype", "contract", "y is float64, not float32"),
        ("swapped_bytes", "contract", "y is >f4, not float32"),
        ("wrong_statistics_shape", "contract", "batch_mean has shape (1, 3, 1, 1), not (3,)"),
        ("wrong_statistics_dtype", "contract", "running_var is int64, not a floating-point"),
        ("in_place", "contract", "x was changed in place: x[0,0,0,0] was "),
        (
            "in_place_weight",
            "contract",
            "weight was changed in place: weight[0] was 1.0 and is now 7",
        ),
        ("bad_declaration", "contract", "running_update is 'median', not ema or caffe"),
    ],
)
def test_each_fault_has_its_outcome_and_the_next_run_works(
    subject: Subject, small: tuple[Case, Inputs], name: str, outcome: str, reason: str
) -> None:
    for backend in (hostile(name), hostile(name)):
        reply = subject.run(backend, *small)
        assert (reply.outcome, reply.outputs) == (outcome, {})
        assert reason in (reply.reason or "")
        assert len(reply.reason or "") < 2100
    assert subject.run(GOOD, *small).outcome == "done"


HARMLESS = ("loud", "reads_stdin", "closes_stdin", "forks", "not_a_number")


@pytest.mark.parametrize("name", HARMLESS)
def test_what_does_no_harm_is_no_fault(
    subject: Subject, small: tuple[Case, Inputs], name: str
) -> None:
    case, inputs = small
    for _ in range(3):
        reply = subject.run(hostile(name), case, inputs)
        assert (reply.outcome, reply.reason) == ("done", None)
        assert reply.outputs["y"].shape == case.shape


def test_a_program_that_is_not_there_is_no_file_beside_the_plugin(
    subject: Subject, small: tuple[Case, Inputs]
) -> None:
    reason = subject.run(hostile("no_compiler"), *small).reason or ""
    assert reason.startswith("FileNotFoundError: ")
    assert reason.endswith("'no-such-compiler'")


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last", "strided"])
def test_a_plugin_sets_the_shape_and_flags_of_its_own_views_only(
    subject: Subject, tmp_path: Path, memory_format: str
) -> None:
    case, inputs = prepare(tmp_path, f"{SMALL}memory_format: {memory_format}\n")
    for _ in range(2):
        reply = subject.run(hostile("another_shape"), case, inputs)
        assert (reply.outcome, reply.reason) == ("done", None)
        assert reply.outputs["y"].tobytes() == inputs.x[0].tobytes()


def test_each_worker_has_a_folder_of_its_own_which_a_plugin_may_remove(
    small: tuple[Case, Inputs],
) -> None:
    with scratch_folder() as scratch, Subject(scratch=scratch) as subject:
        (scratch / "others").mkdir()
        assert subject.run(GOOD, *small).outcome == "done"
        folders = set(scratch.iterdir())
        for _ in range(2):
            reply = subject.run(hostile("removes_where_it_runs"), *small)
            assert reply.outcome == "crash"  # at the second call there is nothing to remove
            assert folders <= set(scratch.iterdir())
            assert subject.run(GOOD, *small).outcome == "done"
        subject.close()
        assert [path.name for path in scratch.iterdir()] == ["others"]


def test_a_traceback_begins_in_the_plugin(subject: Subject, small: tuple[Case, Inputs]) -> None:
    detail = subject.run(hostile("boom"), *small).detail or ""
    assert detail.startswith("Traceback (most recent call last):\n")
    assert 'hostile.py", line ' in detail.splitlines()[1]
    assert detail.rstrip().endswith("ValueError: boom")


def test_a_crash_shows_the_last_lines_of_standard_error(
    subject: Subject, small: tuple[Case, Inputs]
) -> None:
    detail = subject.run(hostile("segfault"), *small).detail or ""
    assert "Segmentation fault" in detail
    assert "hostile.py" in detail
    assert len(detail) <= subject_module.LAST_CHARACTERS


def test_ten_megabytes_of_standard_error_do_not_block(
    subject: Subject, small: tuple[Case, Inputs]
) -> None:
    assert subject.run(hostile("loud_stderr"), *small).reason == "ValueError: after ten megabytes"


@pytest.mark.parametrize("name", ["hang", "spin"])
def test_a_hang_is_a_timeout_that_shows_where(
    impatient: Subject, small: tuple[Case, Inputs], name: str
) -> None:
    before, start = set(workers()), time.monotonic()
    first, second = (impatient.run(hostile(name), *small) for _ in range(2))
    assert time.monotonic() - start < 30
    assert (first.outcome, first.reason) == ("timeout", "no answer within 1 s")
    assert (second.outcome, second.reason) == ("timeout", "no answer within 0.2 s")
    assert f"in {name}" in (first.detail or "")
    assert set(workers()) <= before


@pytest.mark.parametrize("when", ["loading", "running"])
def test_an_interrupt_ends_the_worker_and_the_subject_stays_usable(
    small: tuple[Case, Inputs], tmp_path: Path, when: str
) -> None:
    endless = tmp_path / "endless.py"
    endless.write_text("while True:\n    pass\n")
    backend = f"{endless}:batch_norm" if when == "loading" else hostile("spin")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        with scratch_folder() as scratch, Subject(scratch=scratch) as subject:
            if when == "running":
                subject.describe([backend])
            before = set(workers())
            signal.setitimer(signal.ITIMER_REAL, 0.5)
            with pytest.raises(KeyboardInterrupt):
                subject.run(backend, *small)
            assert set(workers()) <= before
            assert subject.run(GOOD, *small).outcome == "done"
            assert len(list(scratch.iterdir())) == 2  # the new worker's
    finally:
        signal.signal(signal.SIGALRM, previous)


def test_closing_kills_workers_and_their_children(small: tuple[Case, Inputs]) -> None:
    with scratch_folder() as scratch:
        with Subject(scratch=scratch) as subject:
            child = int(subject.run(hostile("leaves_a_child"), *small).kernel or 0)
            worker = int(subject.run(echo("process"), *small).kernel or 0)
            assert not is_gone(child)
            assert not is_gone(worker)
        assert wait_until(lambda: is_gone(child) and is_gone(worker))
        assert list(scratch.iterdir()) == []


def test_a_worker_that_dies_between_runs_is_replaced(
    subject: Subject, small: tuple[Case, Inputs]
) -> None:
    first = int(subject.run(echo("process"), *small).kernel or 0)
    os.kill(first, signal.SIGKILL)
    os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
    second = subject.run(echo("process"), *small)
    assert second.outcome == "done"
    assert second.kernel != str(first)


AUDITOR = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from correct import prepare
from bnaudit.subject import Subject, scratch_folder
with scratch_folder() as scratch, Subject(scratch=scratch) as subject:
    small = prepare(Path(sys.argv[2]), sys.argv[3])
    print(scratch, subject.run(sys.argv[4], *small).kernel, flush=True)
    subject.run(sys.argv[5], *small)
"""


def test_a_killed_auditor_takes_its_workers_along_and_the_next_one_tidies_up(
    tmp_path: Path,
) -> None:
    arguments = [str(Path(__file__).parent), str(tmp_path), SMALL, echo("process"), hostile("spin")]
    with subprocess.Popen(
        [sys.executable, "-c", AUDITOR, *arguments], stdout=subprocess.PIPE, text=True
    ) as auditor:
        assert auditor.stdout is not None
        folder, pid = auditor.stdout.readline().split()
        assert wait_until(lambda: len(psutil.Process(auditor.pid).children()) == 2)
        processes = psutil.Process(auditor.pid).children(recursive=True)
        assert int(pid) in [process.pid for process in processes]
        auditor.kill()
    assert wait_until(lambda: all(is_gone(process.pid) for process in processes))
    # What it left may be gone by now: another auditor of this machine may have tidied up.
    with scratch_folder():
        assert not Path(folder).exists()


def test_scratch_folders_of_the_living_and_of_others_are_left_alone() -> None:
    with scratch_folder() as first, scratch_folder() as second:
        assert first != second
        # A dead process's number, but somebody holds the lock: an auditor in another container.
        elsewhere = first.with_name("bnaudit-99999999-elsewhere")
        holder = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], 0), 2); print(flush=True); input()"
        elsewhere.mkdir()
        with subprocess.Popen(
            [sys.executable, "-c", holder, str(elsewhere)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            with scratch_folder():
                assert first.is_dir()
                assert elsewhere.is_dir()
            process.kill()
        with scratch_folder():
            assert not elsewhere.exists()
    assert not first.exists()


def test_the_scratch_folder_goes_when_an_audit_fails() -> None:
    def fails() -> None:
        with scratch_folder() as scratch:
            (scratch / "x.npy").write_bytes(b"x")
            folders.append(scratch)
            raise OSError("no room")

    folders: list[Path] = []
    with pytest.raises(OSError, match="no room"):
        fails()
    assert not folders[0].exists()


def test_without_room_in_shared_memory_the_scratch_folder_is_an_ordinary_one() -> None:
    with scratch_folder(room=2**62) as scratch:
        assert scratch.parent == Path(tempfile.gettempdir())
        assert scratch.name.startswith(f"bnaudit-{os.getpid()}-")
        assert scratch.stat().st_mode & 0o077 == 0


def test_outputs_are_read_only_and_leave_no_files(tmp_path: Path) -> None:
    text = "input: {distribution: normal}\nshape: [8, 64, 40, 40]\nbackward: true\n"
    case, inputs = prepare(tmp_path, text)
    with scratch_folder() as scratch, Subject(scratch=scratch) as subject:
        first = subject.run(GOOD, case, inputs)
        kept = first.outputs["y"].copy()
        subject.run(echo("tensors"), case, inputs)
        assert subject.run(GOOD, case, inputs).outcome == "done"
        np.testing.assert_array_equal(first.outputs["y"], kept)
        assert not any(array.flags.writeable for array in first.outputs.values())
        assert list(scratch.rglob("*.npy")) == []


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("size", [2, 128])
def test_tensors_arrive_bit_for_bit_in_the_memory_format(
    subject: Subject, tmp_path: Path, memory_format: str, dtype: str, size: int
) -> None:
    text = "input: {distribution: nonfinite, base: {distribution: normal}, values: [nan, -.inf], count: 3}\n"
    text += f"shape: [2, 3, {size}, {size}]\ndtype: {dtype}\nmemory_format: {memory_format}\nbackward: true\n"
    text += "affine: {weight: {distribution: normal}, bias: {distribution: normal}}\nsteps: 2\n"
    case, inputs = prepare(tmp_path, text)
    reply = subject.run(echo("tensors"), case, inputs)
    assert (reply.outcome, reply.reason) == ("done", None)
    assert inputs.grad_output is not None
    assert reply.outputs["y"].tobytes() == inputs.x[-1].tobytes()
    assert reply.outputs["grad_input"].tobytes() == inputs.grad_output[-1].tobytes()
    np.testing.assert_array_equal(reply.outputs["batch_mean"], inputs.weight)
    np.testing.assert_array_equal(reply.outputs["batch_var"], inputs.bias)
    strides = {
        "contiguous": (3 * size * size, size * size, size, 1),
        "channels_last": (3 * size * size, 1, 3 * size, 3),
        "strided": (6 * size * size, 2 * size * size, 2 * size, 2),
    }[memory_format]
    item = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}[dtype]
    assert reply.kernel == f"0.1 {dtype} {tuple(item * stride for stride in strides)}"


def test_an_empty_batch_passes_through(subject: Subject, tmp_path: Path) -> None:
    case, inputs = prepare(tmp_path, SMALL.replace("[2, 3, 4, 5]", "[0, 3, 4, 5]"))
    reply = subject.run(GOOD, case, inputs)
    assert reply.outcome == "done"
    assert reply.outputs["y"].shape == reply.outputs["grad_input"].shape == (0, 3, 4, 5)
    np.testing.assert_array_equal(reply.outputs["running_mean"], inputs.running_mean)


def test_momentum_null_reaches_a_plugin_as_one_over_the_step(
    subject: Subject, tmp_path: Path
) -> None:
    text = "input: {distribution: normal}\nshape: [4, 2]\nmomentum: null\nsteps: 4\n"
    case, inputs = prepare(tmp_path, text)
    assert (subject.run(echo("tensors"), case, inputs).kernel or "").startswith("0.25 ")
    reply = subject.run(echo("in_place_running"), case, inputs)
    # In place, and handed on from step to step. Whoever keeps one of them keeps both: running_var is judged.
    np.testing.assert_allclose(reply.outputs["running_mean"], 1 + 1 / 2 + 1 / 3 + 1 / 4, rtol=1e-6)
    np.testing.assert_array_equal(reply.outputs["running_var"], [1, 1])


def test_in_inference_running_statistics_are_reported_as_they_were_left(
    subject: Subject, tmp_path: Path
) -> None:
    text = "input: {distribution: normal}\nshape: [4, 2]\nmode: inference\n"
    reply = subject.run(echo("in_place_running"), *prepare(tmp_path, text))
    np.testing.assert_allclose(reply.outputs["running_mean"], 0.1, rtol=1e-6)
    np.testing.assert_array_equal(reply.outputs["running_var"], [1, 1])


def test_declarations_come_back_with_the_reply(
    subject: Subject, small: tuple[Case, Inputs], tmp_path: Path
) -> None:
    path = tmp_path / "declares.py"
    path.write_text(
        "def batch_norm(x, *arguments, **options):\n    return x.copy()\n"
        "batch_norm.running_var_correction = 0\nbatch_norm.running_update = 'caffe'\n"
    )
    assert subject.run(f"{path}:batch_norm", *small).declarations == Declarations(0, "caffe")
    assert subject.run(GOOD, *small).declarations == Declarations(1, "ema")


def test_a_plugin_finds_its_neighbours_and_not_the_worker(
    small: tuple[Case, Inputs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "layout.py").write_text("def scale():\n    return 1\n")
    (tmp_path / "numpy.py").write_text(
        "import numpy, layout\n"
        "def batch_norm(x, *arguments, **options):\n    return x * numpy.float32(layout.scale())\n"
    )
    package = tmp_path / "package"
    package.mkdir()
    (package / "kernels.py").write_text(
        "def mine(x, *arguments, **options):\n    return x.copy()\n"
    )
    monkeypatch.chdir(tmp_path)
    with scratch_folder() as scratch, Subject(scratch=scratch) as subject:
        for backend in ("numpy.py:batch_norm", "./numpy.py:batch_norm@cpu", "package.kernels:mine"):
            assert subject.run(backend, *small).reason is None


def test_a_worker_gets_the_threads_and_absolute_paths(
    small: tuple[Case, Inputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["src", "/opt/lib"]))
    with scratch_folder() as scratch, Subject(scratch=scratch, threads=3) as subject:
        kernel = subject.run(echo("surroundings"), *small).kernel or ""
        openmp, openblas, numba, pythonpath, folder, *path = kernel.split("\n")
        assert (openmp, openblas, numba) == ("3", "3", "3")
        assert pythonpath == os.pathsep.join([str(Path.cwd() / "src"), "/opt/lib"])
        assert Path(folder).parent == scratch
        assert not any("bnaudit/worker" in entry for entry in path)


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        ("nope@cpu", "there is no backend nope@cpu"),
        ("no/such/file.py:batch_norm", "no/such/file.py"),
        (hostile("absent"), "hostile.py has no function named absent"),
        (hostile("_MuteError"), "is a class, but no torch.nn.Module"),
        (hostile("segfault@cuda"), "takes NumPy arrays, which are on the cpu"),
        ("no.such.package:batch_norm", "no.such.package cannot be imported"),
    ],
)
def test_a_backend_that_is_not_there_is_unavailable(
    subject: Subject, small: tuple[Case, Inputs], backend: str, reason: str
) -> None:
    assert reason in (subject.describe([backend])[backend] or "")
    reply = subject.run(backend, *small)
    assert reply.outcome == "unavailable"
    assert reason in (reply.reason or "")


@pytest.mark.parametrize(
    ("source", "outcome", "reason"),
    [
        ("import no_such_module", "unavailable", "No module named 'no_such_module'"),
        (
            "from . import neighbour",
            "unavailable",
            "no known parent package (a file is in no package: name it package.module:NAME)",
        ),
        (
            "open('table.npy')",
            "crash",
            "'table.npy' (plug-ins run in a folder of their own; use Path(__file__).parent)",
        ),
        ("def batch_norm(:", "crash", "SyntaxError"),
        ("import sys; sys.exit('bye')", "crash", "SystemExit: bye"),
        ("import os; os._exit(5)", "crash", "exited with code 5"),
        ("def batch_norm(x): pass", "contract", "cannot be called with (x, weight, bias, runn"),
        (
            "def batch_norm(*a, **o): pass\nbatch_norm.tensors = 'jax'",
            "unavailable",
            "asks for 'jax' tensors; there are 'numpy' (the default) and 'torch'",
        ),
    ],
)
def test_a_plugin_that_does_not_load_says_why(
    subject: Subject,
    small: tuple[Case, Inputs],
    tmp_path: Path,
    source: str,
    outcome: str,
    reason: str,
) -> None:
    path = tmp_path / "broken.py"
    path.write_text(source)
    backend = f"{path}:batch_norm"
    described = subject.describe([backend])[backend]
    assert (described is not None) == (outcome == "unavailable")
    reply = subject.run(backend, *small)
    assert reply.outcome == outcome
    assert reason in (reply.reason or "")


@pytest.mark.parametrize("form", ["file", "module"])
def test_the_traceback_of_an_import_begins_in_the_plugin(
    small: tuple[Case, Inputs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    (tmp_path / "broken.py").write_text("def fail():\n    return 1 / 0\n\n\nfail()\n")
    monkeypatch.chdir(tmp_path)
    with scratch_folder() as scratch, Subject(scratch=scratch) as subject:
        name = "broken.py:batch_norm" if form == "file" else "broken:batch_norm"
        detail = subject.run(name, *small).detail or ""
    assert detail.startswith("Traceback (most recent call last):\n")
    assert 'broken.py", line 5, in <module>' in detail.splitlines()[1]
    assert "importlib" not in detail


DESCRIBE = "import os, sys\nsys.modules['bnaudit_worker.environment'].describe = lambda library: "
IMPORTS = {
    "forks": "import os\nos.fork()\n",
    "exits": "import os\nos._exit(3)\n",
    "dies when asked": f"{DESCRIBE}os._exit(7)\n",
    "answers nonsense": f"{DESCRIBE}3\n",
    "has a torch.py beside it": "import torch\n",
    "answers for the worker": "import os\nfor d in range(3, 32):\n    try:\n"
    '        os.write(d, b\'{"id": 1, "outcome": "done"}\\n\')\n    except OSError:\n        pass\n',
}


@pytest.mark.parametrize("how", IMPORTS)
def test_a_plugin_that_breaks_its_worker_leaves_the_others_alone(
    small: tuple[Case, Inputs], tmp_path: Path, how: str
) -> None:
    path = tmp_path / "breaks.py"
    path.write_text(
        f"{IMPORTS[how]}def batch_norm(x, *arguments, **options):\n    return x.copy()\n"
        "batch_norm.tensors = 'torch' if 'torch' in globals() else 'numpy'\n"
    )
    if "torch" in how:
        (tmp_path / "torch.py").write_text("float32 = None\n")
    backend = f"{path}:batch_norm"
    with scratch_folder() as scratch, Subject(scratch=scratch) as subject:
        subject.describe([GOOD, backend])
        for _ in range(2):
            found = subject.environment()
            assert found["python"] == ".".join(map(str, sys.version_info[:3]))
            assert found["devices"] == []
            assert subject.run(GOOD, *small).outcome == "done"
            reply = subject.run(backend, *small)
            assert reply.outcome == "done" or reply.reason
            if how == "forks":
                assert (reply.outcome, reply.reason) == ("done", None)


def test_an_interpreter_that_cannot_serve_makes_everything_unavailable(
    small: tuple[Case, Inputs], tmp_path: Path
) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho no numpy here >&2\nexit 1\n")
    for python in (str(tmp_path / "absent"), str(script)):
        if python == str(script):
            script.chmod(0o755)
        with scratch_folder() as scratch, Subject(scratch=scratch, command=(python,)) as subject:
            reply = subject.run(GOOD, *small)
            assert reply.outcome == "unavailable"
            assert f"no worker starts in {python}: " in (reply.reason or "")
            with pytest.raises(SubjectError, match=re.escape(python)):
                subject.environment()


def test_the_environment_describes_interpreter_machine_and_packages(subject: Subject) -> None:
    found = subject.environment()
    assert found["name"] == "current"
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["threads"] == 2
    assert found["packages"]["numpy"] == np.__version__
    assert found["cpu"]["model"]
    assert isinstance(found["cpu"]["isa"], str)
    assert (found["devices"], found["flags"]) == ([], {})


def test_without_torch_its_backends_say_how_to_get_it(
    small: tuple[Case, Inputs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')"
    (tmp_path / "torch.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with scratch_folder() as scratch, Subject(scratch=scratch) as subject:
        reply = subject.run("torch@cpu", *small)
        assert reply.outcome == "unavailable"
        assert reply.reason == (
            "torch is not installed in this environment (pip install 'bnaudit[torch]')"
        )
        assert subject.environment()["flags"] == {}


def test_importing_the_auditors_side_imports_no_framework() -> None:
    code = "import sys, bnaudit.subject; assert not {'torch', 'cupy', 'jax'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
    # The check itself can fail: the assertion sees a module that is there.
    broken = code.replace("bnaudit.subject;", "bnaudit.subject; sys.modules['torch'] = sys;")
    assert subprocess.run([sys.executable, "-c", broken], capture_output=True).returncode == 1


def test_a_plug_in_that_gives_other_bits_the_second_time_is_told_of(
    subject: Subject, small: tuple[Case, Inputs]
) -> None:
    reply = subject.run(hostile("drifts"), *small)
    assert reply.outcome == "done"
    assert reply.not_repeatable == "y[1,2,3,4] was 1.0, then 2.0"
    assert reply.outputs["y"][1, 2, 3, 4] == 1
    assert subject.run(GOOD, *small).not_repeatable is None


def test_a_reply_is_empty_until_it_says_otherwise() -> None:
    reply = Reply("timeout", "no answer within 60 s")
    assert (reply.outputs, reply.kernel, reply.seconds) == ({}, None, None)
