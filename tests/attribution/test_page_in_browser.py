"""The lineage page in a real browser: it proves itself, says plainly when a byte was changed, folds, and finds."""

import hashlib
import http.server
import json
import re
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from attribution.pages.show import LineagePages
from attribution.trail import Trail
from tests.attribution.records_example import PEOPLE, ExampleLog, answer, build_example_log, digest_of, explain
from tests.browser import Browser, needs_browser

pytestmark = needs_browser
INSECURE_HOST = "trail.test"  # not localhost: a browser offers no crypto.subtle on plain http elsewhere
DECIDED = "document.body.dataset.proof"


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> ExampleLog:
    folder = tmp_path_factory.mktemp("example")
    example = build_example_log(Trail.open(folder / "home"), folder / "scratch")
    answer(example, {"Which lamp burns at Vellmoor?": "A green one."})
    explain(example, example.receipt_ids[0], {"Mira, lighthouses": (0.71, 0.56, 0.83)})
    return example


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser(flags=(f"--host-resolver-rules=MAP {INSECURE_HOST} 127.0.0.1",)) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(log: ExampleLog) -> str:
    return LineagePages(log.trail).page(log.adapter.leaf_hash)


@pytest.fixture
def show(browser: Browser, tmp_path: Path) -> Callable[[str], str]:
    """Open the page's text from disk, wait for its verdict and return it."""

    def opened(text: str) -> str:
        file = tmp_path / "lineage.html"
        file.write_text(text, encoding="utf-8")
        browser.open(file.as_uri())
        browser.wait(DECIDED)
        return str(browser.evaluate(DECIDED))

    return opened


def test_the_page_proves_every_record_it_shows(browser: Browser, show: Callable[[str], str], page: str) -> None:
    assert show(page) == "good"
    num_records = 2 * len(PEOPLE) + 7
    assert browser.evaluate("document.getElementById('proof').textContent") == f"✓ Verified: {num_records} records"
    browser.click("document.getElementById('proof')")
    text = browser.evaluate("document.getElementById('panel').innerText")
    assert "This page is proven" in text and "WebCrypto" in text
    assert f"{num_records} records: in the log, unaltered, signed, and shown as they are" in text


def test_hashes_equal_the_standard_librarys(browser: Browser, show: Callable[[str], str], page: str) -> None:
    show(page)
    for length in (0, 1, 55, 56, 63, 64, 111, 112, 119, 127, 128, 500):
        for name in ("sha256", "sha512"):
            found = browser.evaluate(f"hexOf({name}(Uint8Array.from({{length: {length}}}, (_, i) => i * 7 & 255)))")
            assert found == hashlib.new(name, bytes(i * 7 & 255 for i in range(length))).hexdigest()


def flip(text: str, pattern: str) -> str:
    """The text with one character of the pattern's group changed to another of its kind."""
    match = re.search(pattern, text)
    assert match is not None, pattern
    at = match.start(1)
    other = "1" if text[at] != "1" else "2"
    return f"{text[:at]}{other}{text[at + 1 :]}"


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (r'"final_loss_micro":(\d)', "what is shown is not what the record says"),
        (r'"salt":"([0-9a-f])', "record or salt is not the one that the leaf commits to"),
        (r'"commitment":"([0-9a-f])', "the leaf was altered"),
        (r'"path":\["[A-Za-z0-9+/]{9}(\w)', "the path does not lead to the signed root"),
        (r'"label":"Mira, lighthous(e)', "the name shown is not the record's"),
        (r'"payload":"[A-Za-z0-9+/]{400}(\w)', "record or salt is not the one that the leaf commits to"),
        (r'"log":"trailmark.local/[0-9a-f]{16}\+([0-9a-f])', "the log's key does not match its own hash"),
        (r'"checkpoint":"[^\\]*\\n\d+\\n[A-Za-z0-9+/]{5}(\w)', "the log did not sign this checkpoint"),
    ],
    ids=["fact", "salt", "leaf", "path", "name", "record", "key", "checkpoint"],
)
def test_a_changed_byte_is_a_red_failure(
    browser: Browser, show: Callable[[str], str], page: str, pattern: str, reason: str
) -> None:
    assert show(flip(page, pattern)) == "bad"
    alarm = browser.evaluate("document.getElementById('alarm').innerText")
    assert alarm.startswith("Do not rely on this page: ") and reason in alarm.lower()
    assert browser.evaluate("getComputedStyle(document.getElementById('alarm')).backgroundColor") in (
        "rgb(198, 42, 47)",
        "rgb(255, 99, 105)",
    )
    assert browser.evaluate("document.getElementById('proof').textContent") == "✕ Verification failed"


