"""The HTML report: what it says without scripts, that nothing of a report is markup, and how it is used.

The second half opens pages in a headless Chromium, from files, and clicks and types as a reader does.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path
from random import Random
from typing import Any

import html5lib
import pytest
from standins import OFFSET, facts, judged, report, result, scenarios, typical, wrong

from bnaudit.audit import ControlOutcome
from bnaudit.consistency import Consistency, Disagreement
from bnaudit.measure import Worst
from bnaudit.render.html import html
from bnaudit.render.words import number

XHTML = "{http://www.w3.org/1999/xhtml}"

VENDORED = {  # as published on npm
    "d3.min.js": "912111098ea99503a6f4967361d2bbdc9dbf58cf9c678c8e27e5b02d1a07f0c1",
    "plot.umd.min.js": "4358086467740777dd788d6b27a95cebdbaefdd50c730a3060117073bd7134cb",
}

ATTACKS = (
    "</script><script>window.pwned = 1</script>",
    "<!--<script>",
    "<img src=x onerror='window.pwned = 1'>",
    "' onmouseover='window.pwned = 1' \" onfocus=\"window.pwned = 1",
    "]]></style></title></textarea><svg/onload=window.pwned=1>",
    "\u2028window.pwned = 1\u2029",
    "$data ${scripts} &lt;b&gt; :smile: [red]markup[/red]",
    "\x00\x07\x1b[31m\x85",
)
HOSTILE = " ".join(ATTACKS)


@cache
def page() -> str:
    return html(report())


@cache
def hostile() -> str:
    """The page of a report with markup wherever the text is not bnaudit's own."""
    case = scenarios()[0].cases[0]
    made = report(
        facts(case),
        result(
            case,
            "torch@cpu",
            "fail",
            reason=HOSTILE,
            kernel=HOSTILE,
            cause=HOSTILE,
            quantities={"y": wrong(1.0, reason=HOSTILE)},
        ),
        result(case, f"{HOSTILE}.py:f@cpu", "crash", gated=True, reason=HOSTILE, detail=HOSTILE),
        result(case, f"{HOSTILE}.py:g@cpu", "unavailable", gated=True, reason=HOSTILE),
        ControlOutcome("constant-channel", HOSTILE, "pass", HOSTILE, False),
        Consistency(case, "torch@cpu", HOSTILE, False, HOSTILE),
        Disagreement(case, "y", ("torch@cpu", HOSTILE), 1.0, 7.0),
        verdict="incomplete",
        exit_code=3,
    )
    environment = made.environments[0].model_copy(
        update={"platform": HOSTILE, "blas": HOSTILE, "packages": {HOSTILE: HOSTILE}}
    )
    changed = {
        "command": HOSTILE,
        "environments": [environment],
        "missing": {HOSTILE: HOSTILE},
        "unmade": [HOSTILE],
    }
    return html(made.model_copy(update=changed))


@cache
def parsed(text: str, *, strict: bool = True) -> Any:
    return html5lib.HTMLParser(strict=strict).parse(text)


def elements(text: str, tag: str, *, strict: bool = True) -> list[Any]:
    return list(parsed(text, strict=strict).iter(f"{XHTML}{tag}"))


def words(element: Any) -> str:
    return " ".join("".join(element.itertext()).split())


