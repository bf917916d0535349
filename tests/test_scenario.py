"""Scenario files: axes, ids, keys, and what is said about files that are wrong."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from bnaudit.document import MAX_NODES, parse
from bnaudit.scenario import (
    MAX_CASES,
    Case,
    Scenario,
    ScenarioError,
    json_schema,
    load,
    shipped,
)
from bnaudit.worker.backends import BACKENDS

PLAIN = "name: s\ninput: {distribution: normal}\nshape: [2, 3]\n"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(content: str | bytes, path: str = "s.yaml") -> str:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def the_scenario(content: str) -> Scenario:
    [scenario] = load([write(content)])
    return scenario


def the_case(content: str) -> Case:
    [case] = the_scenario(content).cases
    return case


def ids(content: str) -> list[str]:
    return [case.id for case in the_scenario(content).cases]


def complaint(content: str | bytes) -> str:
    with pytest.raises(ScenarioError) as raised:
        load([write(content)])
    return str(raised.value)


# --- what a scenario means --------------------------------------------------------------------------


def test_a_scenario_without_axes_is_one_case_with_the_documented_defaults() -> None:
    case = the_case(PLAIN)
    assert (case.id, case.scenario, case.file, case.line) == ("s", "s", "s.yaml", 1)
    resolved = case.model_dump(mode="json")
    for name in ("id", "scenario", "file", "line", "thresholds"):
        del resolved[name]
    normal = {"distribution": "normal", "mean": 0.0, "std": 1.0}
    assert resolved == {
        "input": normal,
        "shape": [2, 3],
        "dtype": "float32",
        "operation": "batch_norm",
        "mode": "training",
        "backward": False,
        "grad_output": normal,
        "memory_format": "contiguous",
        "eps": 1e-5,
        "momentum": 0.1,
        "steps": 1,
        "affine": {
            "weight": {"distribution": "constant", "value": 1.0},
            "bias": {"distribution": "constant", "value": 0.0},
        },
        "running": {
            "mean": {"distribution": "constant", "value": 0.0},
            "var": {"distribution": "constant", "value": 1.0},
        },
        "param_dtype": "statistics",
        "seed": 0,
    }


def test_the_header_is_kept() -> None:
    scenario = the_scenario(
        "# a comment\n\nname: s\ndescription: What for.\nsource: somewhere\n"
        "input: {distribution: normal}\nshape: [2, 3]\n"
        "thresholds: {y: {max_abs_error: 1e-3, bound_ratio: null}}\n"
        "controls: {must_fail: [caffe-2016@cpu], must_pass: [exact@cpu, welford@cpu]}\n"
    )
    assert (scenario.name, scenario.description, scenario.source) == ("s", "What for.", "somewhere")
    assert (scenario.file, scenario.line) == (Path("s.yaml"), 3)
    assert scenario.controls.must_fail == ("caffe-2016@cpu",)
    assert scenario.controls.must_pass == ("exact@cpu", "welford@cpu")
    assert scenario.cases[0].thresholds == {"y": {"max_abs_error": 1e-3, "bound_ratio": None}}


def test_a_list_is_an_axis_and_the_first_one_is_the_slowest() -> None:
    assert ids(
        "name: s\ninput: {distribution: constant, value: [100, 3.3, 1e-5]}\n"
        "shape: [[1, 1, 3, 3], [2, 3]]\ndtype: [float32, float16]\n"
    ) == [
        f"s/value={value},shape={shape},dtype={dtype}"
        for value in ("100", "3.3", "1e-05")
        for shape in ("1x1x3x3", "2x3")
        for dtype in ("float32", "float16")
    ]


def test_lists_by_nature_are_no_axes_and_lists_of_them_are() -> None:
    source = "{distribution: nonfinite, base: {distribution: normal}, values: %s}"
    assert ids(f"name: s\ninput: {source % '[nan, inf]'}\nshape: [2, 3]\n") == ["s"]
    assert ids(f"name: s\ninput: {source % '[[nan], [inf, -inf]]'}\nshape: [2, 3]\n") == [
        "s/values=nan",
        "s/values=inf+-inf",
    ]


@pytest.mark.parametrize(
    ("field", "labels"),
    [
        ("backward: [true, false]", ["backward=true", "backward=false"]),
        ("momentum: [null, 0.1]", ["momentum=null", "momentum=0.1"]),
        ("dtype: [float16]", ["dtype=float16"]),
        ("running: {var: [0, 1.0]}", ["var=0", "var=1.0"]),
        ("affine: [null, {weight: 2}]", ["affine=null", "affine=(weight=2)"]),
        (
            "affine: {weight: [1, {distribution: normal}, {distribution: normal, std: 2}]}",
            ["weight=1", "weight=normal", "weight=normal(std=2)"],
        ),
        (
            "affine: {weight: [-1, 1], bias: {distribution: constant, value: [2, 3]}}",
            ["weight=-1,value=2", "weight=-1,value=3", "weight=1,value=2", "weight=1,value=3"],
        ),
        (
            "grad_output: [{distribution: constant, value: [1, 2]}, {distribution: normal}]",
            [
                "grad_output=constant(value=1)",
                "grad_output=constant(value=2)",
                "grad_output=normal",
            ],
        ),
        (
            "grad_output: {distribution: channels, items: "
            "[{distribution: constant, value: [1, 2]}, {distribution: normal}]}",
            ["value=1", "value=2"],
        ),
        (
            "grad_output: {distribution: channels, items: "
            "[[{distribution: constant, value: 1}], [{distribution: normal}]]}",
            ["items=constant(value=1)", "items=normal"],
        ),
        (
            "grad_output: {distribution: [normal, uniform]}",
            ["distribution=normal", "distribution=uniform"],
        ),
    ],
)
def test_axes_are_labelled_by_their_leaf_and_values_as_written(
    field: str, labels: list[str]
) -> None:
    assert ids(PLAIN + field) == [f"s/{label}" for label in labels]


def test_axes_with_the_same_leaf_are_labelled_by_their_path() -> None:
    assert ids(
        "name: s\nshape: [2, 3]\nbackward: true\n"
        "input: {distribution: normal, mean: [0, 1]}\n"
        "grad_output: {distribution: normal, mean: [2], std: [3]}\n"
    ) == [f"s/input.mean={m},grad_output.mean=2,std=3" for m in (0, 1)]


def test_ids_are_unique_and_identical_cases_run_once() -> None:
    cases = the_scenario(PLAIN + "eps: [1e-5, 0.00001, 1e-3]\nmomentum: [1, 1.0]\n").cases
    assert [case.id for case in cases] == ["s/eps=1e-05,momentum=1", "s/eps=0.001,momentum=1"]


def test_equal_parameters_have_equal_keys_however_they_are_written() -> None:
    usual = the_case(PLAIN).key
    for written in (
        PLAIN.replace("name: s", "name: other\ndescription: Another."),
        PLAIN + "thresholds: {y: {max_abs_error: 1}}\n",
        PLAIN + "eps: 0.00001\nsteps: 1\nmode: training\n",
        PLAIN + "affine: {weight: 1, bias: {distribution: constant, value: 0}}\n",
        PLAIN + "running: {var: 1.0}\n",
        "shape: [2, 3]\ninput: {std: 1, distribution: normal, mean: 0}\nname: s\n",
    ):
        assert the_case(written).key == usual


def test_every_parameter_has_a_part_in_the_key() -> None:
    variants = [
        PLAIN,
        PLAIN.replace("normal", "uniform"),
        PLAIN.replace("[2, 3]", "[3, 2]"),
        PLAIN.replace("normal", "normal, std: 2"),
        *(
            PLAIN + field
            for field in (
                "dtype: float16",
                "mode: inference",
                "backward: true",
                "grad_output: {distribution: uniform}",
                "memory_format: strided",
                "eps: 1e-4",
                "momentum: null",
                "steps: 2",
                "affine: null",
                "affine: {weight: 2}",
                "running: {mean: 1}",
                "param_dtype: same",
                "seed: 1",
            )
        ),
    ]
    assert len({the_case(variant).key for variant in variants}) == len(variants)


def test_a_key_is_the_same_on_every_machine() -> None:
    """A changed key makes every stored report and baseline incomparable."""
    assert the_case(PLAIN).key[:16] == "cf594af022974fa8"


def test_the_content_of_a_file_of_values_has_a_part_in_the_key() -> None:
    text = "name: s\ninput: {distribution: file, path: x.npy}\n"
    np.save("x.npy", np.zeros((2, 3)))
    before = the_case(text).key
    assert the_case(text).key == before
    np.save("x.npy", np.ones((2, 3)))
    assert the_case(text).key != before


def test_the_shape_may_be_that_of_the_file_which_is_found_beside_the_scenario() -> None:
    Path("data").mkdir()
    np.savez("data/x.npz", x=np.zeros((4, 3, 5)), w=np.ones(3))
    text = (
        "name: s\ninput: {distribution: file, path: x.npz, key: x}\n"
        "affine: {weight: {distribution: file, path: x.npz, key: w}}\n"
    )
    [scenario] = load([write(text, "data/s.yaml")])
    assert scenario.cases[0].shape == (4, 3, 5)
    assert scenario.cases[0].file == "data/s.yaml"


def test_numbers_are_those_of_yaml_1_2() -> None:
    case = the_case(
        PLAIN + "eps: 1e-5\nmomentum: .5\nseed: 0x10\nrunning: {mean: -1E+2, var: 010}\n"
    )
    assert (case.eps, case.momentum, case.seed) == (1e-5, 0.5, 16)
    assert case.running.model_dump()["mean"]["value"] == -100
    assert case.running.model_dump()["var"]["value"] == 10


def test_a_case_knows_its_sizes_and_dtypes() -> None:
    case = the_case(
        PLAIN.replace("[2, 3]", "[2, 3, 5, 7]") + "dtype: bfloat16\nparam_dtype: same\n"
    )
    assert (case.channels, case.n) == (3, 70)
    assert (case.statistics_dtype, case.parameter_dtype) == ("float32", "bfloat16")
    assert the_case(PLAIN + "dtype: float64").statistics_dtype == "float64"


@pytest.mark.parametrize(
    ("shape", "supported"),
    [
        ([2, 3, 4, 5], True),
        ([2, 3, 4, 5, 6], True),
        ([0, 3, 4, 5], True),
        ([2, 3], False),
        ([2, 3, 4], False),
        ([2, 1, 4, 5], False),
        ([2, 3, 1, 1], False),
    ],
)
def test_channels_last_is_unsupported_where_it_means_nothing(
    shape: list[int], supported: bool
) -> None:
    text = PLAIN.replace("[2, 3]", str(shape))
    reason = the_case(text + "memory_format: channels_last").unsupported()
    assert (reason is None) is supported
    assert the_case(text + "memory_format: strided").unsupported() is None


# --- where scenarios come from ----------------------------------------------------------------------


def test_a_file_may_hold_several_scenarios() -> None:
    names = [s.name for s in load([write(PLAIN + "---\n" + PLAIN.replace("s\n", "t\n", 1))])]
    assert names == ["s", "t"]


def test_a_folder_is_searched_and_a_file_given_twice_is_loaded_once() -> None:
    write(PLAIN.replace("s\n", "b\n", 1), "f/b.yml")
    write(PLAIN.replace("s\n", "a\n", 1), "f/sub/a.yaml")
    write("not a scenario", "f/notes.txt")
    assert [s.name for s in load(["f", "f/b.yml", "./f"])] == ["b", "a"]


def test_one_name_in_two_places_is_an_error_that_names_both() -> None:
    write("\n" + PLAIN, "a.yaml")
    with pytest.raises(ScenarioError) as raised:
        load(["a.yaml", write(PLAIN + "---\n" + PLAIN)])
    assert str(raised.value) == (
        "s.yaml:1:1: name: found 's' again, after a.yaml:2; accepted is one scenario of a name"
    )


def test_what_cannot_be_found_is_said() -> None:
    Path("empty").mkdir()
    write(PLAIN, "f.yaml")
    for given, message in (
        ("empty", r"empty: found no \.yaml or \.yml file in this folder"),
        (
            "smok",
            r"smok: found no such file, folder or shipped scenario \(did you mean smoke\?\); accepted is .*",
        ),
        ("my_bn.py:f", r"my_bn\.py:f: found no scenario; a plug-in is named with -b FILE\.py:NAME"),
        ("none.yaml", r"none\.yaml: found no such file"),
        ("f.yaml/x", r"f\.yaml/x: found no such file"),
    ):
        with pytest.raises(ScenarioError, match=message):
            load([given])


# --- the shipped scenarios --------------------------------------------------------------------------


def test_all_shipped_scenarios_load_smoke_first_the_others_in_a_file_of_their_name() -> None:
    scenarios = load()
    assert {s.file.stem for s in scenarios[:3]} == {"smoke"}
    assert [s.name for s in scenarios[3:]] == [s.file.stem for s in scenarios[3:]]
    assert {s.file for s in scenarios} == set(shipped().iterdir())
    assert load([str(shipped())]) == scenarios
    assert load(["large-offset"])[0].name == "large-offset"
    assert [s.name for s in load(["caffe-3963"])] == ["caffe-3963"]


def test_scenarios_of_a_gpus_size_run_only_when_they_are_named() -> None:
    names = {"gpu-sizes", "gpu-huge"}
    assert not names & {s.name for s in load()}
    assert {load([name])[0].name for name in names} == names
    assert max(case.n for case in load(["gpu-sizes"])[0].cases) == 2**24
    assert math.prod(load(["gpu-huge"])[0].cases[0].shape) > 2**31


def test_every_shipped_scenario_says_what_it_is_for_and_has_controls() -> None:
    for scenario in load():
        assert 60 < len(scenario.description) < 400, scenario.name
        assert scenario.controls.must_pass, scenario.name
        assert scenario.source != "", scenario.name
    failing = {name for s in load() for name in s.controls.must_fail}
    assert {"one-pass@cpu", "two-pass-sequential@cpu", "caffe-2016@cpu", "shifted@cpu"} <= failing


def test_the_shipped_cases_stay_affordable() -> None:
    cases = [case for scenario in load() for case in scenario.cases]
    sizes = [math.prod(case.shape) * case.steps for case in cases]
    assert 350 <= len(cases) <= 850
    assert sum(size >= 6_000_000 for size in sizes) <= 6
    assert sum(size > 400_000 for size in sizes) <= 16
    assert max(case.n for case in cases) == 10**6
    smoke = [case for scenario in load(["smoke"]) for case in scenario.cases]
    assert len(smoke) <= 20


def test_the_cases_that_the_project_is_about_are_shipped() -> None:
    def found(**wanted: Any) -> bool:
        return any(
            all(getattr(case, name) == value for name, value in wanted.items())
            for scenario in load()
            for case in scenario.cases
        )

    def constant(value: float) -> Any:
        return the_case(
            f"name: s\nshape: [1, 1]\ninput: {{distribution: constant, value: {value}}}"
        ).input

    for value in (100, 10000, 3.3, 12345.678):
        assert found(input=constant(value), shape=(1, 1, 3, 3), dtype="float32")
    for memory_format in ("contiguous", "channels_last"):
        assert found(input=constant(3.3), shape=(32, 64, 56, 56), memory_format=memory_format)
    assert found(n=802816, dtype="float16", memory_format="channels_last", backward=True)


# --- the schema -------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Tuples as lists, for JSON Schema."""
    return json.loads(json.dumps(value))


