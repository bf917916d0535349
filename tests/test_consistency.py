"""What a result must not depend on, found in subjects that are made up to depend on it."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from correct import outputs, prepare

from bnaudit.cli import run as cli
from bnaudit.consistency import CHECKS, Bench, Call, Consistency, Disagreement, examine
from bnaudit.inputs import Inputs
from bnaudit.reference import Declarations, Reference
from bnaudit.scenario import Case
from bnaudit.subject import Reply, Subject, scratch_folder

TEXT = "input: {distribution: normal, mean: 3}\nshape: [4, 3, 5]\nbackward: true\n"
Behaviour = Callable[[Case, Inputs, dict[str, Any]], Any]


class Stub:
    """Answers with the right outputs, changed by `behave`."""

    threads = 1

    def __init__(self, behave: Behaviour | None = None) -> None:
        self.behave = behave or (lambda case, inputs, right: None)
        self.calls = 0

    def run(self, backend: str, case: Case, inputs: Inputs) -> Any:
        self.calls += 1
        right = outputs(case, inputs)
        reply = self.behave(case, inputs, right)
        return reply or Reply("done", outputs=right, declarations=Declarations())


def bench(folder: Path, subject: Any, other: Any = None, text: str = TEXT) -> Bench:
    case, inputs = prepare(folder, text)
    return Bench(
        case, inputs, Reference(case, inputs), subject, cast(Subject, other or Stub()), folder
    )


def first_call(on: Bench, backend: str = "f") -> Call:
    reply = on.subject.run(backend, on.case, on.inputs)
    return Call(reply, on.reference.measure(reply.outputs, reply.declarations))


def failing(on: Bench, *backends: str, checks: tuple[str, ...] = CHECKS) -> dict[str, str]:
    """Check → the reason, of those that do not hold."""
    calls = {backend: first_call(on, backend) for backend in backends or ("f",)}
    found = list(examine(on, calls, frozenset(checks)))
    return {f.check: f.reason or "" for f in found if isinstance(f, Consistency) and not f.ok}


def test_the_command_line_offers_these_checks() -> None:
    assert cli.CHECKS == CHECKS


def test_a_correct_backend_passes_every_check_that_applies(tmp_path: Path) -> None:
    on = bench(tmp_path, Stub())
    found = list(examine(on, {"f": first_call(on)}, frozenset(CHECKS)))
    assert [f.check for f in found if isinstance(f, Consistency)] == [*CHECKS[:-1]]
    assert all(isinstance(f, Consistency) and f.ok and f.reason is None for f in found)


def test_only_the_checks_asked_for_are_made_and_none_by_default(tmp_path: Path) -> None:
    subject = Stub()
    on = bench(tmp_path, subject)
    assert list(examine(on, {"f": first_call(on)}, frozenset())) == []
    assert subject.calls == 1
    (found,) = examine(on, {"f": first_call(on)}, frozenset({"channels"}))
    assert isinstance(found, Consistency)
    assert found.check == "channels"


def test_one_channel_has_no_others(tmp_path: Path) -> None:
    on = bench(tmp_path, Stub(), text=TEXT.replace("[4, 3, 5]", "[4, 1, 5]"))
    found = examine(on, {"f": first_call(on)}, frozenset({"channels"}))
    assert list(found) == []


def test_one_image_has_no_order(tmp_path: Path) -> None:
    on = bench(tmp_path, Stub(), text=TEXT.replace("[4, 3, 5]", "[1, 3, 5]"))
    assert list(examine(on, {"f": first_call(on)}, frozenset({"batch-order"}))) == []


def test_other_bits_in_a_second_call_are_found(tmp_path: Path) -> None:
    def behave(case: Case, inputs: Inputs, right: dict[str, Any]) -> None:
        behave.calls += 1  # type: ignore[attr-defined]
        if behave.calls == 2:  # type: ignore[attr-defined]
            right["y"][1, 2, 3] = np.nextafter(right["y"][1, 2, 3], np.float32(9))

    behave.calls = 0  # type: ignore[attr-defined]
    reasons = failing(bench(tmp_path, Stub(behave)), checks=("repeat",))
    assert reasons["repeat"].startswith("in a second call y[1,2,3] was ")


def test_not_a_number_is_equal_to_itself(tmp_path: Path) -> None:
    text = TEXT.replace(
        "{distribution: normal, mean: 3}",
        "{distribution: nonfinite, base: {distribution: normal}, values: [.nan], count: 1}",
    )
    assert failing(bench(tmp_path, Stub(), text=text), checks=("repeat", "threads")) == {}


def test_other_bits_with_other_threads_are_found_in_any_quantity(tmp_path: Path) -> None:
    def behave(case: Case, inputs: Inputs, right: dict[str, Any]) -> None:
        right["grad_bias"][1] += 1

    reasons = failing(bench(tmp_path, Stub(), Stub(behave)))
    assert reasons.keys() == {"threads"}
    assert "with --threads 1 grad_bias[1] was " in reasons["threads"]


def test_a_leak_from_other_channels_is_found(tmp_path: Path) -> None:
    def behave(case: Case, inputs: Inputs, right: dict[str, Any]) -> None:
        right["y"][:, 0] += np.float32(1e-5) * inputs.x[-1][:, 1]

    reasons = failing(bench(tmp_path, Stub(behave)), checks=("channels",))
    assert "with the odd channels set to 0 y[0,0,0] was " in reasons["channels"]


def test_the_order_of_the_batch_may_change_bits_but_not_more(tmp_path: Path) -> None:
    def behave(error: float) -> Behaviour:
        def change(case: Case, inputs: Inputs, right: dict[str, Any]) -> None:
            if inputs.sha256.endswith("batch-order"):
                right["y"][...] *= np.float32(1 + error)

        return change

    assert failing(bench(tmp_path, Stub(behave(1e-7)))) == {}
    reasons = failing(bench(tmp_path, Stub(behave(1e-3))))
    assert reasons.keys() == {"batch-order"}
    assert reasons["batch-order"].startswith("with the batch in reverse y deviates ")


def test_outputs_of_the_reversed_batch_are_put_back_in_order(tmp_path: Path) -> None:
    def behave(case: Case, inputs: Inputs, right: dict[str, Any]) -> None:
        if inputs.sha256.endswith("batch-order"):
            right["y"] = right["y"][::-1]  # as if nothing had been reversed

    assert failing(bench(tmp_path, Stub(behave))).keys() == {"batch-order"}


def test_inference_that_reads_other_running_statistics_than_training_left_is_found(
    tmp_path: Path,
) -> None:
    def confuse(case: Case, inputs: Inputs, right: dict[str, Any]) -> None:
        if case.mode == "training":  # stored as cuDNN 4 did, and read as a variance
            right["running_var"] = 1 / np.sqrt(right["running_var"])

    def forget(case: Case, inputs: Inputs, right: dict[str, Any]) -> None:
        if case.mode == "inference":
            right["y"][...] *= 2

    assert failing(bench(tmp_path, Stub()), checks=("inference",)) == {}
    reasons = failing(bench(tmp_path, Stub(confuse)), checks=("inference",))
    assert reasons["inference"].startswith(
        "running_var, with which inference would go on, is wrong"
    )
    reasons = failing(bench(tmp_path, Stub(forget)), checks=("inference",))
    assert reasons["inference"].startswith(
        "in inference with the running statistics that training left y["
    )


def test_a_second_call_that_dies_is_no_agreement(tmp_path: Path) -> None:
    def behave(case: Case, inputs: Inputs, right: dict[str, Any]) -> Any:
        return Reply("crash", "killed by signal 9")

    reasons = failing(bench(tmp_path, Stub(), Stub(behave)))
    expected = "with --threads 1 the call ended: crash: killed by signal 9"
    assert reasons == {"threads": expected}


def test_a_death_in_a_check_is_told_from_a_dependence(tmp_path: Path) -> None:
    def behave(case: Case, inputs: Inputs, right: dict[str, Any]) -> Any:
        return Reply("timeout", "too long", detail="where it was")

    on = bench(tmp_path, Stub(), Stub(behave))
    (found,) = examine(on, {"f": first_call(on)}, frozenset({"threads"}))
    assert isinstance(found, Consistency)
    assert (found.ok, found.died, found.detail) == (False, True, "where it was")


def test_a_check_that_cannot_be_made_does_not_hold_and_says_why(tmp_path: Path) -> None:
    def only_training(case: Case, inputs: Inputs, right: dict[str, Any]) -> Any:
        return Reply("unsupported", "no inference") if case.mode == "inference" else None

    def only_y(case: Case, inputs: Inputs, right: dict[str, Any]) -> None:
        del right["running_mean"]

    for behave, words in (
        (only_training, "unsupported: no inference"),
        (only_y, "is not returned"),
    ):
        on = bench(tmp_path, Stub(behave))
        (found,) = examine(on, {"f": first_call(on)}, frozenset({"inference"}))
        assert isinstance(found, Consistency)
        assert found.ok is None
        assert words in (found.reason or "")


def test_no_room_for_changed_inputs_costs_that_check_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    on = bench(tmp_path, Stub())
    first = first_call(on)
    monkeypatch.setattr("bnaudit.consistency.np.save", refuse)
    found = list(examine(on, {"f": first}, frozenset({"channels", "threads"})))
    assert {f.check: f.ok for f in found if isinstance(f, Consistency)} == {
        "channels": None,
        "threads": True,
    }


def test_two_backends_that_return_batch_statistics_in_inference_are_compared_in_y(
    tmp_path: Path,
) -> None:
    on = bench(tmp_path, Stub(), text=TEXT + "mode: inference\n")
    call = first_call(on)
    cast(dict[str, Any], call.reply.outputs)["batch_mean"] = np.zeros(3, np.float32)
    (found,) = examine(on, {"a": call, "b": call}, frozenset())
    assert isinstance(found, Disagreement)
    assert (found.quantity, found.ratio) == ("y", 0)


def test_a_first_call_that_was_not_repeatable_is_enough(tmp_path: Path) -> None:
    on = bench(tmp_path, Stub())
    first = first_call(on)
    moody = Call(replace(first.reply, not_repeatable="y[0] was 1, then nan"), first.measurements)
    (found,) = examine(on, {"f": moody}, frozenset({"repeat"}))
    assert isinstance(found, Consistency)
    assert found.reason == "in a second call y[0] was 1, then nan"


def test_two_backends_disagree_beyond_twice_the_tight_bound(tmp_path: Path) -> None:
    on = bench(tmp_path, Stub())
    tight = 1 / (first_call(on).measurements["y"].tight_ratio or 1)
    assert tight > 1

    def pair(factor: float) -> list[Any]:
        a, b = first_call(on), first_call(on)
        b.reply.outputs["y"][...] *= np.float32(1 + factor)
        return list(examine(on, {"a": a, "b": b, "c": a}, frozenset({"backends"})))

    near, holds = pair(2e-7)
    assert isinstance(near, Disagreement)
    assert near.quantity == "y"
    assert 0 < near.ratio <= 1
    assert isinstance(holds, Consistency)
    assert holds.ok
    far, broken = pair(1e-3)
    assert far.backends == ("a", "b")
    assert far.max_abs_difference == pytest.approx(
        1e-3 * np.abs(first_call(on).reply.outputs["y"]).max(), rel=1e-3
    )
    assert far.ratio > 1
    assert (broken.ok, broken.backend) == (False, "b")  # which is the one that is off
    assert "y differs from a's by" in broken.reason


def test_the_difference_of_finite_and_not_is_infinite(tmp_path: Path) -> None:
    on = bench(tmp_path, Stub())
    a, b = first_call(on), first_call(on)
    for quantity in ("y", "batch_mean"):
        assert on.reference.difference(
            quantity, a.reply.outputs[quantity], b.reply.outputs[quantity]
        ) == (0, 0)
    b.reply.outputs["batch_mean"][0] = np.nan
    found, _ = examine(on, {"a": a, "b": b}, frozenset({"backends"}))
    assert isinstance(found, Disagreement)
    assert (found.quantity, found.ratio) == ("batch_mean", np.inf)


# --- real backends ---------------------------------------------------------------------------------


@contextmanager
def real(folder: Path, text: str) -> Iterator[Bench]:
    with (
        scratch_folder() as scratch,
        Subject(scratch=scratch, threads=2) as subject,
        Subject(scratch=scratch, threads=1) as other,
    ):
        yield bench(folder, subject, other, text)


OFFSET = "input: {distribution: normal, mean: 100000}\nshape: [16, 8, 32, 32]\nmemory_format: channels_last\n"


def test_torch_in_channels_last_depends_on_the_number_of_threads(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    with real(tmp_path, OFFSET) as on:
        reasons = failing(on, "torch@cpu", checks=("repeat", "threads"))
    assert reasons.keys() == {"threads"}


def test_welford_and_exact_depend_on_nothing(tmp_path: Path) -> None:
    with real(tmp_path, OFFSET + "backward: true\n") as on:
        assert failing(on, "welford@cpu", "exact@cpu") == {}