def data(text: str) -> dict[str, Any]:
    """The embedded records, as strict JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    [script] = [s for s in elements(text, "script") if s.get("type") == "application/json"]
    found: dict[str, Any] = json.loads(script.text, parse_constant=refuse)
    return found


def records(table: dict[str, Any]) -> list[dict[str, Any]]:
    return [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]


# --- without a browser -----------------------------------------------------------------------------


@pytest.mark.parametrize("made", [page, hostile])
def test_a_page_is_valid_html_without_duplicate_ids(made: Callable[[], str]) -> None:
    ids = Counter(e.get("id") for e in parsed(made()).iter() if e.get("id"))
    assert {"findings", "map", "plots", "results", "trust", "environments"} <= set(ids)
    assert set(ids.values()) == {1}


def test_invalid_html_would_be_noticed() -> None:
    with pytest.raises(html5lib.html5parser.ParseError):
        parsed(page().replace("<main>", "<main><p></div>"))


def test_verdict_and_summary_come_first_and_need_no_script() -> None:
    [main] = elements(page(), "main")
    assert words(main).startswith("FAIL (exit 1) 20 of 26 ran: 14 pass, 1 warn, 5 fail (4 of them")


def test_findings_are_in_the_terminals_words() -> None:
    [first, *others] = [e for e in elements(page(), "li") if "finding" in (e.get("class") or "")]
    assert words(first).startswith(
        "FAIL 1 torch@cpu constant-channel value=3.3 channels_last 32x64x56x56 "
        "y[0,17,0,0] = -0.467, should be 0; must equal the bias and is off by 0.467 σ"
    )
    assert "cause BN003 low-precision accumulation" in words(first)
    assert all(words(other).startswith("(fail)") for other in others)


def test_a_misbehaving_control_is_unfolded() -> None:
    def unfolded(*, ok: bool) -> list[bool]:
        made = report(
            *typical(), ControlOutcome("large-offset", "welford@cpu", "pass", "1 of 2 failed", ok)
        )
        folds = [e for e in elements(html(made), "details") if words(e).startswith("controls")]
        return ["open" in fold.attrib for fold in folds]

    assert unfolded(ok=True) == [False]
    assert unfolded(ok=False) == [True]


def test_checks_that_do_not_hold_and_disagreements_are_listed() -> None:
    case = scenarios()[0].cases[0]
    made = report(
        *typical(),
        Consistency(case, "torch@cpu", "threads", False, "y[0] was 1, then 2"),
        Consistency(case, "torch@cpu", "repeat", True),
        Disagreement(case, "y", ("torch@cpu", "mine.py:f@cpu"), 0.5, 7.0),
    )
    [trust] = [e for e in elements(html(made), "section") if e.get("id") == "trust"]
    assert "1 of 2 checks hold" in words(trust)
    assert "y[0] was 1, then 2" in words(trust)
    assert "gated backends disagree in 1 of 1 cases" in words(trust)
    assert "torch@cpu and mine.py:f@cpu" in words(trust)


def test_what_was_not_judged_is_listed_with_the_reason() -> None:
    first, second = scenarios(f"{OFFSET}backward: true\n")[0].cases
    refused = result(second, "torch@cpu", "unsupported", reason="no such dtype")
    made = report(facts(first), result(first), facts(second), refused)
    [trust] = [e for e in elements(html(made), "section") if e.get("id") == "trust"]
    assert "1 unsupported: no such dtype" in words(trust)
    assert "torch@cpu did not return them: grad_input in 1 of 1 case" in words(trust)


def test_the_page_needs_nothing_from_elsewhere() -> None:
    for element in parsed(page()).iter():
        for attribute in ("src", "href", "srcset", "action", "data", "poster"):
            assert (element.get(attribute) or "#").startswith("#")
    [style] = elements(page(), "style")
    assert not re.search(r"url\(|@import", style.text)


def test_the_policy_names_the_pages_scripts_and_allows_no_others() -> None:
    [policy] = [e.get("content") for e in elements(page(), "meta") if e.get("http-equiv")]
    allowed = set(re.findall("'sha256-([^']+)'", policy))
    scripts = [s.text for s in elements(page(), "script") if not s.get("type")]
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    assert allowed == set(digests)
    assert len(scripts) == 3
    directives = dict(part.split(" ", 1) for part in policy.split("; "))
    assert directives["default-src"] == "'none'"
    assert "unsafe" not in directives["script-src"]


@pytest.mark.parametrize("name", VENDORED)
def test_vendored_libraries_are_those_published_and_have_their_licences(name: str) -> None:
    assets = files("bnaudit.render") / "assets"
    assert hashlib.sha256((assets / name).read_bytes()).hexdigest() == VENDORED[name]
    assert page().count("Permission to use, copy, modify, and/or distribute this software") == 2


def marks(text: str, *, strict: bool = True) -> Counter[str]:
    """Elements and attributes that attacks would add."""
    document = list(parsed(text, strict=strict).iter())
    tags = [str(e.tag).partition("}")[2] for e in document]
    handlers = [str(name) for e in document for name in e.attrib if str(name).startswith("on")]
    return Counter([*(t for t in tags if t in ("script", "img", "svg", "textarea")), *handlers])


def test_text_of_a_report_never_becomes_markup() -> None:
    assert marks(hostile()) == marks(page()) == {"script": 4}


def test_markup_would_be_noticed() -> None:
    careless = page().replace("</main>", f"{ATTACKS[0]}{ATTACKS[2]}</main>")
    assert marks(careless, strict=False) == {"script": 5, "img": 1, "onerror": 1}


def test_hostile_text_arrives_whole_in_the_data() -> None:
    rows = records(data(hostile())["results"])
    assert rows[0]["reason"] == rows[0]["kernel"] == rows[1]["detail"] == HOSTILE
    [script] = [s for s in elements(hostile(), "script") if s.get("type")]
    assert not re.search("[<>&\u2028\u2029]", script.text)


def test_every_result_is_embedded_with_its_numbers() -> None:
    made = report()
    found = data(html(made))
    cases, results = records(found["cases"]), records(found["results"])
    assert [cases[row["case"]]["id"] for row in results] == [r.case for r in made.results]
    assert [row["status"] for row in results] == [r.status for r in made.results]
    for row, record in zip(results, made.results, strict=True):
        assert len(row["quantities"]) == len(record.quantities)
        for values, (name, quantity) in zip(
            row["quantities"], record.quantities.items(), strict=True
        ):
            fields = dict(zip(found["fields"], values, strict=True))
            assert found["quantities"][fields["name"]] == name
            assert fields["max_abs_error"] == pytest.approx(quantity.max_abs_error, rel=1e-3)
            assert quantity.worst is not None
            assert fields["value"] == quantity.worst.value


def test_numbers_that_json_does_not_have_are_named() -> None:
    case = scenarios()[0].cases[0]
    y = wrong(1.0, max_abs_error=math.nan, bound_ratio=math.inf, worst=Worst((0,), -math.inf, 0.0))
    found = data(
        html(report(facts(case, math.inf), result(case, "torch@cpu", "fail", quantities={"y": y})))
    )
    [row] = records(found["results"])
    fields = dict(zip(found["fields"], row["quantities"][0], strict=True))
    assert (fields["max_abs_error"], fields["bound_ratio"], fields["value"]) == (
        "nan",
        "inf",
        "-inf",
    )
    assert records(found["cases"])[0]["condition_number"] == "inf"


def test_a_report_in_which_nothing_ran_is_a_page() -> None:
    case = scenarios()[0].cases[0]
    absent = result(case, "torch@cuda", "unavailable", reason="no GPU")
    made = report(facts(case), absent, verdict="nothing-gated", exit_code=5)
    empty = made.model_copy(update={"cases": [], "results": [], "environments": []})
    for text in (html(made), html(empty)):
        assert "NOTHING-GATED (exit 5): nothing ran" in words(parsed(text))


# --- in a browser ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright: pip install '.[browser]'")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    installed = next(filter(None, map(shutil.which, names)), None)
    with api.sync_playwright() as playwright:
        executable = installed or playwright.chromium.executable_path
        if not Path(executable).exists():
            pytest.skip("no Chromium is installed: apt-get install chromium")
        # Without its sandbox, which root and most containers cannot have; it opens only files made here.
        started = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield started
        started.close()


class Opened:
    """An open page, and what the browser said and asked for meanwhile."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.said: list[str] = []
        self.requested: list[str] = []
        page.on("console", lambda message: self.said.append(message.text))
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("request", lambda request: self.requested.append(request.url))
        page.set_default_timeout(5000)

    def texts(self, selector: str) -> list[str]:
        found: list[str] = self.page.locator(selector).all_inner_texts()
        return found

    def focused(self) -> str:
        name: str = self.page.evaluate(
            "document.activeElement.getAttribute('aria-label') ?? document.activeElement.innerText"
        )
        return name

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def count(self, text: str) -> None:
        """Waits until so many results are shown."""
        self.page.wait_for_function(
            "text => document.getElementById('count').textContent === text", arg=text
        )


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Opened]]:
    """Opens a page from a file; at the end nothing must have been said or requested but that file."""
    all_opened: list[Opened] = []

    def visit(
        text: str | None = None, *, quiet: bool = True, width: int = 1280, **options: Any
    ) -> Opened:
        path = tmp_path / f"{len(all_opened)}.html"
        path.write_text(page() if text is None else text, encoding="utf-8")
        context = browser.new_context(viewport={"width": width, "height": 800}, **options)
        visited = Opened(context.new_page())
        visited.page.goto(path.as_uri())
        if quiet:
            all_opened.append(visited)
        return visited

    yield visit
    for visited in all_opened:
        assert visited.said == []
        assert [url for url in visited.requested if not url.startswith("file:")] == []
        assert len(visited.requested) == 1
    for context in browser.contexts:
        context.close()


