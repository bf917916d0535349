"""SyncBatchNorm on ranks of its own: what it computes, and what becomes of ranks that end."""

from __future__ import annotations

import importlib.util
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pytest
from correct import outputs as right_outputs
from correct import prepare
from hypothesis import given
from hypothesis import strategies as st

from bnaudit.subject import Reply, Subject, scratch_folder
from bnaudit.worker.backends import _torch_sync
from bnaudit.worker.rounding import widen

if importlib.util.find_spec("torch") is None:
    pytest.skip("torch is not installed", allow_module_level=True)
if _torch_sync.unavailable("torch-sync@cpu") is not None:
    pytest.skip(str(_torch_sync.unavailable("torch-sync@cpu")), allow_module_level=True)

Array = npt.NDArray[Any]

TWO, FOUR = "torch-sync@cpu", "torch-sync-4@cpu"
HALF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
NORMAL = "input: {distribution: normal, mean: 1.5}\nshape: [5, 3, 4, 6]\n"


@pytest.fixture(scope="module")
def subject() -> Iterator[Subject]:
    with scratch_folder() as scratch, Subject(scratch=scratch, threads=2) as subject:
        yield subject


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Groups of this process, started in a folder of their own, which are closed afterwards."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for group in list(_torch_sync._groups.values()):
        group.close()
    _torch_sync._groups.clear()


def run(subject: Subject, folder: Path, text: str, backend: str) -> Reply:
    return subject.run(backend, *prepare(folder, text))


def call(
    x: Array, function: Callable[..., Any] = _torch_sync.torch_sync_2_cpu, **changed: Any
) -> dict[str, Any]:
    channels = [np.ones(x.shape[1], np.float32) for _ in range(4)]
    options = {"training": True, "momentum": 0.1, "eps": 1e-5, "grad_output": None, **changed}
    found: dict[str, Any] = function(x, *channels, **options)
    return found


def ranks() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "_torch_sync" in str(child.cmdline())]


def new_workers(before: list[psutil.Process]) -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if child not in before]


def gone(processes: list[psutil.Process], seconds: float = 10) -> bool:
    return not psutil.wait_procs(processes, seconds)[1]


@given(st.integers(0, 100), st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any))
def test_the_shares_follow_each_other_and_are_as_near_as_can_be(
    images: int, shares: list[int]
) -> None:
    parts = _torch_sync.split(images, shares)
    everything = [image for part in parts for image in range(images)[part]]
    assert everything == list(range(images))
    for part, share in zip(parts, shares, strict=True):
        assert abs((part.stop - part.start) - images * share / sum(shares)) <= 1
        assert share or part.stop == part.start


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize(
    "fields",
    [
        "backward: true\naffine: {weight: {distribution: normal}, bias: 2}\n",
        "backward: true\naffine: null\n",
        "mode: inference\nbackward: true\nrunning: {mean: 1, var: 2}\n",
        "steps: 3\nmomentum: null\n",
    ],
    ids=["training", "no-affine", "inference", "cumulative"],
)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    # 16 bits on an empty rank are the next test's.
    [*((TWO, dtype) for dtype in HALF), (FOUR, "float32"), (FOUR, "float64")],
)
def test_every_kind_of_case_gives_the_right_quantities(
    subject: Subject, tmp_path: Path, backend: str, memory_format: str, dtype: str, fields: str
) -> None:
    text = f"{NORMAL}dtype: {dtype}\nmemory_format: {memory_format}\n{fields}"
    case, inputs = prepare(tmp_path, text)
    reply = subject.run(backend, case, inputs)
    assert (reply.outcome, reply.reason) == ("done", None)
    expected = right_outputs(case, inputs)
    names = {"y", "running_mean", "running_var"}
    if case.backward:
        names |= {"grad_input"} | ({"grad_weight", "grad_bias"} if case.affine else set())
    shares = {TWO: "3+2", FOUR: "3+0+1+1"}[backend]
    if case.mode == "training":
        names |= {"batch_mean", "invstd"}
        assert reply.kernel == f"SyncBatchNorm, gloo, shares {shares}; its CUDA operators modelled"
    else:
        assert reply.kernel == f"F.batch_norm on each rank, shares {shares}"
    assert reply.outputs.keys() == names
    for name, got in reply.outputs.items():
        right, near = expected[name], 64 * HALF[dtype]
        if name in ("y", "grad_input"):
            got, right = widen(got, dtype), widen(right, dtype)
        np.testing.assert_allclose(got, right, atol=near, rtol=near, err_msg=name)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_torch_cannot_gather_an_empty_rank_among_others_in_16_bits(
    subject: Subject, tmp_path: Path, dtype: str
) -> None:
    reply = run(subject, tmp_path, f"{NORMAL}dtype: {dtype}\n", FOUR)
    assert reply.outcome == "crash"
    text = f"torch gathers zeros in {dtype} from a rank without elements, float32 from others"
    assert (reply.reason or "").startswith(f"RuntimeError: {text}: rank 1 of 4 ")
    assert "size doesn't match" in (reply.reason or "")
    assert run(subject, tmp_path, NORMAL, FOUR).outcome == "done"