def schema_accepts(content: str | bytes) -> bool:
    content = content.encode() if isinstance(content, str) else content
    validator = jsonschema.Draft202012Validator(json_schema())
    return all(validator.is_valid(plain(node.plain())) for node in parse(content, "s.yaml"))


def test_the_schema_is_one_and_accepts_every_shipped_scenario() -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())
    for file in shipped().iterdir():
        assert schema_accepts(file.read_bytes()), file.name


@pytest.mark.parametrize(
    ("field", "accepted"),
    [
        ("affine: {weight: [1, {distribution: normal, std: [1, 2]}]}", True),
        ("affine: [null, {weight: 2}]", True),
        ("grad_output: {distribution: [normal, uniform]}", True),
        ("momentum: [null, 1]", True),
        ("dtype: [float32, fp16]", False),
        ("dtype: []", False),
        ("momentun: 1", False),
        ("momentum: 2", False),
        ("grad_output: {distribution: normal, sdt: 1}", False),
        ("affine: {weight: one}", False),
        ("thresholds: {y: {max_abs_error: [1, 2]}}", False),
    ],
)
def test_the_schema_says_what_the_loader_says(field: str, accepted: bool) -> None:
    assert schema_accepts(PLAIN + field) is accepted
    if accepted:
        load([write(PLAIN + field)])
    else:
        complaint(PLAIN + field)