def test_an_injected_script_does_not_run_and_the_attempt_is_noticed(
    opened: Callable[..., Opened],
) -> None:
    text = page().replace(
        "</main>",
        "<script>window.pwned = 1</script><img src='https://example.org/x.png' onerror='window.pwned = 1'>"
        "</main>",
    )
    visited = opened(text, quiet=False)
    visited.page.wait_for_timeout(100)
    assert visited.page.evaluate("window.pwned") is None
    assert len(visited.said) >= 2


def test_hostile_text_is_shown_as_it_is(opened: Callable[..., Opened]) -> None:
    visited = opened(hostile())
    visited.page.locator("#table tbody button").first.click()
    shown = " ".join(visited.texts("#detail"))
    for attack in ATTACKS[:5]:
        assert attack in shown
    visited.press("Escape")
    for cell in visited.page.locator("#grid tbody button").all():
        cell.hover()
    assert visited.page.evaluate("window.pwned") is None
    assert visited.page.locator("main img, main iframe, main script").count() == 0


def test_filters_show_what_matches(opened: Callable[..., Opened]) -> None:
    visited = opened()
    visited.count("26 of 26 results")
    visited.page.fill("#text", "CAFFE value=3.3")
    visited.count("2 of 26 results")
    assert set(visited.texts("#table td.backend")) == {"(caffe-2016@cpu)"}
    assert visited.texts("#grid tbody th") == ["(caffe-2016@cpu)"]
    visited.page.fill("#text", "nothing is called this")
    visited.count("0 of 26 results")
    assert visited.texts("#readout") == ["Nothing that matches these filters ran."]
    visited.page.get_by_role("button", name="Reset").click()
    visited.count("26 of 26 results")
    visited.page.check("#gated")
    visited.page.locator(".chip", has_text="unavailable").click()
    visited.count("6 of 26 results")
    assert set(visited.texts("#table td.backend")) == {"torch@cpu"}
    visited.page.select_option("#scenario", "large-offset")
    visited.count("2 of 26 results")


