"""-b, --require and -k: what runs, what gates, what must be there."""

from __future__ import annotations

from pathlib import Path

import pytest

from bnaudit.audit import Selected
from bnaudit.selection import SelectionError, matcher, select
from bnaudit.worker.backends import BACKENDS

CUDA_PATHS = ("ompile", "udnn", "udnn-benchmark", "udnn-deterministic")


def names(selection: list[Selected]) -> list[str]:
    return [selected.name for selected in selection]


def test_without_names_the_real_frameworks_are_gated_and_the_default_specimens_are_not() -> None:
    selection = select([], [], BACKENDS)
    assert {s.name: s.gated for s in selection} == {
        "welford@cpu": False,
        "gemm@cpu": False,
        "gemm@cuda": False,
        "welford@cuda": False,
        "torch@cpu": True,
        "torch@cuda": True,
    }
    assert not any(s.required for s in selection)


def test_a_specimen_that_is_named_gates_and_must_be_there() -> None:
    assert select(["caffe-2016@cpu"], [], BACKENDS) == [Selected("caffe-2016@cpu", True, True)]
    assert select(["caffe-2016"], [], BACKENDS) == [Selected("caffe-2016@cpu", True, True)]


def test_a_name_without_a_device_means_all_its_devices_but_only_the_cpu_must_be_there() -> None:
    assert select(["torch"], [], BACKENDS) == [
        Selected("torch@cpu", gated=True, required=True),
        Selected("torch@cuda", gated=True, required=False),
    ]


def test_a_name_whose_only_device_is_a_gpu_must_be_there() -> None:
    assert select(["torch-cudnn"], [], BACKENDS) == [Selected("torch-cudnn@cuda", True, True)]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("real", [name for name, b in BACKENDS.items() if b.kind == "real"]),
        ("specimens", [name for name, b in BACKENDS.items() if b.kind == "specimen"]),
        ("all", list(BACKENDS)),
        ("two-pass*", ["two-pass@cpu", "two-pass-sequential@cpu"]),
        ("*-native", ["torch-native@cuda"]),
        ("torch-c*@cuda", [f"torch-c{name}@cuda" for name in CUDA_PATHS]),
        ("torch@c[p]u", ["torch@cpu"]),
    ],
)
def test_groups_and_globs_take_what_they_match_and_gate_only_real_frameworks(
    given: str, expected: list[str]
) -> None:
    selection = select([given], [], BACKENDS)
    assert names(selection) == expected
    assert all(s.gated == (BACKENDS[s.name].kind == "real") for s in selection)
    assert not any(s.required for s in selection)


def test_names_add_up_in_their_order_and_none_twice() -> None:
    selection = select(["welford@cpu", "specimens", "welford@cpu"], [], BACKENDS)
    assert selection[0] == Selected("welford@cpu", gated=True, required=True)
    assert names(selection).count("welford@cpu") == 1
    assert not any(s.gated for s in selection[1:])


def test_a_backend_of_another_environment_has_its_name_in_front() -> None:
    chosen = select(
        ["old:torch", "old:two-pass*", "my.module:f", "new:my.module:f"],
        ["new:exact"],
        BACKENDS,
        ["old", "new"],
    )
    assert chosen == [
        Selected("old:torch@cpu", gated=True, required=True),
        Selected("old:torch@cuda", gated=True, required=False),
        Selected("old:two-pass@cpu", gated=False, required=False),
        Selected("old:two-pass-sequential@cpu", gated=False, required=False),
        Selected("my.module:f@cpu", gated=True, required=True),
        Selected("new:my.module:f@cpu", gated=True, required=True),
        Selected("new:exact@cpu", gated=False, required=True),
    ]


def test_without_names_the_frameworks_of_other_environments_are_what_is_gated() -> None:
    chosen = select([], [], BACKENDS, ["old"])
    assert Selected("old:torch@cpu", gated=True) in chosen
    assert all(s.gated and s.name.startswith("old:") for s in chosen)
    assert not any("torch-" in s.name for s in chosen)


def test_an_environment_that_was_not_given_is_no_plug_in() -> None:
    with pytest.raises(SelectionError, match="no environment 'olt'; given with --env: old, new"):
        select(["olt:torch@cpu"], [], BACKENDS, ["old", "new"])