# --- broken files -----------------------------------------------------------------------------------

TOP = (
    "name, description, source, thresholds, controls, input, shape, dtype, operation, mode, backward, "
    "grad_output, memory_format, eps, momentum, steps, affine, running, param_dtype, seed"
)
SIMPLE = (
    "constant, normal, uniform, ramp, alternating, outlier, wide, sparse, subnormal, planted, file"
)
ALL = f"{SIMPLE}, channels, nonfinite, switch"
DTYPES = "float16, bfloat16, float32, float64"


def aliases(levels: int) -> str:
    lines = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join(["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]", *lines, ""])


BROKEN_YAML: dict[str, tuple[str | bytes, str]] = {
    "empty": (b"", "1:1: found no document; accepted is at least one scenario"),
    "only a comment": ("# nothing\n", "1:1: found no document; accepted is at least one scenario"),
    "an empty document": (
        f"{PLAIN}---\n",
        "5:1: found nothing; accepted is a mapping with name, input and shape",
    ),
    "a list": ("- a\n", "1:1: found ['a']; accepted is a mapping with name, input and shape"),
    "a text": ("text\n", "1:1: found 'text'; accepted is a mapping with name, input and shape"),
    "a tab": ("name: s\n\tinput: 1\n", "2:1: found a tab; accepted are spaces for indentation"),
    "a list without end": (
        "name: [a\n",
        "2:1: not valid YAML: expected ',' or ']', but got '<stream end>'",
    ),
    "a quote without end": ("name: 'a\n", "2:1: not valid YAML: found unexpected end of stream"),
    "two colons": ("name: s: t\n", "1:8: not valid YAML: mapping values are not allowed here"),
    "an unknown alias": ("name: *a\n", "1:7: not valid YAML: found undefined alias 'a'"),
    "Latin-1": (
        b"name: s\xe9\n",
        "1:8: found the byte 0xe9, which is not UTF-8; accepted is YAML in UTF-8",
    ),
    "UTF-16": (
        "name: s".encode("utf-16"),
        "1:1: found the byte 0xff, which is not UTF-8; accepted is YAML in UTF-8",
    ),
    "a control character": (
        "a: b\nname: s\x00\n",
        "2:8: found the character U+0000; accepted are printable ones",
    ),
    "a field twice": (
        "name: s\nname: t\n",
        "2:1: found the field name again, after line 1; accepted is one",
    ),
    "a Python object": (
        "name: !!python/object/apply:os.system ['touch exploded']\n",
        "1:7: found the tag !!python/object/apply:os.system; accepted are plain values",
    ),
    "a tag": ("seed: !!int 3\n", "1:7: found the tag !!int; accepted are plain values"),
    "a tag of one's own": ("seed: !x 3\n", "1:7: found the tag !x; accepted are plain values"),
    "an alias bomb": (
        aliases(9),
        f"1:22: found aliases that write out to more than {MAX_NODES} values; accepted are fewer",
    ),
    "recursion": (
        "input: &a {base: *a}\n",
        "1:8: found an alias to something that contains it; accepted is a tree",
    ),
    "deep nesting": (
        "name: " + "[" * 40 + "]" * 40,
        "1:36: found very deep nesting; accepted are 30 levels",
    ),
    "very deep nesting": (
        "name: " + "[" * 5000 + "]" * 5000,
        "1:1: found very deep nesting; accepted are 30 levels",
    ),
    "a number as a field": ("1: x\n", "1:1: found 1 as a field; accepted are names"),
    "a list as a field": ("? [a]\n: x\n", "1:3: found ['a'] as a field; accepted are names"),
    "a field that cannot be printed": (
        '"\\ud800": x\n',
        "1:1: found '\\ud800' as a field; accepted are names",
    ),
    "a number of many digits": (
        f"seed: {'9' * 5000}\n",
        "1:7: found a number of 5000 digits; accepted are fewer",
    ),
}

