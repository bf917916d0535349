"""What others wrote, damaged: each reader refuses it in its own words, or reads it and goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from fuzz.damage import pick
from fuzz.targets import CORPUS, TARGETS, folder, originals
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EXAMPLES = {
    "scenario": 150,
    "report": 150,
    "settings": 150,
    "replies": 250,
    "outputs": 150,
    "requests": 60,
}
"""A few seconds of each; `make fuzz` goes on for longer."""


@pytest.mark.parametrize("name", TARGETS)
def test_what_was_damaged_is_refused_or_read(name: str) -> None:
    sound = originals(name)

    @settings(
        max_examples=EXAMPLES[name],
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(random=st.randoms(use_true_random=False))
    def survives(random: Random) -> None:
        with folder() as scratch:
            TARGETS[name](pick(sound, random), scratch)

    survives()


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*/*")), ids=lambda path: path.name)
def test_what_once_showed_a_fault_does_so_no_more(path: Path) -> None:
    with folder() as scratch:
        TARGETS[path.parent.name](path.read_bytes(), scratch)


def test_the_coverage_guided_form_finds_no_fault_in_a_second() -> None:
    pytest.importorskip("atheris", reason="atheris is not installed: make fuzz")
    command = [sys.executable, "-m", "fuzz", "1", "requests"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "no faults\n"), done.stderr


@pytest.mark.parametrize("name", TARGETS)
def test_each_target_accepts_sound_input_so_that_damage_reaches_what_is_behind(name: str) -> None:
    accepted = 0
    for content in originals(name):
        with folder() as scratch:
            accepted += TARGETS[name](content, scratch)
    assert accepted