def test_the_list_is_worst_first_and_sorts_by_any_column(opened: Callable[..., Opened]) -> None:
    visited = opened()
    statuses = visited.texts("#table td.status")
    assert statuses[:5] == ["fail", *["(fail)"] * 4]
    assert statuses[5] == "warn"
    heading = visited.page.locator("#table th.bound")
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    assert visited.focused() == "×bound"
    ratios = [float(text) for text in visited.texts("#table td.bound") if text != "–"]
    assert ratios == sorted(ratios, reverse=True)
    visited.press("Enter")
    assert heading.get_attribute("aria-sort") == "ascending"
    everything = visited.texts("#table td.bound")
    assert [float(text) for text in everything[: len(ratios)]] == ratios[::-1]
    assert set(everything[len(ratios) :]) == {"–"}


def test_a_case_is_reached_and_left_by_keyboard(opened: Callable[..., Opened]) -> None:
    visited = opened()
    visited.page.locator("#measure").focus()
    visited.press("Shift+Tab", "Shift+Tab")
    assert visited.focused().startswith(
        "torch@cpu · constant-channel · worst value=3.3 channels_last"
    )
    visited.press("Enter", "ArrowRight", "ArrowRight", "ArrowRight")
    case = "torch@cpu · constant-channel · value=3.3 channels_last 32x64x56x56"
    assert visited.focused() == f"{case} · fail · off by 0.467 σ · 91 × bound"
    assert visited.texts("#readout") == [visited.focused()]
    visited.press("ArrowUp")
    assert visited.focused() == "constant-channel"
    visited.press("ArrowDown", "ArrowRight", "ArrowRight", "ArrowRight", "Enter")
    assert visited.texts("#detail h2") == ["fail torch@cpu"]
    visited.press("Escape")
    assert not visited.page.locator("#detail").is_visible()
    assert visited.focused().startswith("torch@cpu · constant-channel · value=3.3 channels_last")
    visited.press("Escape")
    assert visited.focused().startswith("torch@cpu · constant-channel · worst value=3.3")