BROKEN_FIELDS: dict[str, str] = {
    # Appended to a good scenario: field → what is said after file and line.
    "sahpe: [1]": f"1: sahpe: there is no such field; accepted are {TOP} (did you mean shape?)",
    "momentun: 0.1": f"1: momentun: there is no such field; accepted are {TOP} (did you mean momentum?)",
    "<<: {a: 1}": f"1: <<: there is no such field; accepted are {TOP}",
    "dtype: flot32": f"8: dtype: found 'flot32'; accepted are {DTYPES} (did you mean float32?)",
    "dtype: [float32, half]": f"18: dtype: found 'half'; accepted are {DTYPES}",
    "dtype: 32": f"8: dtype: found 32; accepted are {DTYPES}",
    "dtype: []": "8: dtype: found an empty list; accepted is at least one value",
    "dtype: [[float32]]": "9: dtype: found a list in a list; accepted is one list",
    "backward: yes": "11: backward: found 'yes'; accepted is true or false",
    "backward: 1": "11: backward: found 1; accepted is true or false",
    "eps: -1e-5": "6: eps: found -1e-05; accepted is a number of at least 0",
    "eps: [1e-5, big]": "13: eps: found 'big'; accepted is a number",
    "eps: '1e-5'": "6: eps: found '1e-5'; accepted is a number",
    "eps: 1_000": "6: eps: found '1_000'; accepted is a number",
    "eps: true": "6: eps: found true; accepted is a number",
    "eps: .nan": "6: eps: found nan; accepted is a finite number",
    "eps: 1e999": "6: eps: found inf; accepted is a finite number",
    "eps:": "5: eps: found nothing; accepted is a number",
    "eps: {a: 1}": "6: eps: found a mapping; accepted is a number",
    "momentum: 1.5": "11: momentum: found 1.5; accepted is a number of at most 1, or null",
    "momentum: none": "11: momentum: found 'none'; accepted is a number, or null",
    "steps: 0": "8: steps: found 0; accepted is a number of at least 1",
    "steps: 2.0": "8: steps: found 2.0; accepted is a whole number",
    "seed: 18446744073709551616": (
        "7: seed: found 18446744073709551616; accepted is a number of at most 18446744073709551615"
    ),
    "mode: inference\nsteps: 3": "8: steps: found 3 steps of inference; accepted is 1",
    "mode: eval": "7: mode: found 'eval'; accepted are training, inference",
    "memory_format: channels-last": (
        "16: memory_format: found 'channels-last'; accepted are contiguous, channels_last, strided "
        "(did you mean channels_last?)"
    ),
    "operation: layer_norm": (
        "12: operation: found 'layer_norm'; accepted is batch_norm (did you mean batch_norm?)"
    ),
    "affine: 1": "9: affine: found 1; accepted is a mapping, or null",
    "affine: {weight: one}": (
        "18: affine.weight: found 'one'; "
        "accepted is a number, or a mapping such as {distribution: normal}"
    ),
    "affine: {wieght: 1}": (
        "10: affine.wieght: there is no such field; accepted are weight, bias (did you mean weight?)"
    ),
    "affine: {weight: {distribution: ramp}}": (
        "18: affine.weight: found ramp, which varies within a channel; "
        "accepted is one value for each channel, such as a number, normal or channels"
    ),
    "running: null": "10: running: found nothing; accepted is a mapping",
    "running: {mean: .inf}": "17: running.mean: found inf; accepted is a finite number",
    "running: {variance: 1}": (
        "11: running.variance: there is no such field; accepted are mean, var (did you mean var?)"
    ),
    "description: [a]": "14: description: found ['a']; accepted is text",
    "source: 3963": "9: source: found 3963; accepted is text, or null",
    "thresholds: {yy: {}}": (
        "14: thresholds.yy: there is no such field; accepted are y, batch_mean, batch_var, invstd, "
        "running_mean, running_var, grad_input, grad_weight, grad_bias (did you mean y?)"
    ),
    "thresholds: {y: {max_abs_eror: 1}}": (
        "18: thresholds.y.max_abs_eror: there is no such field; accepted are max_abs_error, "
        "max_ulp_error, bound_ratio, tight_ratio, constant_abs_error (did you mean max_abs_error?)"
    ),
    "thresholds: {y: 1}": "17: thresholds.y: found 1; accepted is a mapping",
    "thresholds: {y: {bound_ratio: [1, 2]}}": (
        "31: thresholds.y.bound_ratio: found [1, 2]; accepted is a number, or null"
    ),
    "thresholds: {y: {bound_ratio: -1}}": (
        "31: thresholds.y.bound_ratio: found -1; accepted is a number of at least 0, or null"
    ),
    "controls: {must_fail: [cafe-2016@cpu]}": (
        f"24: controls.must_fail.0: found 'cafe-2016@cpu'; accepted are {', '.join(BACKENDS)} "
        "(did you mean caffe-2016@cpu?)"
    ),
    "controls: {must_pass: exact@cpu}": (
        "23: controls.must_pass: found 'exact@cpu'; accepted is a list"
    ),
    "controls: {mustpass: []}": (
        "12: controls.mustpass: there is no such field; "
        "accepted are must_fail, must_pass (did you mean must_pass?)"
    ),
    f"seed: [{', '.join(map(str, range(MAX_CASES + 1)))}]": (
        f"1: found {MAX_CASES + 1} cases; accepted are up to {MAX_CASES}"
    ),
}

