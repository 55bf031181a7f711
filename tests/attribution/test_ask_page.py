"""The pages of the five questions: whole without a network, names stay text, plots say what the numbers say."""

import re
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from attribution.answers import Answer, Finding
from attribution.pages.ask import answer_html, answer_view
from attribution.pages.plots import WIDTH, BarRow, Part, bars, flow, scatter, waterfall
from attribution.pages.site import QUESTIONS, Site
from attribution.questions import ask_adapter, ask_dataset, ask_improved, ask_value, ask_who
from attribution.settled_evidence import coalition_points
from attribution.settlement import settlements
from attribution.statement_make import make_statement
from attribution.trail import Trail
from configs.schema import CreditSettings
from pipelines.statement import find_copies
from tests.attribution.credit_world import PERIOD, VALUES, CreditWorld, build_world
from tests.attribution.records_example import ExampleLog, answer, build_example_log, explain, settle
from tests.attribution.test_questions import attribution, told
from tests.browser import Browser, needs_browser

__all__ = ["told"]
HOSTILE = "</script><script>alert('x')</script>"


class Tags(HTMLParser):
    """The tags of a page, and whatever it would load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.loads: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append(tag)
        self.loads += [str(value) for name, value in attrs if name in ("src", "srcset", "data", "xlink:href")]
        self.loads += [str(value) for name, value in attrs if tag == "link" and name == "href"]


@pytest.fixture(scope="module")
def credit(tmp_path_factory: pytest.TempPathFactory) -> CreditWorld:
    """A home with a settlement whose coalitions add up exactly, and a statement."""
    world = build_world(tmp_path_factory.mktemp("credit"))
    names, worth = list(VALUES), {name: value for name, (value, _, _) in VALUES.items()}
    coalitions = [f"{number:03b}" for number in range(8)]
    utilities = [[-3 + sum(worth[n] for n, bit in zip(names, bits, strict=True) if bit == "1")] for bits in coalitions]
    table = pyarrow.table({"coalition": coalitions, "seconds": [2.0] * 8, "utilities": utilities})
    plan = {"players": [{"id": world.keys[name]} for name in names]}
    changes = {"table": world.trail.put_table(table), "plan": world.trail.put_json(plan), "num_coalitions": 8}
    world.settlement = world.settle(VALUES, **changes)
    find = partial(find_copies, world.trail)
    make_statement(world.trail, world.fees(), PERIOD, settings=CreditSettings(), find_copies=find)
    return world


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> ExampleLog:
    folder = tmp_path_factory.mktemp("example")
    example = build_example_log(Trail.open(folder / "home"), folder / "scratch")
    answer(example, {"Which lamp burns at Vellmoor?": "A green one."})
    answer(example, {"And at Tolm?": "None."}, adapter=False)
    explain(example, example.receipt_ids[0], {HOSTILE: (0.71, 0.56, 0.83)})
    settle(example, {HOSTILE: (0.4, 0.3, 0.5)})
    return example


@pytest.fixture(scope="module")
def client(log: ExampleLog) -> TestClient:
    app = Starlette(routes=[Mount("/trailmark", Site(lambda: log.trail).app())])
    return TestClient(app, base_url="http://127.0.0.1")


def test_a_page_loads_and_runs_nothing(trail: Trail, told: dict[str, str]) -> None:
    who = ask_who(trail, "rcpt_1", explain=lambda _: attribution())
    for found in (who, *(ask(trail) for ask in (ask_improved, ask_dataset, ask_adapter, ask_value))):
        page = answer_html(found)
        tags = Tags(page)
        assert "script" not in tags.found and tags.loads == []
        assert found.question in page and found.summary.split(":")[0] in page
        for missing in found.missing:
            assert missing.remedy.split(",")[0] in page
        for record in found.records:
            assert f"trailmark log proof {record.leaf_hash[:16]}" in page


def test_names_that_people_chose_stay_text(trail: Trail) -> None:
    finding = Finding(HOSTILE, HOSTILE, 0.5, 0.1, 0.9, "of 1", HOSTILE, ())
    part = {**attribution()["contributors"][0], "name": HOSTILE}
    details = attribution(contributors=[part])
    verbatim = {"text": HOSTILE, "spans": [], "covered": 0.0, "method": HOSTILE}
    found = Answer(HOSTILE, HOSTILE, (finding,), (), HOSTILE, 0.9, 0, {**details, "verbatim": verbatim})
    page = answer_html(found)
    assert "script" not in Tags(page).found and "&lt;script&gt;" in page


def test_the_settled_value_page_has_fees_bars_and_coalitions(credit: CreditWorld) -> None:
    found = ask_value(credit.trail)
    figures = {item["title"].split(":")[0]: item for item in answer_view(found)["figures"]}
    assert "Where the fees went" in figures and "Coalitions of facts on harbour" in figures
    assert {finding.tier for finding in found.findings} == {"settle", "counted"}
    assert not any("statement" in missing.evidence for missing in found.missing)
    page = answer_html(found)
    assert page.count("<circle") == 8 and 'class="flow"' in page and "mira" in page
    paid = {f.subject: f.value for f in found.findings if f.measure.startswith("fees") and f.kind == "contributor"}
    assert paid["mira"] > 0 and paid.get("thief", 0) == 0
    assert found.cost[1].amount == 16.0 and found.cost[1].unit == "seconds"
    assert found.summary.startswith("measured by retraining, helped: noor, ")


def test_coalitions_that_add_up_lie_on_the_line(credit: CreditWorld) -> None:
    points = coalition_points(credit.trail, settlements(credit.trail)[-1])
    assert len(points) == 8 and all(point.predicted == pytest.approx(point.measured) for point in points)
    assert sorted(point.size for point in points) == [0, 1, 1, 1, 2, 2, 2, 3]
    gone = replace(settlements(credit.trail)[-1], plan="sha256:" + "0" * 64)
    assert coalition_points(credit.trail, gone) == []


def test_which_dataset_is_answered_by_what_was_settled(credit: CreditWorld) -> None:
    found = ask_dataset(credit.trail)
    settled = [finding for finding in found.findings if finding.tier == "settle"]
    assert {finding.subject: finding.p_value for finding in settled} == dict.fromkeys(VALUES, 0.01)
    assert settled[0].unit == "nats per token" and settled[0].links == (credit.settlement.leaf_hash,)
    (whole,) = (one for one in ask_adapter(credit.trail).findings if one.tier == "settle" and one.kind == "adapter")
    # The interval is of the recorded cells, which the world made equal for all items (.4 + .9 + .4).
    assert (whole.low, whole.high, whole.confidence) == (pytest.approx(1.7), pytest.approx(1.7), 0.9)


@pytest.mark.parametrize("name", list(QUESTIONS))
def test_the_site_answers_each_question(client: TestClient, log: ExampleLog, name: str) -> None:
    query = {"receipt": log.receipt_ids[0]} if name == "who" else {}
    response = client.get(f"/trailmark/ask/{name}", params=query)
    assert response.status_code == 200, response.text
    assert QUESTIONS[name] in response.text and "script" not in Tags(response.text).found
    assert response.headers["content-security-policy"].startswith("default-src 'none'; ")
    assert re.search(r'href="/trailmark/record/[0-9a-f]{64}"', response.text)
    if name == "who":
        assert "71.0%" in response.text


def test_the_site_lists_rows_by_their_ids(client: TestClient, log: ExampleLog) -> None:
    page = client.get("/trailmark/ask/who", params={"receipt": log.receipt_ids[0], "examples": "20"}).text
    assert f"<code>{log.keys[HOSTILE].key_id[:8]}-0</code>" in page and 'name="examples" value="20"' in page
    for wrong in ("0", "101", "x", "-1", "1.5", "²"):
        refused = client.get("/trailmark/ask/who", params={"receipt": log.receipt_ids[0], "examples": wrong})
        assert refused.status_code == 404 and "whole number from 1 to 100" in refused.text


def test_the_site_says_what_it_cannot_answer(client: TestClient, log: ExampleLog) -> None:
    unasked = client.get("/trailmark/ask/who")
    assert unasked.status_code == 200 and log.receipt_ids[0] in unasked.text
    base = client.get("/trailmark/ask/who", params={"receipt": log.receipt_ids[1]}).text
    assert "The base model made it" in base
    for path in ("/trailmark/ask/why", "/trailmark/ask/who?receipt=rcpt_nothing", "/trailmark/ask/adapter?adapter=no"):
        refused = client.get(path)
        assert refused.status_code == 404 and "script" not in Tags(refused.text).found


def edges(row: dict[str, Any]) -> tuple[float, float]:
    found = re.search(r'<rect class="[a-z]+" x="([\d.-]+)" y="5" width="([\d.]+)"', row["svg"])
    assert found is not None
    return float(found[1]), float(found[1]) + float(found[2])


def test_bars_share_one_scale_with_zero_in_it() -> None:
    rows = bars([BarRow("a", 2.0, 1.0, 3.0, "good", ""), BarRow("b", -1.0, None, None, "bad", "")])
    (zero,) = {float(re.search(r'class="zero" d="M([\d.]+)', row["svg"])[1]) for row in rows}  # type: ignore[index]
    (a_left, a_right), (b_left, b_right) = map(edges, rows)
    assert a_left == zero == b_right and (a_right - zero) == pytest.approx(2 * (zero - b_left), abs=0.3)
    assert "whisker" in rows[0]["svg"] and "whisker" not in rows[1]["svg"] and a_right < WIDTH
    assert edges(bars([BarRow("none", 0.0, None, None, "soft", "")])[0])[1] <= WIDTH


def test_a_waterfall_ends_at_the_sum() -> None:
    rows = waterfall([BarRow("a", 2.0, None, None, "good", ""), BarRow("b", -0.5, None, None, "bad", "")], "all")
    first, second, total = map(edges, rows)
    assert first[1] == second[1] and second[0] == total[1] and first[0] == total[0]
    assert rows[-1]["note"] == "+1.50"


def test_flow_and_scatter_keep_proportions() -> None:
    drawn = flow([Part("data", 60, "data", (("mira", 40),)), Part("base", 40, "base")], unit="cents")
    heights = [float(height) for height in re.findall(r'width="12" height="([\d.]+)"', drawn)]
    assert heights == pytest.approx([320, 192, 128, 128], abs=0.1) and "fees 100 cents" in drawn
    assert flow([Part("data", 0, "data")], unit="cents") == ""
    points = [{"size": 1, "players": 2, "predicted": value, "measured": value} for value in (0.0, 1.0)]
    found = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', scatter(points))
    assert all(float(x) + float(y) == pytest.approx(340) for x, y in found)


def test_numbers_are_said_in_their_unit() -> None:
    def text(value: float, unit: str, tier: Any) -> str:
        return Finding("s", "m", value, None, None, unit, "", (), tier=tier).value_text

    assert [text(0.5, "of 1", "explain"), text(0.5, "of 1", "measured")] == ["50.0%", "+0.500"]
    assert [text(1234, "rows", "counted"), text(-0.25, "nats", "audit")] == ["1,234 rows", "-0.250 nats"]
    assert text(0.0069, "probability per token", "settle") == "+0.0069 probability per token"


@needs_browser
def test_pages_fit_a_telephone(credit: CreditWorld, trail: Trail, told: dict[str, str], tmp_path: Path) -> None:
    who = ask_who(trail, "rcpt_1", explain=lambda _: attribution())
    pages = (who, ask_value(credit.trail), ask_improved(credit.trail), ask_dataset(trail), ask_adapter(trail))
    with Browser(width=375, height=800) as browser:
        for number, found in enumerate(pages):
            file = tmp_path / f"{number}.html"
            file.write_text(answer_html(found), encoding="utf-8")
            browser.open(file.as_uri())
            assert browser.evaluate("document.documentElement.scrollWidth") <= 375, found.question