def test_a_group_cannot_be_required() -> None:
    with pytest.raises(SelectionError, match="not the group 'real'"):
        select([], ["real"], BACKENDS)


def test_a_required_backend_is_added_and_gates_as_it_would_otherwise() -> None:
    selection = select(["welford@cpu"], ["torch@cuda", "gemm"], BACKENDS)
    assert selection[1:] == [
        Selected("torch@cuda", gated=True, required=True),
        Selected("gemm@cpu", gated=False, required=True),
    ]
    assert Selected("torch@cuda", True, True) in select([], ["torch@cuda"], BACKENDS)


def test_plugins_are_gated_required_and_named_with_their_device(tmp_path: Path) -> None:
    file = tmp_path / "my bn.py"
    file.touch()
    for given, name in (
        (f"{file}:batch_norm", f"{file}:batch_norm@cpu"),
        (f"{file}:batch_norm@cuda", f"{file}:batch_norm@cuda"),
        ("package.module:batch_norm", "package.module:batch_norm@cpu"),
    ):
        assert select([given], [], BACKENDS) == [Selected(name, gated=True, required=True)]


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ("welfrod", "there is no backend 'welfrod'; did you mean 'welford'?"),
        ("torch@gpu", "there is no backend 'torch@gpu'; did you mean 'torch@cpu'?"),
        ("specimen", "there is no backend 'specimen'; did you mean 'specimens'?"),
        ("qqq", "there is no backend 'qqq' (bnaudit list shows all)"),
        ("", "there is no backend ''"),
        ("nosuch*", "no backend matches 'nosuch*'"),
        ("my_bn.py", "a plug-in is FILE.py:NAME"),
        ("nowhere.py:batch_norm", "nowhere.py does not exist"),
        ("module:", "'module:' is no plug-in"),
        (":name", "':name' is no plug-in"),
        ("module:a b", "is no plug-in"),
        ("module:name@", "accepted are @cpu and @cuda"),
        ("module:name@cuda:0", "accepted are @cpu and @cuda"),
        ("module:name@gpu", "accepted are @cpu and @cuda"),
        ("torch.nn.BatchNorm2d", "named with a colon: torch.nn:BatchNorm2d"),
    ],
)
def test_a_name_that_means_nothing_is_refused_with_the_nearest_one(
    given: str, complaint: str
) -> None:
    with pytest.raises(SelectionError) as caught:
        select([given], [], BACKENDS)
    assert complaint in str(caught.value)
    if "*" not in given:
        with pytest.raises(SelectionError):
            select([], [given], BACKENDS)


CASE = "constant-channel/value=3.3,shape=32x64x56x56,memory_format=channels_last"


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("constant", True),
        ("CONSTANT", True),
        ("torch", True),
        ("jax", False),
        ("value=3.3,shape=32x64", True),
        ("not jax", True),
        ("NOT torch", False),
        ("torch and jax", False),
        ("torch or jax", True),
        ("jax and jax or torch", True),
        ("torch or jax and jax", True),
        ("(torch or jax) and jax", False),
        ("not (jax or welford)", True),
        ("not not torch", True),
        ("not jax and not welford", True),
        ("((torch))", True),
        ("(torch)and(constant)", True),
        ("  torch  ", True),
        ("channels_last torch".replace(" ", " and "), True),
        ("andy or order or nothing", False),
        ("torch@cpu", True),
    ],
)
def test_an_expression_matches_parts_of_case_and_backend(expression: str, expected: bool) -> None:
    assert matcher(expression)(CASE, "torch@cpu") is expected


@pytest.mark.parametrize(
    ("expression", "complaint"),
    [
        ("", "expected a part of a case's or a backend's name, at position 1 of ''"),
        ("torch and", "expected a part of a case's or a backend's name, at position 10"),
        ("and torch", "position 1"),
        ("torch jax", "expected 'and' or 'or' before 'jax', at position 7"),
        ("(torch", "expected ')', at position 7"),
        ("torch)", "no parenthesis is open here, at position 6"),
        ("()", "position 2"),
        ("not", "position 4"),
        ("a or or b", "position 6"),
    ],
)
def test_a_mistake_in_an_expression_is_shown_with_its_position(
    expression: str, complaint: str
) -> None:
    with pytest.raises(SelectionError) as caught:
        matcher(expression)
    assert complaint in str(caught.value)