BROKEN_INPUTS: dict[str, str] = {
    # As the input of a shape [2, 3], on line 2: input → what is said after "s.yaml:2:".
    "normal": (
        "8: input: found 'normal'; accepted is a mapping such as {distribution: normal} "
        "(did you mean {distribution: normal}?)"
    ),
    "": "7: input: found nothing; accepted is a mapping such as {distribution: normal}",
    "{}": (
        "8: input.distribution: missing; accepted are constant, normal, uniform, ramp, alternating, "
        "outlier, wide, sparse, subnormal, planted, nonfinite, channels, switch, file"
    ),
    "{distributon: normal}": (
        "9: input.distributon: there is no such field (did you mean distribution?)"
    ),
    "{distribution: nromal}": (
        f"23: input.distribution: found 'nromal'; accepted are {ALL} (did you mean normal?)"
    ),
    "{distribution: 3}": f"23: input.distribution: found 3; accepted are {ALL}",
    "{distribution: normal, sdt: 2}": (
        "31: input.sdt: there is no such field; accepted are distribution, mean, std "
        "(did you mean std?)"
    ),
    "{distribution: constant}": "8: input.value: missing; it has no default",
    "{distribution: constant, valeu: 3}": (
        "33: input.valeu: there is no such field; accepted are distribution, value "
        "(did you mean value?)"
    ),
    "{distribution: constant, value: .inf}": "40: input.value: found inf; accepted is a finite number",
    "{distribution: normal, std: [1, -1]}": (
        "40: input.std: found -1; accepted is a number of at least 0"
    ),
    "[{distribution: normal}, {distribution: constant, value: [1, x]}]": (
        "69: input.value: found 'x'; accepted is a number"
    ),
    "{distribution: outlier, value: 1, position: middle}": (
        "52: input.position: found 'middle'; accepted are first, last, random"
    ),
    "{distribution: wide, low_exponent: 5, high_exponent: 3}": (
        "8: input: found high_exponent 3 below low_exponent 5; accepted are exponents in order"
    ),
    "{distribution: wide, low_exponent: 0.5, high_exponent: 3}": (
        "43: input.low_exponent: found 0.5; accepted is a whole number"
    ),
    "{distribution: planted, mean: 0, spread: 3}": (
        "8: input: found a spread of 3; accepted is a power of two"
    ),
    "{distribution: planted, mean: 0.1, spread: 1}": (
        "8: input: found 0.1 ± 1.0; accepted are values that float32 holds"
    ),
    "{distribution: planted, mean: 0, spread: 0}": (
        "49: input.spread: found 0; accepted is a number above 0"
    ),
    "{distribution: nonfinite, base: {distribution: normal}, values: [nan, infinity]}": (
        "78: input.values.1: found 'infinity'; accepted are nan, inf, -inf (did you mean inf?)"
    ),
    "{distribution: nonfinite, base: {distribution: normal}, values: nan}": (
        "72: input.values: found 'nan'; accepted is a list"
    ),
    "{distribution: nonfinite, base: {distribution: normal}, values: [nan], count: 7}": (
        "8: input: found a count of 7; accepted are up to 6, the tensor's size"
    ),
    "{distribution: nonfinite, base: {distribution: nonfinite}, values: [nan]}": (
        f"55: input.base.distribution: found 'nonfinite'; accepted are {SIMPLE}, channels"
    ),
    "{distribution: channels, items: []}": (
        "40: input.items: found []; accepted is a list of at least 1"
    ),
    "{distribution: channels, items: [{distribution: normal, men: 1}]}": (
        "64: input.items.0.men: there is no such field; accepted are distribution, mean, std "
        "(did you mean mean?)"
    ),
    "{distribution: channels, items: [{distribution: normal}, [{distribution: normal}]]}": (
        "65: input.items: found a list among single values; accepted is one or the other"
    ),
    "{distribution: file, path: none.npy}": (
        "8: input: none.npy cannot be read: No such file or directory"
    ),
    "{distribution: file, path: four.npy}": (
        "8: input: found shape 4x4 in four.npy; accepted is 2x3"
    ),
    "{distribution: file, path: pickled.npy}": (
        "8: input: pickled.npy is not a valid .npy file: "
        "Array can't be memory-mapped: Python objects in dtype."
    ),
    "{distribution: file, path: words.npy}": (
        "8: input: words.npy holds <U3 values, not real numbers of up to 64 bits"
    ),
    "{distribution: file, path: ''}": "35: input.path: found ''; accepted is some text",
}