@pytest.mark.parametrize("backend", [TWO, FOUR])
def test_an_empty_batch_wears_the_running_statistics_away(
    subject: Subject, tmp_path: Path, backend: str
) -> None:
    # torch's merge of no counts at all has mean 0 and variance 0; F.batch_norm leaves them alone.
    text = "input: {distribution: normal}\nshape: [0, 3, 2, 2]\nbackward: true\n"
    reply = run(subject, tmp_path, f"{text}running: {{mean: 5, var: 2}}\n", backend)
    assert (reply.outcome, reply.reason) == ("done", None)
    assert reply.outputs["y"].size == reply.outputs["grad_input"].size == 0
    np.testing.assert_allclose(reply.outputs["running_mean"], [4.5] * 3)
    np.testing.assert_allclose(reply.outputs["running_var"], [1.8] * 3)
    np.testing.assert_array_equal(reply.outputs["grad_weight"], [0, 0, 0])
    assert not {"batch_mean", "invstd"} & reply.outputs.keys()


def test_one_value_per_channel_is_not_refused_and_spoils_the_running_variance(
    subject: Subject, tmp_path: Path
) -> None:
    text = "input: {distribution: constant, value: 7}\nshape: [1, 3]\n"
    reply = run(subject, tmp_path, text, TWO)
    assert (reply.outcome, reply.reason) == ("done", None)
    np.testing.assert_array_equal(reply.outputs["y"], [[0, 0, 0]])
    assert not np.isfinite(reply.outputs["running_var"]).any()
    assert run(subject, tmp_path, text, "torch@cpu").outcome == "unsupported"


def test_merging_does_not_keep_a_constant(subject: Subject, tmp_path: Path) -> None:
    # (2 · (1/3)) · c + (1 · (1/3)) · c in float32 is an ulp away from c; a rank alone has c itself.
    text = "input: {distribution: constant, value: 12345.678}\nshape: [3, 4, 7, 7]\n"
    reply = run(subject, tmp_path, text, TWO)
    value = np.float32(12345.678)
    assert reply.outputs["batch_mean"][0] == np.nextafter(value, 0)
    assert np.abs(reply.outputs["y"]).max() == pytest.approx(0.309, abs=0.001)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_parameters_round_the_counts_and_so_the_mean(
    subject: Subject, tmp_path: Path, dtype: str
) -> None:
    # In bfloat16 4116 and 2156 are 4128 and 2160, and together 6272: the weights' sum is 1.0026. In
    # float16 131072 is infinite.
    shape = {"float16": "3, 2, 256, 256", "bfloat16": "32, 2, 14, 14"}[dtype]
    text = f"input: {{distribution: normal, mean: 100}}\nshape: [{shape}]\ndtype: {dtype}\n"
    reply = run(subject, tmp_path, text + "param_dtype: same\n", TWO)
    assert (reply.outcome, reply.reason) == ("done", None)
    if dtype == "float16":
        assert np.isnan(reply.outputs["y"]).all()
    else:
        np.testing.assert_allclose(reply.outputs["batch_mean"], 100.26, atol=0.05)
    right = run(subject, tmp_path, text, TWO)
    np.testing.assert_allclose(right.outputs["batch_mean"], 100, atol=0.05)


def test_where_nothing_is_synchronized_the_result_is_that_of_f_batch_norm(
    subject: Subject, tmp_path: Path
) -> None:
    text = f"{NORMAL}mode: inference\nbackward: true\naffine: null\n"
    ours, theirs = (run(subject, tmp_path, text, name) for name in (FOUR, "torch@cpu"))
    for name in ("y", "grad_input", "running_mean", "running_var"):
        np.testing.assert_array_equal(ours.outputs[name], theirs.outputs[name])


# --- the modelled operators -------------------------------------------------------------------------


