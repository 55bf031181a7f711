"""A statement as CSV, as a page, and by the command line, as an operator and a contributor see it."""

import csv
import io
import json
import re
from dataclasses import replace
from functools import partial
from html import unescape
from pathlib import Path

import pytest
from typer.testing import CliRunner

from attribution.pages.statement import ribbons, statement_html
from attribution.statement import Statement
from attribution.statement_export import export_folder, export_text, payouts_csv
from attribution.statement_make import make_statement, read_statement
from attribution.trail import Entry
from cluster.cli import app
from configs.errors import UserError
from configs.schema import CreditSettings
from pipelines.statement import find_copies
from tests.attribution.credit_world import PERIOD, CreditWorld, build_world, measured_settlement
from tests.browser import Browser, needs_browser

HOSTILE = "</script><script>alert('x')</script>"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> CreditWorld:
    return build_world(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def entry(world: CreditWorld) -> Entry:
    rows = [(name, HOSTILE if number else "=cmd()", 1000) for number, name in enumerate(world.request_ids)]
    copies = partial(find_copies, world.trail)
    file = world.fees([*rows, ("rcpt_unknown", "team", 70)])
    return make_statement(world.trail, file, PERIOD, settings=CreditSettings(unit="cents"), find_copies=copies)


@pytest.fixture(scope="module")
def statement(world: CreditWorld, entry: Entry) -> Statement:
    return read_statement(world.trail, entry)


def test_the_csv_sums_to_the_fees_and_starts_no_formula(world: CreditWorld, entry: Entry, statement: Statement) -> None:
    rows = list(csv.DictReader(io.StringIO(export_text(world.trail, entry, "csv"))))
    assert sum(int(row["amount"]) for row in rows) == statement.totals.fees == 6000
    assert {row["source"] for row in rows} == {"platform", "base", "adapter", "data", "unattributed"}
    assert {row["unit"] for row in rows} == {"cents"}
    hostile = {statement.payouts[0].id: "=HYPERLINK(1)"}
    assert "'=HYPERLINK(1)" in payouts_csv(statement, hostile, leaf_hash="")


def test_the_page_stands_alone_and_names_stay_text(world: CreditWorld, entry: Entry, statement: Statement) -> None:
    page = export_text(world.trail, entry, "html")
    assert "<script" not in page and "alert(&#39;x&#39;)" in page
    assert not re.findall(r"""(?:src|href)\s*=|url\(|@import""", page)
    assert "default-src 'none'; style-src 'sha256-" in unescape(page)
    for text in ("Credit statement", "mira", "later copy", "comparable within one settlement only", "rcpt_unknown"):
        assert text in page
    flow = ribbons(statement)
    assert sum(part.amount for part in flow) == statement.totals.fees
    assert sum(part.share for part in flow) == pytest.approx(1)


def test_a_page_of_nothing_but_the_base_has_no_charts(statement: Statement) -> None:
    from attribution.statement import compute

    alone = compute(replace(statement, settlements=(), copies=(), clusters=(), requests=statement.requests[-2:]))
    page = statement_html(alone, {}, leaf_hash="0" * 64, index=3)
    assert "answered by the base model alone" in page and "Who made this adapter" not in page


def test_all_formats_go_to_a_folder_and_an_unknown_one_is_named(
    world: CreditWorld, entry: Entry, tmp_path: Path
) -> None:
    written = export_folder(world.trail, entry, tmp_path / "out")
    assert [path.name for path in written] == ["statement.json", "payouts.csv", "statement.html"]
    with pytest.raises(UserError, match="format 'pdf': choose one of json, csv, html, all"):
        export_text(world.trail, entry, "pdf")
    with pytest.raises(UserError, match="is a file; give a folder"):
        export_folder(world.trail, entry, written[0])


def test_the_commands_make_show_export_and_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = build_world(tmp_path / "world")
    home = world.trail.home
    measured_settlement(world)
    monkeypatch.setenv("TRAILMARK_HOME", str(home))
    monkeypatch.setenv("COLUMNS", "200")
    run = partial(CliRunner().invoke, app)
    none = run(["statement", "show"])
    assert isinstance(none.exception, UserError) and "statement make FEES" in str(none.exception)
    made = run(["statement", "make", str(world.fees()), "--from", "2026-11-18T11:06:40", "--to", "2026-11-19"])
    assert made.exit_code == 0, made.output
    assert "mira" in made.output and "later copy" in made.output and "1,588" in made.output
    out = tmp_path / "out"
    assert run(["statement", "export", "--out", str(out)]).exit_code == 0
    file = out / "statement.json"
    verified = run(["verify", "statement", str(file), "--home", str(home)])
    assert verified.exit_code == 0, verified.output
    assert "6000 in fees = 600 platform" in verified.output and "none paid before" in verified.output
    assert "3 players' values and intervals follow from the 8 recorded coalitions" in verified.output
    keys = str(home / "trust.json")
    offline = run(["verify", "statement", str(file), "--keys", keys, "--json"])
    assert json.loads(offline.output)["verified"] is True
    file.write_text(file.read_text().replace('"amount": 1588', '"amount": 1589'))
    refused = run(["verify", "statement", str(file), "--keys", keys])
    assert refused.exit_code == 1 and "payouts[2] (noor): amount is 1589, but 1588" in refused.output
    bad_time = run(["statement", "make", str(world.fees()), "--from", "yesterday", "--to", "2026-12-01"])
    assert isinstance(bad_time.exception, UserError) and "--from 'yesterday': write ISO 8601" in str(bad_time.exception)
    backwards = run(["statement", "make", str(world.fees()), "--from", "2026-12-01", "--to", "2026-11-01"])
    assert "end must lie after the start" in str(backwards.exception)
    alone = run(["verify", "statement", str(file), "--recheck", "3"])
    assert isinstance(alone.exception, UserError) and "add --home HOME" in str(alone.exception)


@needs_browser
def test_the_page_looks_like_a_statement_in_a_browser(world: CreditWorld, entry: Entry, tmp_path: Path) -> None:
    (file,) = (path for path in export_folder(world.trail, entry, tmp_path / "page") if path.suffix == ".html")
    with Browser(width=1000, height=1200) as browser:
        browser.open(file.as_uri())
        widths = browser.evaluate(
            "[...document.querySelectorAll('svg rect.data')].map(e => e.getBoundingClientRect().width)"
        )
        assert len(widths) == 3 and min(widths) > 5  # the flow's block, mira's and noor's bars
        colours = []
        for scheme in ("light", "dark"):
            browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            colours.append(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert colours[0] != colours[1]
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
        overlap = (
            "(() => { const boxes = [...document.querySelectorAll('svg text')].map(e => e.getBoundingClientRect());"
            " return boxes.some((a, i) => boxes.some((b, j) => i < j && a.left < b.right && b.left < a.right"
            " && a.top + 2 < b.bottom && b.top + 2 < a.bottom)); })()"
        )
        assert not browser.evaluate(overlap)
