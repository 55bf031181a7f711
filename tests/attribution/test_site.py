"""The pages beside MLflow: records are found by words, said in full, compared; names stay text."""

import re
from html.parser import HTMLParser
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from attribution.bodies import RedactionBody
from attribution.log.verify import Trust, verify_bytes
from attribution.pages.site import Site
from attribution.trail import Trail
from tests.attribution.records_example import (
    PEOPLE,
    ExampleLog,
    answer,
    build_example_log,
    digest_of,
    explain,
    prompt,
    settle,
)

HOSTILE = "</script><script>alert('x')</script>"


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> ExampleLog:
    folder = tmp_path_factory.mktemp("example")
    example = build_example_log(Trail.open(folder / "home"), folder / "scratch")
    answer(example, {"Which lamp burns at Vellmoor?": "A green one."})
    explain(example, example.receipt_ids[0], {"Mira, lighthouses": (0.71, 0.56, 0.83)})
    return example


@pytest.fixture(scope="module")
def client(log: ExampleLog) -> TestClient:
    app = Starlette(routes=[Mount("/trailmark", Site(lambda: log.trail).app())])
    return TestClient(app, base_url="http://127.0.0.1")


def text_of(client: TestClient, path: str, *, status: int = 200, **params: str) -> str:
    response = client.get(f"/trailmark{path}", params=params or None)
    assert response.status_code == status, response.text
    return response.text


def labels(page: str) -> list[str]:
    return re.findall(r'<td><a href="/trailmark/record/[0-9a-f]{64}">([^<]*)</a>', page)


@pytest.mark.parametrize(
    ("query", "kind", "found"),
    [
        ("lighthouses", "contributor", ["Noor, lighthouses", "Mira, lighthouses"]),
        ("MIRA light", "dataset", ["mira"]),  # by the name of who gave it
        ("fictional", "", ["fictional-facts"]),
        ("rank q_proj", "adapter", ["facts"]),
        ("no-such-thing", "", []),
        ("%", "", []),
        ('"', "refinement", []),
    ],
)
def test_records_are_found_by_words(client: TestClient, query: str, kind: str, found: list[str]) -> None:
    assert labels(text_of(client, "/", q=query, kind=kind)) == found


def test_records_are_found_by_digest_and_leaf(client: TestClient, log: ExampleLog) -> None:
    for query in (log.adapter.leaf_hash, log.adapter.leaf_hash[:20], digest_of(log.adapter)):
        assert "facts" in labels(text_of(client, "/", q=query, kind="adapter"))


def test_a_long_list_goes_on(client: TestClient, log: ExampleLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attribution.pages.site.PAGE_SIZE", 10)
    seen: list[str] = []
    path: str | None = "/"
    while path is not None and len(seen) <= log.trail.log.size:
        page = text_of(client, path)
        seen += re.findall(r'/trailmark/record/([0-9a-f]{64})"', page)
        older = re.search(r'href="/trailmark(/\?[^"]*before=\d+)">Older', page)
        path = older[1].replace("&amp;", "&") if older else None
    assert seen == [leaf for _, leaf, _ in reversed(list(log.trail.leaves()))]


def test_a_record_page_says_who_what_and_where(client: TestClient, log: ExampleLog) -> None:
    page = text_of(client, f"/record/{log.refinement.leaf_hash}")
    for name in PEOPLE:
        assert (name if name != HOSTILE else "&lt;/script&gt;") in page
    assert "Same text as an earlier row" in page or "same text as an earlier row" in page
    assert f'href="/trailmark/record/{log.adapter.leaf_hash}"' in page  # led to
    assert f'src="/trailmark/record/{log.refinement.leaf_hash}/lineage.html"' in page
    assert "71.0%" in text_of(client, f"/record/{log.influences[0].leaf_hash}")
    assert "0.900" in text_of(client, f"/record/{log.benchmark.leaf_hash}")
    assert log.adapter.leaf_hash in text_of(client, "/record/facts@1")


def test_the_page_of_a_settlement_says_what_each_part_was_worth(client: TestClient, log: ExampleLog) -> None:
    entry = settle(log, {"Mira, lighthouses": (1.25, 0.75, 1.5), HOSTILE: (0.0, -0.5, 0.5)})
    page = text_of(client, f"/record/{entry.leaf_hash}")
    assert "facts settled over contributors on fictional-facts" in page
    assert "no measurable effect" in page and "comparable only within this settlement" in page
    assert HOSTILE not in page
    assert "settlement" in text_of(client, f"/record/{log.adapter.leaf_hash}")


def test_pages_run_no_script_and_names_stay_text(client: TestClient, log: ExampleLog) -> None:
    for path in ("/", f"/record/{log.contributors[HOSTILE].leaf_hash}", f"/?q={HOSTILE}"):
        response = client.get(f"/trailmark{path}")
        tags: list[str] = []
        parser = HTMLParser()
        parser.handle_starttag = lambda tag, attrs, into=tags: into.append(tag)  # type: ignore[method-assign,misc]
        parser.feed(response.text)
        assert "script" not in tags and response.headers["content-security-policy"].startswith("default-src 'none'; ")
    frame = client.get(f"/trailmark/record/{log.adapter.leaf_hash}/lineage.html")
    assert frame.headers["content-security-policy"] == "sandbox allow-scripts"


def test_the_proof_verifies(client: TestClient, log: ExampleLog) -> None:
    response = client.get(f"/trailmark/record/{log.adapter.leaf_hash}/record.json")
    verified = verify_bytes(response.content, trust=Trust.load(log.trail.home / "trust.json"))
    assert verified.kind == "adapter"


def test_what_means_nothing_is_refused_in_words(client: TestClient) -> None:
    page = text_of(client, "/record/no-such-name", status=404)
    assert "no record, name, digest, receipt or row" in page and "Search the log" in page


def test_a_new_record_is_found_and_an_erased_one_is_not(client: TestClient, log: ExampleLog) -> None:
    secret = prompt(log, "wreckers-song", "Sing.", by="Noise")
    assert labels(text_of(client, "/", q="wreckers")) == ["wreckers-song"]
    assert log.trail.delete_record(secret.leaf_hash)
    log.trail.record("redaction", RedactionBody(secret.leaf_hash, "asked for"), parents=[secret.leaf_hash])
    assert labels(text_of(client, "/", q="wreckers")) == []
    assert labels(text_of(client, "/", q=secret.leaf_hash, kind="prompt"))[0].startswith("prompt (erased on ")
    assert "This record was erased" in text_of(client, f"/record/{secret.leaf_hash}")


def test_two_versions_are_compared(client: TestClient, log: ExampleLog) -> None:
    second = publish_again(log)
    page = text_of(client, "/diff", older="facts@1", newer="facts@2")
    assert "From facts@1 to facts@2" in page and "What it did to the score" in page
    assert f"/trailmark/record/{log.adapter.leaf_hash}" in page  # both versions name the one adapter
    assert "What changed since facts@1" in text_of(client, f"/record/{second.leaf_hash}")
    assert "facts@1, facts@2" in text_of(client, "/diff")


def publish_again(log: ExampleLog) -> Any:
    from attribution.bodies import PublicationBody
    from attribution.records import Artefact

    made = Artefact("adapter", "facts", digest_of(log.adapter))
    body = PublicationBody("facts", 2, "adapter", made.digest)
    return log.trail.record("publication", body, inputs=[made], outputs=[made], time_us=log.tick())