@np.errstate(over="ignore")  # of a variance in float16
def merged(
    mean: Array, invstd: Array, counts: Array, eps: float, momentum: float, running: Array
) -> tuple[list[Any], ...]:
    """batch_norm_reduce_statistics_kernel for one channel, in NumPy's scalars."""
    f = np.float32
    small = counts.dtype.type
    average, var_n, n = f(0), f(0), 0
    for count, m, inverse in zip(counts, mean, invstd, strict=True):
        v = f(1) / inverse
        v = (v * v - f(eps)) * f(count)
        factor = f(1.0 / np.float64(small(small(n) + count)))
        difference = average - m
        var_n = var_n + (v + difference * difference * f(n) * f(count) * factor)
        average = f(n) * factor * average + f(count) * factor * m
        n = int(f(n) + f(count))
    new = f(momentum)
    statistics = average, var_n / f(n - 1)
    old = [(f(1) - new) * f(was) for was in running]
    left = [small(a + new * b) for a, b in zip(old, statistics, strict=True)]
    return [average, f(1) / np.sqrt(var_n / f(n) + f(eps))], left


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_merge_has_the_bits_of_the_kernels_formulas(dtype: Any) -> None:
    import torch

    random = np.random.default_rng(7)
    for _ in range(200):
        size, channels = int(random.integers(1, 5)), 3
        mean = random.normal(0, 1000, (size, channels)).astype(np.float32)
        invstd = random.uniform(0.01, 300, (size, channels)).astype(np.float32)
        counts = random.integers(1, 9000, size).astype(dtype)
        running = random.uniform(0, 3, (2, channels)).astype(dtype)
        eps, momentum = 1e-5, float(random.uniform(0, 1))
        after = [torch.from_numpy(part.copy()) for part in running]
        got = _torch_sync.batch_norm_gather_stats_with_counts(
            torch.zeros(1, channels),
            torch.from_numpy(mean),
            torch.from_numpy(invstd),
            after[0],
            after[1],
            momentum,
            eps,
            torch.from_numpy(counts),
        )
        for c in range(channels):
            expected, left = merged(mean[:, c], invstd[:, c], counts, eps, momentum, running[:, c])
            assert [tensor[c].numpy() for tensor in got] == expected
            assert [tensor[c].numpy() for tensor in after] == left


def test_the_merge_depends_on_the_order_of_ranks_so_the_comparison_can_fail() -> None:
    mean = np.array([[1.0], [1000.1], [3.3]], np.float32)
    counts = np.array([7, 5, 3], np.float32)
    ones = np.ones_like(mean)
    forward = merged(mean[:, 0], ones[:, 0], counts, 1e-5, 0.1, ones[:2, 0])
    backward = merged(mean[::-1, 0], ones[:, 0], counts[::-1], 1e-5, 0.1, ones[:2, 0])
    assert forward != backward


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_rank_has_the_exact_statistics_of_a_constant(dtype: str) -> None:
    import torch

    x = torch.full((5, 3, 7, 7), 3.3, dtype=getattr(torch, dtype))
    mean, invstd = _torch_sync.batch_norm_stats(x, 1e-5)
    assert mean.dtype == invstd.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    assert (mean == x[0, 0, 0, 0]).all()
    eps = float(np.float64(1e-5) if dtype == "float64" else np.float32(1e-5))
    assert (invstd == torch.tensor(1 / np.sqrt(eps), dtype=mean.dtype)).all()
    assert (_torch_sync.batch_norm_stats(x, 0.0)[1] == 0).all()


# --- the ranks --------------------------------------------------------------------------------------


def test_no_rank_runs_before_the_first_call_and_none_survives_the_worker(tmp_path: Path) -> None:
    case, inputs = prepare(tmp_path, NORMAL)
    before = psutil.Process().children()
    with scratch_folder() as scratch, Subject(scratch=scratch, threads=2) as subject:
        assert subject.describe([TWO]) == {TWO: None}
        (worker,) = new_workers(before)
        assert worker.children() == []
        assert subject.run(TWO, case, inputs).outcome == "done"
        started = worker.children()
        assert len(started) == 2
        assert subject.run(TWO, case, inputs).outcome == "done"
        assert worker.children() == started
    assert gone([worker, *started])


def test_no_rank_survives_a_worker_that_is_killed(tmp_path: Path) -> None:
    case, inputs = prepare(tmp_path, NORMAL)
    before = psutil.Process().children()
    with scratch_folder() as scratch, Subject(scratch=scratch, threads=2) as subject:
        assert subject.run(TWO, case, inputs).outcome == "done"
        (worker,) = new_workers(before)
        started = worker.children()
        worker.kill()
        assert gone(started)


