"""PyTorch's SyncBatchNorm: ranks share the batch and merge their statistics over a process group.

torch's own is the autograd function behind torch.nn.SyncBatchNorm: its collectives (gloo on the CPU, nccl on
GPUs), its counts, what it does with a rank that has no elements, and its backward.

On the CPU the five operators below are modelled, because torch has them for GPUs only: there SyncBatchNorm
refuses its input. They follow the kernels in torch's aten/src/ATen/native/cuda/Normalization.cuh formula by
formula, in the same dtypes, but without the fused multiply-adds that nvcc makes of them. A rank's own mean and
variance come from torch.var_mean, which adds up in double, so that what shows is the merge.

The ranks are processes with one thread each. They start with the first call, stay for later ones, and share
the batch unequally. SyncBatchNorm begins by making its part of a strided tensor dense; so do they.
y and grad_input are put together in the batch's order; the gradients of weight and bias are summed over the
ranks (DistributedDataParallel averages them). Inference synchronizes nothing. Requires torch 2.0 or later.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import operator
import os
import pickle
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING

import numpy as np

from . import _torch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from ..rounding import Array
    from ._torch import Outputs, Tensor

    Reply = tuple[str, Any]

FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
"""The worker's, which a rank loads as the package `bnaudit_worker`, just as the worker itself was."""

START = """\
import importlib.util, sys
sys.path[:] = filter(None, sys.path)  # not the current folder
package = "bnaudit_worker"
spec = importlib.util.spec_from_file_location(
    package, sys.argv[1] + "/__init__.py", submodule_search_locations=[sys.argv[1]]
)
sys.modules[package] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[package])
importlib.import_module(package + ".backends._torch_sync").serve(*sys.argv[2:])
"""

GRACE = 1.0
"""Seconds in which it may turn out that the rank which failed first did so because another had ended."""

LAST = 5.0
"""Seconds for a process that closed its pipe to end."""

MERGED = ("running_mean", "running_var", "batch_mean", "invstd")
"""What every rank must come out with in the same bits."""

INDEX_MAX = 2**31 - 1

_groups: dict[tuple[str, tuple[int, ...]], Group] = {}


describe = _torch.describe


def unavailable(name: str) -> str | None:
    """Why a backend of this module cannot run here, or None."""
    reason = _torch.unavailable("torch@cuda" if name.endswith("@cuda") else "torch@cpu")
    if reason is not None:
        return reason
    import torch
    import torch.distributed

    # Before 2.0 SyncBatchNorm asks CUDA, also where there is none, whether it captures a graph.
    if int(torch.__version__.split(".")[0]) < 2:
        return "torch %s is too old for this SyncBatchNorm: 2.0 is needed" % torch.__version__
    if not torch.distributed.is_available():
        return "torch %s is built without torch.distributed" % torch.__version__
    if name.endswith("@cuda"):
        if not torch.distributed.is_nccl_available():
            return "torch %s is built without nccl" % torch.__version__
        if torch.cuda.device_count() < 2:
            return "SyncBatchNorm over nccl needs a GPU for each rank, and there is only one"
    elif not torch.distributed.is_gloo_available():
        return "torch %s is built without gloo" % torch.__version__
    return None


def torch_sync_2_cpu(*tensors: Array | None, **options: Any) -> Outputs:
    """SyncBatchNorm over gloo on two ranks that share the batch 2 to 1."""
    return _run("cpu", (2, 1), tensors, **options)


def torch_sync_4_cpu(*tensors: Array | None, **options: Any) -> Outputs:
    """SyncBatchNorm over gloo on four ranks that share the batch 3 to 0 to 2 to 1."""
    return _run("cpu", (3, 0, 2, 1), tensors, **options)


@_torch.within_memory
def torch_sync_cuda(*tensors: Array | None, **options: Any) -> Outputs:
    """SyncBatchNorm over nccl on one rank per GPU, the first of which gets twice as much as any other."""
    import torch

    return _run("cuda", (2, *[1] * (torch.cuda.device_count() - 1)), tensors, **options)