BROKEN_SHAPES: dict[str, str] = {
    # As the shape, on line 3: shape → what is said after "s.yaml:3:".
    "[2]": "8: shape: found [2]; accepted is a list of at least 2",
    "[2, 3, 4, 5, 6, 7]": "8: shape: found [2, 3, 4, 5, 6, 7]; accepted is a list of at most 5",
    "[]": "8: shape: found []; accepted is a list of at least 2",
    "2x3": "8: shape: found '2x3'; accepted is a list",
    "[2, x]": "12: shape.1: found 'x'; accepted is a whole number",
    "[2.0, 3]": "9: shape.0: found 2.0; accepted is a whole number",
    "[2, 0]": "8: shape: found [2, 0]; accepted are sizes of at least 1, and 0 for the batch",
    "[-2, 3]": "8: shape: found [-2, 3]; accepted are sizes of at least 1, and 0 for the batch",
    "[[2, 3], [4]]": "17: shape: found [4]; accepted is a list of at least 2",
    "[[2, 3], 4]": "9: shape: found a list among single values; accepted is one or the other",
    "[[[2, 3]]]": "9: shape: found a list in a list; accepted is one list",
    "[1000000, 1000000]": "8: shape: found 1e+12 elements; accepted are up to 8.58993e+09",
    f"[1, {10**40}]": "8: shape: found 1e+40 elements; accepted are up to 8.58993e+09",
}