def test_a_changed_script_does_not_run_and_the_page_says_so(browser: Browser, page: str, tmp_path: Path) -> None:
    file = tmp_path / "lineage.html"
    file.write_text(
        page.replace("result.ok = !result.problem", "result.ok = true || !result.problem"), encoding="utf-8"
    )
    browser.open(file.as_uri())
    assert (
        browser.evaluate("document.getElementById('proof').textContent")
        == "Not verified: this page's script did not run"
    )
    assert browser.evaluate(DECIDED) is None


def test_a_key_from_elsewhere_decides(
    browser: Browser, show: Callable[[str], str], page: str, log: ExampleLog, tmp_path: Path
) -> None:
    assert show(page) == "good"
    stranger = Trail.open(tmp_path / "stranger").home / "trust.json"
    for file, verdict in ((stranger, "bad"), (log.trail.home / "trust.json", "good")):
        browser.click("document.getElementById('proof')")
        text = json.dumps(file.read_text())
        browser.evaluate(f"document.querySelector('#panel textarea').value = {text}")
        browser.click("document.querySelector('#panel .act')")
        browser.wait(f"{DECIDED} === '{verdict}'")


def test_without_webcrypto_the_page_checks_signatures_itself(browser: Browser, page: str, tmp_path: Path) -> None:
    (tmp_path / "good.html").write_text(page, encoding="utf-8")
    wrong = flip(page, r'"checkpoint":"[^"]*\\n\\n[^"]{30,80} [A-Za-z0-9+/]{20}(\w)')
    (tmp_path / "bad.html").write_text(wrong, encoding="utf-8")
    handler = partial(QuietHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        for name, verdict in (("good", "good"), ("bad", "bad")):
            browser.open(f"http://{INSECURE_HOST}:{server.server_port}/{name}.html")
            browser.wait(DECIDED)
            assert browser.evaluate("[isSecureContext, 'subtle' in crypto]") == [False, False]
            assert browser.evaluate(DECIDED) == verdict
        server.shutdown()
        thread.join()
    assert "log did not sign this checkpoint" in browser.evaluate("document.getElementById('alarm').innerText")
    assert "own code" in browser.evaluate("checker.name")


def test_what_a_record_came_from_folds_away_and_a_search_brings_it_back(
    browser: Browser, show: Callable[[str], str], page: str, log: ExampleLog
) -> None:
    show(page)
    cards = "document.querySelectorAll('.node').length"
    num_cards = browser.evaluate(cards)
    label = "Unfold what this was made from"
    key = f"before:{log.refinement.leaf_hash}"
    browser.evaluate(f"setFolded({json.dumps(key)}, true)")
    assert browser.evaluate(cards) == num_cards - 2 * len(PEOPLE)
    browser.click(f"document.querySelector('[aria-label=\"{label}\"]')")
    assert browser.evaluate(cards) == num_cards
    browser.evaluate(f"setFolded({json.dumps(key)}, true)")
    browser.evaluate(
        "(() => { const query = document.getElementById('query'); query.value = 'lighthouses mira';"
        " query.dispatchEvent(new Event('input')); })()"
    )
    assert browser.evaluate("document.getElementById('found').textContent") == "1 found"
    browser.evaluate("document.getElementById('query').dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter'}))")
    assert browser.evaluate(cards) == num_cards
    assert browser.evaluate("document.querySelector('#panel h2').textContent") == "Mira, lighthouses"


def test_a_click_shows_the_record_behind_a_card(
    browser: Browser, show: Callable[[str], str], page: str, log: ExampleLog
) -> None:
    show(page)
    browser.click("document.querySelector('[aria-label=\"Adapter facts\"]')")
    text = browser.evaluate("document.getElementById('panel').innerText")
    assert log.adapter.leaf_hash in text and "operator of this log" in text
    assert f"adapter facts {digest_of(log.adapter)[7:19]}" in text and "Inclusion in the log" in text
    browser.click("[...document.querySelectorAll('.node')].find((card) => card.ariaLabel.startsWith('Influence'))")
    assert "71.0% (56.0% to 83.0%)" in browser.evaluate("document.getElementById('panel').innerText")


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files without a line on stderr for each."""

    def log_message(self, format: str, *args: object) -> None:
        pass