def test_a_page_has_one_tab_stop_in_the_map(opened: Callable[..., Opened]) -> None:
    visited = opened()
    visited.page.locator("#grid tbody button").first.focus()
    visited.press("ArrowDown", "ArrowRight", "Tab")
    assert visited.page.evaluate("document.activeElement.id") == "quantity"
    visited.press("Shift+Tab")
    assert visited.focused().startswith("(welford@cpu) · large-offset")


EXACT = (1.0, -0.0, 0.1, -1e-310, 5e-324, 2.0**-1022, 1.7976931348623157e308, 100.0, 2.0**60)


def test_the_details_have_every_number_bit_for_bit(opened: Callable[..., Opened]) -> None:
    case = scenarios()[0].cases[0]
    quantities = {f"q{i}": judged(worst=Worst((i,), x, 1.0)) for i, x in enumerate(EXACT)}
    quantities["q9"] = judged("fail", nonfinite=1, worst=Worst((9,), math.nan, math.inf))
    made = report(facts(case), result(case, "torch@cpu", "fail", quantities=quantities))
    visited = opened(html(made))
    visited.page.locator("#table tbody button").click()
    hexadecimal = visited.texts("#detail td.mono:last-child")
    worst = [q.worst for q in made.results[0].quantities.values() if q.worst is not None]
    assert hexadecimal[::2] == [w.value_hex for w in worst]
    assert hexadecimal[1::2] == [w.reference_hex for w in worst]
    decimal = visited.texts("#detail td.mono:nth-child(3)")[::2]
    assert [float(text) for text in decimal[: len(EXACT)]] == list(EXACT)


def test_the_details_show_how_many_elements_are_off_by_how_much(
    opened: Callable[..., Opened],
) -> None:
    case = scenarios()[0].cases[0]
    counts = tuple({3: 100, 7: 6_000_000, 14: 1, 21: 2}.get(i, 0) for i in range(22))
    quantities = {"y": judged("fail", histogram=counts), "batch_mean": judged()}
    made = report(facts(case), result(case, status="fail", quantities=quantities))
    visited = opened(html(made))
    visited.page.locator("#table tbody button").click()
    figures = visited.page.locator("#detail figure svg")
    assert figures.count() == 1
    assert figures.first.get_attribute("aria-label") == "6000103 elements of y by ×bound"
    bars = figures.first.locator("g[aria-label=rect] rect")
    assert bars.count() == 4
    assert sum("fail" in (bars.nth(i).get_attribute("fill") or "") for i in range(4)) == 2


def test_numbers_are_written_as_on_the_terminal(opened: Callable[..., Opened]) -> None:
    case = scenarios()[0].cases[0]
    random = Random(0)
    ratios = [10.0 ** random.uniform(-12, 12) for _ in range(95)] + [0.0, 1.0, 999.6, 1e-3, 9.96e-4]
    made = report(
        facts(case),
        *(
            result(case, f"b{i:02}.py:f@cpu", quantities={"y": judged(bound_ratio=ratio)})
            for i, ratio in enumerate(ratios)
        ),
    )
    visited = opened(html(made))
    visited.page.locator("#table th.backend button").click()
    assert visited.texts("#table td.bound") == [number(ratio, 2) for ratio in ratios]