def test_there_are_more_than_thirty_kinds_of_broken_files() -> None:
    assert len({*BROKEN_YAML, *BROKEN_FIELDS, *BROKEN_INPUTS, *BROKEN_SHAPES}) > 100


@pytest.mark.parametrize("kind", BROKEN_YAML)
def test_broken_yaml_is_refused_with_one_sentence_and_its_place(kind: str) -> None:
    content, message = BROKEN_YAML[kind]
    assert complaint(content) == f"s.yaml:{message}"
    assert not Path("exploded").exists()


@pytest.mark.parametrize("field", BROKEN_FIELDS, ids=lambda field: field[:40])
def test_a_broken_field_is_refused_with_one_sentence_and_its_place(field: str) -> None:
    said = complaint(PLAIN + field)
    assert re.sub(r"^s\.yaml:\d+:", "", said) == BROKEN_FIELDS[field]


@pytest.mark.parametrize("written", BROKEN_INPUTS)
def test_a_broken_input_is_refused_with_one_sentence_and_its_place(written: str) -> None:
    np.save("four.npy", np.zeros((4, 4)))
    np.save("pickled.npy", np.array([None], object), allow_pickle=True)
    np.save("words.npy", np.array(["one"]))
    said = complaint(f"name: s\ninput: {written}\nshape: [2, 3]\n")
    assert said == f"s.yaml:2:{BROKEN_INPUTS[written]}"


