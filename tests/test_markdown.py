"""Markdown and annotations: the verdict first, nothing that a text can break, and never too long."""

from __future__ import annotations

import re

import pytest
from dangerous import TEXTS, hostile
from markdown_it import MarkdownIt
from markdown_it.token import Token
from standins import facts, report, result, scenarios

from bnaudit.render.markdown import ANNOTATIONS, markdown, workflow_commands
from bnaudit.report import Report, SourcePlace

PARSER = MarkdownIt("commonmark").enable("table")
TAGS = re.compile(r"</?(details|summary)>")


def tokens(made: Report) -> list[Token]:
    return PARSER.parse(markdown(made))


def markup(made: Report) -> list[str]:
    """All tokens that are not text, in order: what a text of others must not change."""
    found = []
    for token in tokens(made):
        found.append(token.type)
        found += [child.type for child in token.children or [] if child.type != "text"]
    return found


def test_the_verdict_stands_first_and_green_things_are_folded() -> None:
    text = markdown(report())
    assert text.startswith("## bnaudit: FAIL (exit 1)\n\n20 of 26 ran: ")
    before, _, folded = text.partition("<details>")
    assert "0.467 σ" in before
    assert "caffe-2016" not in before
    assert "caffe-2016" in folded
    assert text.count("<details>") == text.count("</details>")


def test_tables_have_a_cell_for_every_column() -> None:
    found = tokens(report())
    rows: list[int] = []
    sizes = set()
    for token in found:
        if token.type == "tr_open":
            rows.append(0)
        elif token.type in ("th_open", "td_open"):
            rows[-1] += 1
        elif token.type == "table_close":
            sizes.add(len(set(rows)))
            rows = []
    assert sizes == {1}


def test_only_its_own_tags_are_html() -> None:
    html = [token.content for token in tokens(report()) if token.type == "html_block"]
    assert html
    for block in html:
        assert "<" not in TAGS.sub("", block)


@pytest.mark.parametrize("text", [text for text in TEXTS if text])
def test_hostile_text_is_no_markup(text: str) -> None:
    # Lists of what died hold fences as well, of which a text must not make more or fewer.
    assert markup(hostile(text)) == markup(hostile("plain"))
    for token in tokens(hostile(text)):
        if token.type == "html_block":
            assert "<" not in TAGS.sub("", token.content)


def test_what_is_accepted_is_folded_with_the_reason() -> None:
    case = scenarios()[0].cases[0]
    made = report(facts(case), result(case, status="fail"), verdict="warn", exit_code=0)
    known = made.results[0].model_copy(update={"accepted": "since 2016"})
    before, _, folded = markdown(made.model_copy(update={"results": [known]})).partition(
        "<details>"
    )
    assert "constant-channel" not in before
    assert "| since 2016 |" in folded


@pytest.mark.parametrize("most", [400, 1000, 1700])
def test_it_has_no_more_bytes_than_there_is_room_for(most: int) -> None:
    whole = markdown(report())
    text = markdown(report(), most_bytes=most)
    assert len(text.encode()) <= most < len(whole.encode())
    assert text.startswith("## bnaudit: FAIL (exit 1)")
    assert "left out" in text
    assert text.count("<details>") == text.count("</details>")


def test_a_text_that_fits_is_whole() -> None:
    whole = markdown(report())
    assert markdown(report(), most_bytes=len(whole.encode()) + 100) == whole


# --- annotations -----------------------------------------------------------------------------------


def test_a_finding_is_an_annotation_at_its_place() -> None:
    made = report().model_copy(
        update={"places": {"torch@cpu": SourcePlace(file="a,b:c.py", line=7)}}
    )
    (line,) = workflow_commands(made)
    assert line.startswith(
        "::error file=a%2Cb%3Ac.py,line=7,title=fail torch@cpu constant-channel::value=3.3 "
    )
    assert "%0Ay[0,17,0,0] = -0.467" in line


def test_there_are_no_more_annotations_than_are_shown() -> None:
    (scenario,) = scenarios()[:1]
    names = [f"torch-{i}@cpu" for i in range(20)]
    case = scenario.cases[0]
    made = report(facts(case), *(result(case, name, "fail") for name in names))
    assert len(workflow_commands(made)) == ANNOTATIONS


def test_what_does_not_fail_is_no_annotation() -> None:
    case = scenarios()[0].cases[0]
    made = report(facts(case), result(case, "exact@cpu", "fail"), result(case, status="fail"))
    known = [r.model_copy(update={"accepted": "known"}) for r in made.results]
    assert len(workflow_commands(made)) == 1
    assert workflow_commands(made.model_copy(update={"results": known})) == []


@pytest.mark.parametrize("text", TEXTS)
def test_hostile_text_is_no_second_command(text: str) -> None:
    lines = "\n".join(workflow_commands(hostile(text))).splitlines()
    assert len(lines) == 3
    assert all(line.startswith("::error file=") for line in lines)
