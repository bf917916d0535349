"""`python -m fuzz SECONDS [TARGET…]` in tests/: coverage-guided fuzzing with atheris, of all targets in turn.

What reaches new code is kept in build/fuzz/TARGET and is where the next run begins; what shows a fault is
saved as build/fuzz/TARGET-crash-*, for tests/fuzz/corpus. Exits with 1 if there was any.
"""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

WORK = Path(__file__).parents[2] / "build" / "fuzz"

COMPILED = ["certified", "bounds", "measure", "reference", "worker.backends"]
"""Modules that atheris must leave alone: Numba cannot compile what it has instrumented."""

LIMITS = ("-timeout=30", "-rss_limit_mb=4096", "-max_len=60000", "-print_final_stats=1")
"""What takes longer than 30 s or more than 4 GiB is a fault, too."""


def fuzz(name: str, seconds: float) -> None:
    """Fuzzes one target in this process, which libFuzzer ends."""
    import atheris

    compiled = [f"bnaudit.{name}" for name in COMPILED]
    with atheris.instrument_imports(include=["bnaudit", "yaml"], exclude=compiled):
        from fuzz.damage import damaged
        from fuzz.targets import TARGETS, folder, originals
    corpus = WORK / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(originals(name)):
        (corpus / f"original-{number}").write_bytes(content)

    def run(content: bytes) -> None:
        with folder() as scratch:
            TARGETS[name](content, scratch)

    def mutate(content: bytes, size: int, seed: int) -> bytes:
        source = random.Random(seed)
        if source.random() < 0.2:
            return bytes(atheris.Mutate(content, size))
        return damaged(content, source)[:size]

    prefix = f"-artifact_prefix={WORK / name}-"
    options = [*LIMITS, f"-max_total_time={round(seconds)}", prefix, str(corpus)]
    atheris.Setup([sys.argv[0], *options], run, custom_mutator=mutate)
    atheris.Fuzz()


def main(seconds: float, names: list[str]) -> int:
    """Fuzzes each target in a process of its own for its share of the seconds."""
    try:
        import atheris  # noqa: F401
    except ImportError as error:
        print(f"nothing was fuzzed: {error} (the extra fuzz has it, on Linux from Python 3.11 on)")
        return 1
    from fuzz.targets import TARGETS

    names = names or list(TARGETS)
    share = max(1, round(seconds / len(names)))
    program = "import sys; from fuzz.__main__ import fuzz; fuzz(sys.argv[1], float(sys.argv[2]))"
    codes = {
        name: subprocess.run([sys.executable, "-c", program, name, str(share)]).returncode
        for name in names
    }
    faults = [name for name, code in codes.items() if code]
    print(f"faults in {', '.join(faults)}: see {WORK}" if faults else "no faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