def test_details_lead_to_the_same_case_elsewhere(opened: Callable[..., Opened]) -> None:
    visited = opened()
    visited.page.locator(".finding").first.get_by_role("button", name="Details").click()
    visited.page.locator("#detail").get_by_role("button", name="(welford@cpu)").click()
    assert visited.texts("#detail h2") == ["(pass) welford@cpu"]
    assert "value=3.3,memory_format=channels_last" in visited.texts("#detail")[0]
    visited.page.get_by_role("button", name="Close").click()
    assert not visited.page.locator("#detail").is_visible()


def test_plots_have_a_dot_for_each_result_and_the_bound_where_it_is(
    opened: Callable[..., Opened],
) -> None:
    first, second = scenarios(OFFSET)[0].cases
    made = report(
        facts(first, 10.0),
        result(first, quantities={"y": judged(max_abs_error=1e-3, bound_ratio=1.0)}),
        facts(second, 1e6),
        result(second, quantities={"y": judged(max_abs_error=1e-1, bound_ratio=1e-1, floor=1e-3)}),
    )
    visited = opened(html(made))
    dots = "#by-condition [aria-label=dot] path, #by-condition [aria-label=dot] circle"
    assert visited.page.locator(dots).count() == 2

    def middles(selector: str) -> list[float]:
        boxes = [found.bounding_box() for found in visited.page.locator(selector).all()]
        return sorted(box["y"] + box["height"] / 2 for box in boxes)

    low, high = middles(dots)[::-1]
    decade = (low - high) / 2
    bounds, floors = middles("#by-condition .bound path"), middles("#by-condition .floor path")
    assert bounds == pytest.approx([high - decade, low], abs=1)
    assert floors == pytest.approx([low], abs=1)
    visited.page.select_option("#measure", "bound_ratio")
    [line] = middles("#by-condition .bound line")
    assert min(middles(dots)) == pytest.approx(line, abs=1)


def test_zero_and_infinity_have_their_places_in_a_plot(opened: Callable[..., Opened]) -> None:
    case = scenarios()[0].cases[0]
    made = report(
        facts(case, math.inf),
        result(case, quantities={"y": judged(max_abs_error=0.0, bound_ratio=0.0)}),
        result(case, "welford@cpu", "fail", quantities={"y": wrong(1.0, nonfinite=3)}),
    )
    visited = opened(html(made))
    labels = visited.page.locator("#by-condition svg text").all_text_contents()
    assert labels.count("∞") == 2
    assert "0" in labels


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_theme_is_the_systems_until_it_is_switched(
    opened: Callable[..., Opened], scheme: str
) -> None:
    visited = opened(color_scheme=scheme)

    def is_dark() -> bool:
        color = visited.page.evaluate("getComputedStyle(document.body).backgroundColor")
        return max(map(int, re.findall(r"\d+", color)[:3])) < 64

    assert is_dark() == (scheme == "dark")
    visited.page.locator("#theme").click()
    assert is_dark() == (scheme == "light")
    visited.page.locator("#theme").click()
    assert is_dark() == (scheme == "dark")


def test_nothing_is_wider_than_the_screen(opened: Callable[..., Opened]) -> None:
    visited = opened(hostile(), width=375)
    visited.page.locator("#table tbody button").first.click()
    for width in (375, 1280, 1920):
        visited.page.set_viewport_size({"width": width, "height": 800})
        for part in ("html", "#detail"):
            assert visited.page.evaluate(f"document.querySelector('{part}').scrollWidth") <= width


def test_without_scripts_there_are_the_findings_and_no_dead_controls(
    opened: Callable[..., Opened],
) -> None:
    visited = opened(java_script_enabled=False)
    assert visited.page.locator(".finding").first.is_visible()
    assert "need scripts" in " ".join(visited.texts("main"))
    for selector in ("#filters", "#map", "#plots", "#results", "#theme"):
        assert not visited.page.locator(selector).is_visible()


def test_a_long_list_is_shown_in_parts(opened: Callable[..., Opened]) -> None:
    case = scenarios()[0].cases[0]
    made = report(facts(case), *(result(case, f"b{i}.py:f@cpu") for i in range(130)))
    visited = opened(html(made))
    assert visited.page.locator("#table tbody tr").count() == 100
    visited.page.locator("#more").click()
    assert visited.page.locator("#table tbody tr").count() == 130
    assert not visited.page.locator("#more").is_visible()