@pytest.mark.parametrize("written", BROKEN_SHAPES)
def test_a_broken_shape_is_refused_with_one_sentence_and_its_place(written: str) -> None:
    said = complaint(f"name: s\ninput: {{distribution: normal}}\nshape: {written}\n")
    assert said == f"s.yaml:3:{BROKEN_SHAPES[written]}"


@pytest.mark.parametrize(
    ("field", "needed"),
    [
        ("name", "it has no default"),
        ("input", "it has no default"),
        (
            "shape",
            "accepted is a list such as [32, 64, 56, 56]; only with `distribution: file` is it optional",
        ),
    ],
)
def test_a_missing_field_is_said(field: str, needed: str) -> None:
    lines = [line for line in PLAIN.splitlines() if not line.startswith(field)]
    assert complaint("\n".join(lines)) == f"s.yaml:1:1: {field}: missing; {needed}"


def test_a_billion_cases_are_refused_before_they_are_made() -> None:
    axis = f"[{', '.join(map(str, range(1, 1000)))}]"
    source = f"{{distribution: normal, mean: {axis}, std: {axis}}}"
    said = complaint(f"name: s\ninput: {source}\nshape: [2, 3]\nseed: {axis}\n")
    assert said == f"s.yaml:1:1: found {999**3} cases; accepted are up to {MAX_CASES}"


def test_cases_up_to_the_limit_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bnaudit.scenario.MAX_CASES", 8)
    items = "{distribution: constant, value: [1, 2]}, {distribution: normal}"
    text = (
        f"name: s\ninput: {{distribution: channels, items: [{items}]}}\n"
        "shape: [[1, 1, 3, 3], [2, 3]]\nseed: [0, 1]\n"
    )
    assert len(the_scenario(text).cases) == 8
    assert complaint(text + "eps: [0, 1]") == "s.yaml:1:1: found 16 cases; accepted are up to 8"


def test_no_damage_to_a_file_gives_anything_but_a_scenario_or_a_complaint() -> None:
    """Cuts, doublings and strange bytes at random places of shipped scenarios."""
    rng = random.Random(2016)
    originals = [
        (shipped() / f"{name}.yaml").read_bytes() for name in ("smoke", "affine", "non-finite")
    ]
    complaints = []
    for _ in range(400):
        content = bytearray(rng.choice(originals))
        for _ in range(rng.randint(1, 3)):
            start = rng.randrange(len(content))
            stop = start + rng.randint(0, 12)
            content[start:stop] = rng.choice(
                [
                    b"",
                    content[start:stop] * 2,
                    b"[",
                    b"}",
                    b": ",
                    b"*a",
                    b"\n",
                    b"\t",
                    b"\xff",
                    b"-1",
                ]
            )
        try:
            load([write(bytes(content))])
        except ScenarioError as error:
            complaints.append(str(error))
    assert len(complaints) > 50
    for said in complaints:
        assert re.fullmatch(r"s\.yaml:\d+:\d+: \S.*", said), said
        assert "pydantic" not in said
        assert "Input should" not in said