def test_a_rank_that_was_killed_ends_the_call_and_the_next_one_has_a_new_group(
    alone: Path,
) -> None:
    x = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
    before = call(x)
    started = ranks()
    assert len(started) == 2
    started[1].kill()
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"^rank 1 of 2 was killed by SIGKILL"):
        call(x)
    assert time.monotonic() - start < 5
    assert gone(started)
    assert list(alone.iterdir()) == []
    after = call(x)
    assert after.keys() == before.keys()
    np.testing.assert_array_equal(after["y"], before["y"])
    assert not set(ranks()) & set(started)


def test_a_rank_that_is_killed_while_another_waits_for_it_ends_the_call(alone: Path) -> None:
    x = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
    call(x)
    started = ranks()
    started[0].send_signal(signal.SIGSTOP)
    timer = threading.Timer(0.5, started[0].kill)
    timer.start()
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"^rank 0 of 2 was killed by SIGKILL"):
        call(x)
    assert 0.4 < time.monotonic() - start < 5
    assert gone(started)


class Poison:
    """Ends the process in which it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (3,)


def test_the_reason_has_the_exit_status_or_the_last_line_of_standard_error(alone: Path) -> None:
    group = _torch_sync.Group("cpu", 2)
    with pytest.raises(RuntimeError, match=r"^rank 1 of 2 exited with code 3$"):
        group.call([None, Poison()])
    assert group.closed
    group = _torch_sync.Group("cpu", 1)
    with pytest.raises(
        RuntimeError, match=r"^rank 0 of 1 exited with code 1: .*TypeError: _answer"
    ):
        group.call([("too", "few")])
    assert ranks() == []


def test_an_exception_on_a_rank_names_it_and_ends_the_others_that_wait(alone: Path) -> None:
    import torch

    ones = [torch.ones(2) for _ in range(4)]
    options = {"training": True, "momentum": 0.1, "eps": 1e-5}
    good, bad = (
        (torch.ones(4, 2), [*ones[:3], w], None, options) for w in (ones[3], torch.ones(5))
    )
    group = _torch_sync.Group("cpu", 2)
    started = ranks()
    with pytest.raises(RuntimeError, match=r"^rank 1 of 2 raised RuntimeError: "):
        group.call([good, bad])
    assert group.closed
    assert gone(started)


def test_what_torch_refuses_on_every_rank_is_unsupported_and_the_group_goes_on(
    alone: Path,
) -> None:
    x = np.ones((4, 2), np.float32)
    call(x)
    started = ranks()
    with pytest.raises(NotImplementedError, match="eps must be non-negative"):
        call(x, training=False, eps=-1.0)
    call(x)
    assert ranks() == started


def test_ranks_that_do_not_agree_are_an_error() -> None:
    same = {"running_mean": np.array([1.0, np.nan]), "y": np.zeros(1)}
    assert _torch_sync._agreed([same, dict(same)]).keys() == {"running_mean"}
    other = dict(same, running_mean=np.array([np.nextafter(1.0, 2), np.nan]))
    with pytest.raises(RuntimeError, match="ranks 0 and 2 do not agree about running_mean"):
        _torch_sync._agreed([same, same, other])


def test_over_nccl_there_must_be_a_gpu_for_each_of_two_ranks() -> None:
    import torch

    reason = _torch_sync.unavailable("torch-sync@cuda")
    if torch.cuda.device_count() >= 2:
        assert reason is None
    elif torch.cuda.is_available():
        assert reason == "SyncBatchNorm over nccl needs a GPU for each rank, and there is only one"
    else:
        assert "CUDA" in (reason or "") or "no GPU" in (reason or "")


@pytest.mark.gpu
def test_on_gpus_the_ranks_merge_over_nccl(subject: Subject, tmp_path: Path) -> None:
    reason = subject.describe(["torch-sync@cuda"])["torch-sync@cuda"]
    if reason is not None:
        pytest.skip(reason)
    case, inputs = prepare(tmp_path, NORMAL + "backward: true\n")
    reply = subject.run("torch-sync@cuda", case, inputs)
    assert (reply.outcome, reply.reason) == ("done", None)
    assert (reply.kernel or "").startswith("SyncBatchNorm, nccl, shares ")
    expected = right_outputs(case, inputs)
    for name in ("y", "grad_input", "running_mean", "running_var"):
        np.testing.assert_allclose(reply.outputs[name], expected[name], atol=1e-5, rtol=1e-5)
