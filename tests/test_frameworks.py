"""Real frameworks side by side: several in one run, two versions of one, and one against its model of 2016."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from correct import prepare
from frameworks import VARIABLE, Environments, command, environments

from bnaudit.cli import main
from bnaudit.report import load
from bnaudit.subject import Subject, scratch_folder

MANY = {
    "onnxruntime": "onnxruntime@cpu",
    "chainer": "chainer@cpu",
    "mlx": "mlx@cpu",
    "tinygrad": "tinygrad@cpu",
    "jax": "flax@cpu",
}
"""One backend of each of the environments that CI builds."""

SCENARIOS = """
name: offset
input: {distribution: normal, mean: 1e4}
shape: [16, 8, 32, 32]
---
name: constant
input: {distribution: constant, value: 3.3}
shape: [32, 16, 56, 56]
"""


@pytest.fixture(scope="module")
def subjects() -> Iterator[Environments]:
    with environments() as made:
        yield made


def test_all_are_audited_by_one_command_and_known_faults_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in MANY:
        command(name)  # or a skip
    monkeypatch.delenv("PYTHONPATH", raising=False)
    (tmp_path / "s.yaml").write_text(SCENARIOS)
    chosen = [f"{name}:{backend}" for name, backend in MANY.items()]
    options = [part for backend in [*chosen, "jax:flax-stable@cpu"] for part in ("-b", backend)]
    target = tmp_path / "r.json"
    given = ["run", str(tmp_path / "s.yaml"), "--config", os.environ[VARIABLE], *options, "-q"]
    with pytest.raises(SystemExit) as end:
        main([*given, "--json", str(target)])
    assert end.value.code == 1
    report = load(target)
    assert {place.name for place in report.environments} == {"current", *MANY}
    results = {(r.case.partition("/")[0], r.backend): r for r in report.results}
    assert {status for r in results.values() for status in [r.status]} <= {"pass", "warn", "fail"}
    fast, stable = (results["offset", f"jax:{name}@cpu"] for name in ("flax", "flax-stable"))
    assert (fast.status, fast.cause) == ("fail", "BN002 cancellation in the variance")
    # The variance is clipped to 0, and y is multiplied by 1/sqrt(eps) = 316 instead of 1.
    error = fast.quantities["y"].max_abs_error
    assert error is not None
    assert 1000 < error < 2000
    assert stable.status in ("pass", "warn")
    naive = results["constant", "mlx:mlx@cpu"]
    assert (naive.status, naive.cause) == ("fail", "BN003 low-precision accumulation")
    error = naive.quantities["y"].max_abs_error
    assert error is not None
    assert 0.2 < error < 0.3


def test_two_versions_of_one_framework_are_compared(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("onnxruntime", "onnxruntime-1.20"):
        command(name)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(SystemExit) as end:
        main(
            [
                "upgrade",
                "onnxruntime-1.20",
                "onnxruntime",
                "smoke",
                "--config",
                os.environ[VARIABLE],
            ]
        )
    said = capsys.readouterr().out
    assert end.value.code == 0, said
    assert "onnxruntime 1.20.1" in said
    assert "1.32.0" in said


@pytest.mark.parametrize(
    "text",
    [
        "input: {distribution: constant, value: 3.3}\nshape: [8, 4, 28, 28]\n",
        "input: {distribution: normal, mean: 100}\nshape: [8, 4, 28, 28]\n",
        "input: {distribution: normal, mean: 1e4}\nshape: [16, 4, 32, 32]\n",
        "input: {distribution: normal}\nshape: [64, 5]\n",
    ],
)
def test_the_model_of_chainer_in_2016_has_the_means_of_the_real_one(
    subjects: Environments, tmp_path: Path, text: str
) -> None:
    """What changed since is how the variance becomes a scale, and the running variance."""
    case, inputs = prepare(tmp_path, text)
    real = subjects["chainer"].run("chainer@cpu", case, inputs)
    with scratch_folder() as scratch, Subject(scratch=scratch) as subject:
        model = subject.run("chainer-2016@cpu", case, inputs)
        assert (real.outcome, model.outcome) == ("done", "done"), real.detail or model.detail
        mean = real.outputs["running_mean"]
        np.testing.assert_array_equal(mean, model.outputs["running_mean"])
        scale = float(np.abs(inputs.x).max()) * float(real.outputs["invstd"].max())
        close = 4 * 2.0**-24 * max(1.0, scale)
        np.testing.assert_allclose(real.outputs["y"], model.outputs["y"], rtol=0, atol=close)
