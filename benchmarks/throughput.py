"""Measures bnaudit side by side with what it is compared to, in one process, as ratios.

    make benchmark                      every section
    python benchmarks/throughput.py statistics audit memory startup

statistics  exact mean, variance and invstd with their certificates, against torch's own fp32 batch norm,
            NumPy's float64 mean and variance, and a memory copy; one thread each
audit       reference and comparison of a forward pass, against the backend's own time
memory      peak proportional set size of the auditor during a forward audit, against the tensor's size
startup     `bnaudit --help` against importing click
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"

SHAPES = ((32, 64, 56, 56), (256, 64, 112, 112))


def best(run: Callable[[], object], rounds: int) -> float:
    """Shortest of `rounds` runs, in seconds."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def statistics() -> None:
    """Throughput of the certified statistics."""
    import numpy as np

    from bnaudit.certified import moments, normalization

    try:
        import torch

        torch.set_num_threads(1)
    except ImportError:
        torch = None

    def numpy_moments(x: np.ndarray) -> None:
        x.mean((0, 2, 3), dtype=np.float64)
        x.var((0, 2, 3), dtype=np.float64)

    for shape in SHAPES:
        x = np.random.default_rng(0).standard_normal(shape, np.float32)
        channels, flat = shape[1], x.reshape(shape[0], shape[1], -1)
        copy = np.empty_like(x)
        ones, zeros = np.ones(channels), np.zeros(channels)

        def certified(
            flat: np.ndarray = flat, ones: np.ndarray = ones, zeros: np.ndarray = zeros
        ) -> None:
            m = moments("float32", flat)
            normalization(m.mean, m.var, m.largest, m.size, 1e-5, ones, zeros, n=m.n, training=True)

        rounds = 9 if x.size < 1e7 else 3
        certified()
        ours = best(certified, rounds)
        others: list[tuple[str, float]] = [
            ("memory copy", best(partial(np.copyto, copy, x), rounds)),
            ("numpy float64 mean + var", best(partial(numpy_moments, x), min(rounds, 3))),
        ]
        if torch is not None:
            tensor = torch.from_numpy(x)

            def batch_norm(tensor: object = tensor) -> object:
                return torch.nn.functional.batch_norm(tensor, None, None, training=True)

            batch_norm()
            others.append(("torch F.batch_norm fp32", best(batch_norm, rounds)))
        print(f"\nstatistics, {'x'.join(map(str, shape))} float32, 1 thread")
        print(f"  {'certified reference':28} {x.size / ours / 1e9:6.2f} Gelt/s")
        for name, seconds in others:
            speed = x.size / seconds / 1e9
            print(f"  {name:28} {speed:6.2f} Gelt/s   reference is {seconds / ours:.2f} x as fast")


def _case(shape: Sequence[int]) -> str:
    return f"""
name: benchmark
description: A forward pass on normal data.
input: {{distribution: normal}}
shape: {list(shape)}
"""


def audit() -> None:
    """Time of reference and comparison against the backend's."""
    from bnaudit.inputs import make
    from bnaudit.reference import Declarations, Reference
    from bnaudit.scenario import load
    from bnaudit.subject import Subject, scratch_folder

    with scratch_folder() as scratch:
        path = scratch / "benchmark.yaml"
        for shape in SHAPES:
            path.write_text(_case(shape))
            case = load([str(path)])[0].cases[0]
            folder = scratch / "case"
            folder.mkdir(exist_ok=True)
            start = time.perf_counter()
            inputs = make(case, folder)
            making = time.perf_counter() - start
            with Subject(threads=1, scratch=scratch) as subject:
                backend = "torch@cpu"
                if subject.describe([backend])[backend] is not None:
                    backend = "two-pass@cpu"
                reply = subject.run(backend, case, inputs)
                reply = subject.run(backend, case, inputs)
            Reference(case, inputs).measure(reply.outputs, Declarations())
            start = time.perf_counter()
            reference = Reference(case, inputs)
            middle = time.perf_counter()
            reference.measure({"y": reply.outputs["y"]}, Declarations())
            end = time.perf_counter()
            own = reply.seconds or math.nan
            print(f"\naudit, {'x'.join(map(str, shape))} float32, forward, {backend}, 1 thread")
            print(f"  backend's own time     {own * 1e3:8.1f} ms")
            print(f"  making the input       {making * 1e3:8.1f} ms   {making / own:.2f} x")
            print(
                f"  reference              {(middle - start) * 1e3:8.1f} ms   {(middle - start) / own:.2f} x"
            )
            print(
                f"  comparison             {(end - middle) * 1e3:8.1f} ms   {(end - middle) / own:.2f} x"
            )
            print(
                f"  reference + comparison {(end - start) * 1e3:8.1f} ms   {(end - start) / own:.2f} x"
            )


def memory() -> None:
    """Peak PSS of the auditor's process (not of its workers) over a forward audit of 822 MB."""
    shape = SHAPES[1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "benchmark.yaml")
        path.write_text(_case(shape))
        process = subprocess.Popen(
            [sys.executable, "-m", "bnaudit", "run", str(path), "-b", "two-pass@cpu", "-q"],
            stdout=subprocess.DEVNULL,
        )
        peak = 0
        done = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.is_set():
                try:
                    text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
                except OSError:
                    return
                for line in text.splitlines():
                    if line.startswith("Pss:"):
                        peak = max(peak, int(line.split()[1]) * 1024)
                done.wait(0.02)

        watcher = threading.Thread(target=watch)
        watcher.start()
        code = process.wait()
        done.set()
        watcher.join()
    size = math.prod(shape) * 4
    print(f"\nmemory, {'x'.join(map(str, shape))} float32, forward audit (exit {code})")
    print(
        f"  tensor {size / 1e6:.0f} MB, auditor's peak PSS {peak / 1e6:.0f} MB: {peak / size:.2f} x"
    )


def startup() -> None:
    """Start-up of the command against the import of click."""
    program = Path(sys.executable).with_name("bnaudit")

    def run(*command: str) -> Callable[[], object]:
        return lambda: subprocess.run(command, check=True, capture_output=True)

    ours = best(run(str(program), "--help"), 15)
    click = best(run(sys.executable, "-c", "import click"), 15)
    print("\nstart-up")
    print(f"  python -c 'import click'   {click * 1e3:6.1f} ms")
    print(f"  bnaudit --help             {ours * 1e3:6.1f} ms   {ours / click:.2f} x")


SECTIONS = {"statistics": statistics, "audit": audit, "memory": memory, "startup": startup}

if __name__ == "__main__":
    unknown = [name for name in sys.argv[1:] if name not in SECTIONS]
    if unknown:
        sys.exit(f"no section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    for name in sys.argv[1:] or SECTIONS:
        SECTIONS[name]()
