"""Plug-ins that break their contract or their process, each in one way, named after it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

Arguments = Any


def segfault(*arguments: Arguments, **options: Any) -> None:
    ctypes.string_at(0)


def exit_zero(*arguments: Arguments, **options: Any) -> None:
    os._exit(0)


def killed(*arguments: Arguments, **options: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sys_exit(*arguments: Arguments, **options: Any) -> None:
    sys.exit(3)


def keyboard_interrupt(*arguments: Arguments, **options: Any) -> None:
    raise KeyboardInterrupt


def memory_error(*arguments: Arguments, **options: Any) -> None:
    np.empty(2**62, np.uint8)


def recursion(*arguments: Arguments, **options: Any) -> None:
    recursion(*arguments, **options)


def boom(*arguments: Arguments, **options: Any) -> None:
    raise ValueError("boom")


def undecodable(*arguments: Arguments, **options: Any) -> None:
    raise ValueError(os.fsdecode(b"caf\xe9"))


class _MuteError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def mute(*arguments: Arguments, **options: Any) -> None:
    raise _MuteError


def not_implemented(*arguments: Arguments, **options: Any) -> None:
    raise NotImplementedError("only on Tuesdays")


def hang(*arguments: Arguments, **options: Any) -> None:
    while True:
        time.sleep(0.01)


def spin(*arguments: Arguments, **options: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        pass


def loud(x: Any, *arguments: Arguments, **options: Any) -> Any:
    os.write(1, b"x" * 10_000_000)
    print("and done")
    return x.copy()


def loud_stderr(x: Any, *arguments: Arguments, **options: Any) -> Any:
    os.write(2, b"first\n" + b"y" * 10_000_000 + b"\n")
    raise ValueError("after ten megabytes")


def protocol_garbage(x: Any, *arguments: Arguments, **options: Any) -> Any:
    for descriptor in range(3, 32):
        try:
            os.write(descriptor, b'{"id": 99, "outcome": "done"}\n')
        except OSError:
            continue
    return x.copy()


def endless_reply(*arguments: Arguments, **options: Any) -> None:
    while True:
        for descriptor in range(3, 32):
            try:
                os.write(descriptor, b"z" * 4096)
            except OSError:
                continue


def closed_descriptors(*arguments: Arguments, **options: Any) -> None:
    os.closerange(0, 64)
    time.sleep(60)


def reads_stdin(x: Any, *arguments: Arguments, **options: Any) -> Any:
    assert sys.stdin.read() == ""
    return x.copy()


def closes_stdin(x: Any, *arguments: Arguments, **options: Any) -> Any:
    with contextlib.suppress(OSError):
        os.close(0)
    return x.copy()


def forks(x: Any, *arguments: Arguments, **options: Any) -> Any:
    os.fork()
    return x.copy()


def leaves_a_child(x: Any, *arguments: Arguments, **options: Any) -> dict[str, Any]:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    return {"y": x.copy(), "kernel": str(child.pid)}


def dies_with_a_child(*arguments: Arguments, **options: Any) -> None:
    if os.fork() == 0:
        time.sleep(600)  # and holds the pipes open
    os._exit(7)


def removes_its_folder(x: Any, *arguments: Arguments, **options: Any) -> Any:
    for folder in Path.cwd().parent.glob("outputs-*"):
        folder.rmdir()
    return x.copy()


def removes_where_it_runs(x: Any, *arguments: Arguments, **options: Any) -> Any:
    shutil.rmtree(Path.cwd())
    return x.copy()


def relative(*arguments: Arguments, **options: Any) -> None:
    Path("kernel.cu").read_text()


def no_compiler(*arguments: Arguments, **options: Any) -> None:
    subprocess.run(["no-such-compiler"])


def another_shape(x: Any, weight: Any, *arguments: Arguments, **options: Any) -> Any:
    y = x.copy()
    x.shape = (1, *x.shape)
    x.flags.writeable = weight.flags.writeable = False
    return y


def escapes(*arguments: Arguments, **options: Any) -> None:
    raise ValueError("\x1b[31mred\x00\x9b\x7f\r\n\tnext")


def many_lines(*arguments: Arguments, **options: Any) -> None:
    raise NotImplementedError("one\ntwo\nthree\nfour\n" + "x" * 3_000_000)


def long_line(*arguments: Arguments, **options: Any) -> None:
    raise NotImplementedError("x" * 3_000_000)


class _MuteRefusalError(NotImplementedError):
    def __str__(self) -> str:
        return 3  # type: ignore[return-value]


def mute_refusal(*arguments: Arguments, **options: Any) -> None:
    raise _MuteRefusalError


def only_once(x: Any, *arguments: Arguments, **options: Any) -> Any:
    only_once.calls = getattr(only_once, "calls", 0) + 1  # type: ignore[attr-defined]
    if only_once.calls % 2 == 0:  # type: ignore[attr-defined]
        raise NotImplementedError("busy")
    return x.copy()


def nothing(*arguments: Arguments, **options: Any) -> None:
    return None


def no_y(x: Any, *arguments: Arguments, **options: Any) -> dict[str, Any]:
    return {"batch_mean": np.zeros(x.shape[1], np.float32)}


def a_list(x: Any, *arguments: Arguments, **options: Any) -> Any:
    return x.tolist()


def wrong_shape(x: Any, *arguments: Arguments, **options: Any) -> Any:
    return x.ravel()


def wrong_dtype(x: Any, *arguments: Arguments, **options: Any) -> Any:
    return x.astype(np.float64 if x.dtype != np.float64 else np.float32)


def swapped_bytes(x: Any, *arguments: Arguments, **options: Any) -> Any:
    return x.astype(x.dtype.newbyteorder())


def wrong_statistics_shape(x: Any, *arguments: Arguments, **options: Any) -> dict[str, Any]:
    return {"y": x.copy(), "batch_mean": np.zeros((1, x.shape[1], 1, 1), np.float32)}


def wrong_statistics_dtype(x: Any, *arguments: Arguments, **options: Any) -> dict[str, Any]:
    return {"y": x.copy(), "running_var": np.ones(x.shape[1], np.int64)}


def in_place(x: Any, *arguments: Arguments, **options: Any) -> Any:
    x -= x.mean()
    return x


def in_place_weight(x: Any, weight: Any, *arguments: Arguments, **options: Any) -> Any:
    weight[0] = 7
    return x.copy()


def bad_declaration(x: Any, *arguments: Arguments, **options: Any) -> Any:
    return x.copy()


bad_declaration.running_update = "median"  # type: ignore[attr-defined]


def not_a_number(x: Any, *arguments: Arguments, **options: Any) -> Any:
    return np.full_like(x, np.nan)


def drifts(x: Any, *arguments: Arguments, **options: Any) -> Any:
    y = np.zeros_like(x)
    drifts.calls = getattr(drifts, "calls", 0) + 1  # type: ignore[attr-defined]
    y[-1, -1, -1, -1] = drifts.calls  # type: ignore[attr-defined]
    return y