def split(images: int, shares: Sequence[int]) -> list[slice]:
    """The part of a batch that each rank gets, next to each other and as near to its share as can be."""
    total = sum(shares)
    ends = [(images * sum(shares[: i + 1]) + total // 2) // total for i in range(len(shares))]
    return [slice(start, end) for start, end in zip([0, *ends], ends)]  # noqa: B905 - Python 3.7


def _run(
    device: str,
    shares: tuple[int, ...],
    tensors: tuple[Array | None, ...],
    *,
    grad_output: Array | None,
    **options: Any,
) -> Outputs:
    """One step on all ranks; raises RuntimeError if one fails or if they do not agree."""
    x, *channels = _torch._ordered(tensors, "cpu")
    gradient = _torch.to_tensor(grad_output, "cpu")
    parts = split(len(x), shares)
    counts = [part.stop - part.start for part in parts]
    # A copy, since pickle would send a whole allocation for a part of it. It has the same order of axes.
    requests = [(_part(x, part), channels, _part(gradient, part), options) for part in parts]
    group = _groups.get((device, shares))
    if group is None:
        group = _groups[device, shares] = Group(device, len(shares))
    try:
        replies = group.call(requests)
    except RuntimeError as error:
        some_empty = 0 in counts and any(counts)
        if not (options["training"] and some_empty and x.element_size() == 2):
            raise
        text = "torch gathers zeros in %s from a rank without elements, float32 from others: %s"
        raise RuntimeError(text % (str(x.dtype)[len("torch.") :], error)) from error
    finally:
        if group.closed:
            del _groups[device, shares]
    outputs = _agreed(replies)
    for name in ("y", "grad_input"):
        if name in replies[0]:
            outputs[name] = np.concatenate([reply[name] for reply in replies])
    for name in ("grad_weight", "grad_bias"):
        if name in replies[0]:
            terms = [_torch.to_tensor(reply[name], "cpu") for reply in replies]
            outputs[name] = _torch.to_array(functools.reduce(operator.add, terms))
    if not x.numel():
        outputs.pop("batch_mean", None)
        outputs.pop("invstd", None)
    return dict(outputs, kernel=_kernel(device, options["training"], counts))


def _part(tensor: Tensor | None, part: slice) -> Tensor | None:
    """A copy of some of the batch that shares no memory with the rest, its axes in the same order."""
    return None if tensor is None else tensor[part].clone()


def _agreed(replies: Sequence[Outputs]) -> Outputs:
    """The statistics that all ranks share; raises RuntimeError where their bits differ."""
    first = replies[0]
    for name in MERGED:
        for rank, reply in enumerate(replies):
            if name in first and reply[name].tobytes() != first[name].tobytes():
                raise RuntimeError("ranks 0 and %d do not agree about %s" % (rank, name))
    return {name: first[name] for name in MERGED if name in first}


def _kernel(device: str, training: bool, counts: Sequence[int]) -> str:
    shares = "+".join(map(str, counts))
    if not training:
        return "F.batch_norm on each rank, shares %s" % shares
    if device == "cuda":
        return "SyncBatchNorm, nccl, shares %s" % shares
    return "SyncBatchNorm, gloo, shares %s; its CUDA operators modelled" % shares


# --- the processes ----------------------------------------------------------------------------------


class Group:
    """The ranks of a process group, each a process of its own.

    closed: whether they are gone, as they are after any failure; a new group is needed then.
    """

    def __init__(self, device: str, size: int) -> None:
        """Starts the processes, which find each other by a file in the current folder."""
        self.closed = False
        self._folder = tempfile.mkdtemp(prefix="torch-sync-", dir=os.getcwd())
        self._ranks: list[_Rank] = []
        atexit.register(self.close)
        try:
            for rank in range(size):
                self._ranks.append(_Rank(device, rank, size, self._folder))
        except BaseException:
            self.close()
            raise

    def call(self, requests: Sequence[Any]) -> list[Outputs]:
        """Each rank's outputs for its request.

        Raises NotImplementedError with what torch refuses, and RuntimeError that names the rank which
        ended or raised something else.
        """
        try:
            for rank, request in zip(self._ranks, requests):  # noqa: B905 - Python 3.7 has no strict
                rank.send(request)
            replies = self._receive()
        except (
            BaseException
        ):  # replies of ranks that go on would be taken for those of the next call
            self.close()
            raise
        failures = [i for i in sorted(replies) if replies[i][0] != "done"]
        if not failures:
            return [replies[i][1] for i in sorted(replies)]
        # A rank that ended makes others raise, and one that raised keeps them waiting.
        culprit = min(failures, key=lambda i: ("ended", "raised", "refused").index(replies[i][0]))
        outcome, text = replies[culprit]
        if outcome == "ended":
            text = self._ranks[culprit].obituary()
        if outcome != "refused" or len(replies) < len(self._ranks):
            self.close()
        if outcome == "refused":
            raise NotImplementedError(text)
        raise RuntimeError("rank %d of %d %s" % (culprit, len(self._ranks), text))

    def _receive(self) -> dict[int, Reply]:
        """Replies by rank: of all of them, or those until one ended, or until GRACE after one failed."""
        replies: dict[int, Reply] = {}
        deadline: float | None = None
        with selectors.DefaultSelector() as selector:
            for index, rank in enumerate(self._ranks):
                selector.register(rank.replies, selectors.EVENT_READ, index)
            while len(replies) < len(self._ranks):
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                events = selector.select(left)
                if not events:
                    break
                for key, _ in events:
                    selector.unregister(key.fileobj)
                    outcome, _ = replies[key.data] = self._ranks[key.data].receive()
                    if outcome == "ended":
                        return replies
                    if outcome != "done" and deadline is None:
                        deadline = time.monotonic() + GRACE
        return replies

    def close(self) -> None:
        """Kills the ranks and removes their files."""
        self.closed = True
        atexit.unregister(self.close)
        for rank in self._ranks:
            rank.kill()
        shutil.rmtree(self._folder, ignore_errors=True)


class _Rank:
    """One process, with this side's ends of its pipes. Its standard error is a file."""

    def __init__(self, device: str, rank: int, size: int, folder: str) -> None:
        self._stderr = os.path.join(folder, "stderr-%d" % rank)
        arguments = [os.getpid(), device, rank, size, os.path.join(folder, "store")]
        # All ranks are on this machine, where the host's own name need not lead back to it.
        interface = "lo0" if sys.platform == "darwin" else "lo"
        with open(self._stderr, "wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-c", START, FOLDER, *map(str, arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=dict(os.environ, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME=interface),
            )
        assert self._process.stdin is not None  # noqa: S101 - both were asked for
        assert self._process.stdout is not None  # noqa: S101
        self._requests, self.replies = self._process.stdin, self._process.stdout

    def send(self, request: Any) -> None:
        """Sends a request; that nobody reads it shows when the reply is awaited."""
        with contextlib.suppress(BrokenPipeError):
            pickle.dump(request, self._requests, pickle.HIGHEST_PROTOCOL)
            self._requests.flush()

    def receive(self) -> Reply:
        """The reply: "done" and the outputs, "refused" or "raised" and the reason, or "ended" without one."""
        try:
            reply: Reply = pickle.load(self.replies)  # noqa: S301 - from a process of our own
            return reply
        except (EOFError, pickle.UnpicklingError):
            return "ended", None

    def obituary(self) -> str:
        """How the process ended, with the last line that it wrote to standard error."""
        try:
            code = self._process.wait(LAST)
        except subprocess.TimeoutExpired:
            how = "closed its end of the connection"
        else:
            how = "exited with code %d" % code
            if code < 0:
                how = "was killed by %s" % signal.Signals(-code).name
        with open(self._stderr, encoding="utf-8", errors="backslashreplace") as stderr:
            lines = [line.strip() for line in stderr if line.strip()]
        return "%s: %s" % (how, lines[-1]) if lines else how

    def kill(self) -> None:
        """Ends the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._requests, self.replies):
            with contextlib.suppress(OSError):  # what was still to be written
                pipe.close()


# --- inside a rank ----------------------------------------------------------------------------------


def serve(parent: str, device: str, rank: str, size: str, store: str) -> None:
    """Runs a rank: answers pickled requests on standard input until that ends or the parent dies."""
    from ..protocol import _die_with, _take_pipes

    _die_with(int(parent))
    requests, replies = _take_pipes()
    import torch
    import torch.distributed as distributed

    if device == "cuda":
        torch.cuda.set_device(int(rank))
    else:
        library = torch.library.Library(
            "aten", "IMPL"
        )  # what it registers lasts as long as it does
        for name, function in OPERATORS.items():
            library.impl(name, function, "CPU")
    distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=distributed.FileStore(store, int(size)),
        rank=int(rank),
        world_size=int(size),
    )
    while True:
        try:
            request = pickle.load(requests)  # noqa: S301 - from the parent
        except EOFError:
            return
        pickle.dump(_answer(device, *request), replies, pickle.HIGHEST_PROTOCOL)
        replies.flush()


def _answer(
    device: str, x: Tensor, channels: Sequence[Tensor], gradient: Tensor, options: dict[str, Any]
) -> Reply:
    """One step on this rank's part of the batch."""
    import torch

    found: dict[str, Tensor] = {}
    synchronized = functools.partial(_synchronized, found)
    batch_norm = synchronized if options["training"] else torch.nn.functional.batch_norm
    try:
        given = (x, *channels)
        arguments = tuple(None if tensor is None else tensor.to(device) for tensor in given)
        gradient = None if gradient is None else gradient.to(device)
        outputs = _torch._differentiated(
            batch_norm,
            arguments,
            options,
            gradient,
            allow_unused=not len(x),  # a rank without elements has no gradients
        )
        outputs.update((name, _torch.to_array(tensor)) for name, tensor in found.items())
        return "done", outputs
    except NotImplementedError as error:
        return "refused", str(error)
    except Exception as error:  # whatever it is, the parent must learn of it
        return "raised", "raised %s: %s" % (type(error).__name__, error)


def _synchronized(
    found: dict[str, Tensor],
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """y by torch's SyncBatchNorm; what it keeps for its backward goes to `found` as batch_mean and invstd."""
    import torch.distributed as distributed
    from torch.nn.modules._functions import SyncBatchNorm

    assert training  # noqa: S101 - inference does not come here
    x.requires_grad_()  # without gradients nothing would be kept
    group = distributed.group.WORLD
    size = distributed.get_world_size()
    y = SyncBatchNorm.apply(x, weight, bias, running_mean, running_var, eps, momentum, group, size)
    _, _, found["batch_mean"], found["invstd"], _ = y.grad_fn.saved_tensors
    return y


# --- torch's CUDA operators, on the CPU -------------------------------------------------------------
# Names as in Normalization.cuh. A kernel's accscalar_t is float32 for 16-bit and float32 tensors.


def _accumulated(dtype: Any) -> Any:
    import torch

    return torch.float64 if dtype == torch.float64 else torch.float32


def _rows(tensor: Tensor) -> Tensor:
    """(N, C, *) -> (C, n) in the accumulation dtype."""
    rows = tensor.to(_accumulated(tensor.dtype)).transpose(0, 1)
    return rows.reshape(tensor.shape[1], -1)


def _wide(channels: Tensor, x: Tensor) -> Tensor:
    """(C,) -> what broadcasts with x, in the accumulation dtype."""
    return channels.to(_accumulated(x.dtype)).reshape((1, -1) + (1,) * (x.dim() - 2))


def _sqrt(values: Tensor) -> Tensor:
    """Square roots, correctly rounded as on a GPU; torch's own on the CPU may be MKL's, which are not."""
    import torch

    return torch.from_numpy(np.sqrt(values.numpy()))


def batch_norm_stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and invstd of this rank's elements (batch_norm_collect_statistics_kernel)."""
    import torch

    var, mean = torch.var_mean(_rows(x), 1, correction=0)
    # struct InvStd adds eps, which came as a float, to the variance in double.
    shifted = var.double() + torch.tensor(eps, dtype=var.dtype).double()
    invstd = torch.where(shifted == 0, 0.0, 1 / _sqrt(shifted))
    return mean, invstd.to(var.dtype)


def batch_norm_gather_stats_with_counts(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    """Mean and invstd of all ranks from each one's (R, C) (batch_norm_reduce_statistics_kernel).

    The running statistics are updated in place; counts (R,) have their dtype, in which a count, and the sum
    of two, is rounded.
    """
    import torch

    real = mean.dtype
    average = torch.zeros(mean.shape[1], dtype=real)
    var_n = torch.zeros_like(average)
    n = 0
    for count, m, inverse in zip(counts, mean, invstd):  # noqa: B905 - Python 3.7 has no strict
        v = 1 / inverse
        v = (v * v - eps) * count
        together = torch.tensor(float(n)).to(count.dtype) + count
        factor = (1 / together.double()).to(real)
        difference = average - m
        var_n = var_n + (v + difference * difference * n * count * factor)
        average = n * factor * average + count * factor * m
        n = int(min(torch.tensor(n, dtype=real) + count, INDEX_MAX))
    new = torch.tensor(momentum, dtype=real)
    for running, batch in ((running_mean, average), (running_var, var_n / (n - 1))):
        running.copy_((1 - new) * running.to(real) + new * batch)
    return average, 1 / _sqrt(var_n / n + eps)


def batch_norm_elemt(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    eps: float,
) -> Tensor:
    """Elements of y (batch_norm_transform_input_kernel)."""
    import torch

    gamma = torch.ones_like(mean) if weight is None else weight
    beta = torch.zeros_like(mean) if bias is None else bias
    y = _wide(gamma, x) * (x - _wide(mean, x)) * _wide(invstd, x) + _wide(beta, x)
    return y.to(x.dtype)


def batch_norm_backward_reduce(
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    input_g: bool,
    weight_g: bool,
    bias_g: bool,
) -> tuple[Tensor | None, ...]:
    """This rank's sums of dy and dy·(x − mean), and its grad_weight and grad_bias.

    (batch_norm_backward_reduce_kernel)
    """
    dy = _rows(grad_output)
    sum_dy = dy.sum(1)
    sum_dy_xmu = (dy * (_rows(x) - mean[:, None])).sum(1)
    grad_weight = grad_bias = None
    if weight is not None:
        grad_weight = (sum_dy_xmu * invstd).to(weight.dtype) if weight_g else None
        grad_bias = sum_dy.to(weight.dtype, copy=True) if bias_g else None
    return sum_dy, sum_dy_xmu, grad_weight, grad_bias


def batch_norm_backward_elemt(
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    count: Tensor,
) -> Tensor:
    """Elements of grad_input (batch_norm_backward_elemt_kernel)."""
    import torch

    norm_fct = 1 / count.sum().to(mean.dtype)
    m_dy = sum_dy * norm_fct
    factor_1 = invstd * invstd * sum_dy_xmu * norm_fct
    factor_2 = (torch.ones_like(mean) if weight is None else weight) * invstd
    centred = x - _wide(mean, x)
    grad_input = (grad_output - _wide(m_dy, x) - centred * _wide(factor_1, x)) * _wide(factor_2, x)
    return grad_input.to(x.dtype)


OPERATORS = {
    function.__name__: function
    for function in (
        batch_norm_stats,
        batch_norm_gather_stats_with_counts,
        batch_norm_elemt,
        batch_norm_backward_reduce,
        batch_norm_backward_elemt,
    )
}
"""Python functions for operators of namespace aten, by name."""
