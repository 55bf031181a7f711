"""The lineage page: complete, self-contained, and deaf to what people write into their names."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from attribution.lineage import Lineage
from attribution.lineage_layout import LineageError
from attribution.pages.lineage import fold_crowds, lineage_html, page_graph, script_json, with_row_counts
from attribution.pages.proofs import page_proofs
from attribution.pages.show import LineagePages, find_entry
from attribution.trail import Trail
from tests.attribution.records_example import PEOPLE, ExampleLog, build_example_log, digest_of


class Elements(HTMLParser):
    """Every start tag with its attributes, and the text of each script and style."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag if tag in ("script", "style") else ""
        if self._open:
            self.texts.append((tag, ""))

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open:
            tag, text = self.texts[-1]
            self.texts[-1] = (tag, text + data)


def graph_of(page: str) -> dict[str, Any]:
    scripts = [text for tag, text in Elements(page).texts if tag == "script"]
    return json.loads(scripts[0])


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> ExampleLog:
    folder = tmp_path_factory.mktemp("example")
    return build_example_log(Trail.open(folder / "home"), folder / "scratch")


def test_page_loads_nothing_and_allows_only_its_own_code(log: ExampleLog) -> None:
    page = LineagePages(log.trail).page(log.adapter.leaf_hash)
    elements = Elements(page)
    for tag, attributes in elements.tags:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base"}
        assert not {"src", "href", "action", "srcset"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
    code = "".join(text for _, text in elements.texts[:1] + elements.texts[2:])
    assert not re.search(r"fetch\(|XMLHttpRequest|WebSocket|EventSource|import\(|@import|url\(", code)
    assert set(re.findall(r"https?://[^\s\"'`)]+", code)) == {
        "http://www.w3.org/2000/svg"
    }  # a namespace, not an address
    policy = next(
        attributes["content"]
        for tag, attributes in elements.tags
        if tag == "meta" and "content" in attributes and "default-src" in str(attributes["content"])
    )
    assert policy is not None and "default-src 'none'" in policy and "unsafe" not in policy
    for tag, text in (elements.texts[0], elements.texts[2]):
        source = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{source}'" in policy


def test_a_script_in_a_name_stays_text(log: ExampleLog) -> None:
    hostile = next(name for name in PEOPLE if "<script>" in name)
    for entry in (log.contributors[hostile], log.adapter):
        page = LineagePages(log.trail).page(entry.leaf_hash)
        assert [tag for tag, _ in Elements(page).texts] == ["style", "script", "script"]
        assert "alert('x')</script>" not in page
        assert any(node["label"] == hostile for node in graph_of(page)["nodes"])


@pytest.mark.parametrize(
    "text", ["</script>", "<!--", "]]>", "&lt;", "\u2028\u2029", 'quote " and \\ back', "é 漢 \x00"]
)
def test_script_json_is_read_back_and_opens_no_tag(text: str) -> None:
    encoded = script_json({"value": text})
    assert json.loads(encoded) == {"value": text}
    assert not set("<>&\u2028\u2029") & set(encoded)


def test_title_is_escaped(log: ExampleLog) -> None:
    graph = page_graph(Lineage(log.trail).graph(log.adapter.leaf_hash), focus=log.adapter.leaf_hash)
    proofs = page_proofs(log.trail, graph["nodes"])
    page = lineage_html(graph, proofs, focus=log.adapter.leaf_hash, title="<img src=x onerror=alert(1)>", names={})
    assert "<img" not in page and "&lt;img" in page


def test_adapter_page_has_every_ancestor_and_consequence(log: ExampleLog) -> None:
    graph = graph_of(LineagePages(log.trail).page(log.adapter.leaf_hash))
    expected = [
        *log.contributors.values(),
        *log.datasets,
        log.refinement,
        log.base,
        log.adapter,
        log.benchmark,
        log.publication,
    ]
    assert {node["id"] for node in graph["nodes"]} == {entry.leaf_hash for entry in expected}
    edges = {(edge["from"], edge["to"]) for edge in graph["edges"]}
    for entry in expected:
        assert {(parent, entry.leaf_hash) for parent in entry.leaf.parents} <= edges
    assert graph["focus"] == log.adapter.leaf_hash
    assert set(graph["names"].values()) >= set(PEOPLE)


def test_contributors_carry_their_rows(log: ExampleLog) -> None:
    graph = graph_of(LineagePages(log.trail).page(log.refinement.leaf_hash))
    rows = {
        node["label"]: (node["facts"]["num_in"], node["facts"]["num_kept"])
        for node in graph["nodes"]
        if node["kind"] == "contributor"
    }
    assert rows == PEOPLE


def test_rows_of_two_refinements_add_up() -> None:
    def refinement(name: str, given: int, kept: int) -> dict[str, Any]:
        rows = [{"key_id": "k", "num_in": given, "num_kept": kept}]
        return {
            "id": name,
            "kind": "refinement",
            "label": name,
            "time_us": 0,
            "contributors": [],
            "facts": {"per_contributor": rows},
        }

    person = {
        "id": "p",
        "kind": "contributor",
        "label": "P",
        "time_us": 0,
        "contributors": [],
        "facts": {"key_id": "k"},
    }
    graph = with_row_counts({"nodes": [person, refinement("a", 10, 4), refinement("b", 5, 5)], "edges": []})
    assert graph["nodes"][0]["facts"] == {"key_id": "k", "num_in": 15, "num_kept": 9}
    assert person["facts"] == {"key_id": "k"}


def test_a_crowd_is_folded_and_the_focus_stays() -> None:
    nodes = [
        {
            "id": f"d{i}",
            "kind": "dataset",
            "label": f"d{i}",
            "time_us": i,
            "contributors": [],
            "facts": {"num_rows": 100 - i},
        }
        for i in range(100)
    ]
    nodes.append({"id": "r", "kind": "refinement", "label": "r", "time_us": 200, "contributors": [], "facts": {}})
    edges = [{"from": f"d{i}", "to": "r"} for i in range(100)]
    folded = fold_crowds({"nodes": nodes, "edges": edges}, focus="d99", max_cards=10)
    ids = [node["id"] for node in folded["nodes"]]
    assert len(ids) == 11 and {"d99", "d0", "r", "more-dataset"} <= set(ids)
    crowd = next(node for node in folded["nodes"] if node["id"] == "more-dataset")
    assert crowd["label"] == "91 more" and crowd["facts"]["num_records"] == 91
    assert {"from": "more-dataset", "to": "r"} in folded["edges"] and len(folded["edges"]) == 10


def test_unknown_focus_is_refused(log: ExampleLog) -> None:
    graph = LineagePages(log.trail).neighbourhood(log.adapter.leaf_hash)
    with pytest.raises(ValueError, match="focus='nothing' is not a node"):
        page_graph(graph, focus="nothing")


def test_records_are_found_by_name_version_digest_and_leaf(log: ExampleLog) -> None:
    for reference in ("facts", "facts@1", digest_of(log.adapter), log.adapter.leaf_hash, log.adapter.leaf_hash[:12]):
        assert find_entry(log.trail, reference).leaf_hash == log.adapter.leaf_hash
    assert find_entry(log.trail, "facts-refined").leaf_hash == log.refinement.leaf_hash
    for reference in ("no-such-name", f"sha256:{'0' * 64}", "0" * 64):
        with pytest.raises(LineageError):
            find_entry(log.trail, reference)


def test_command_prints_the_tree_and_writes_the_page(
    log: ExampleLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import typer
    from typer.testing import CliRunner

    from cluster.commands import views

    monkeypatch.setenv("TRAILMARK_HOME", str(log.trail.home))
    app = typer.Typer()
    views.register(app)
    page = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["lineage", "show", "facts@1", "--html", str(page)])
    assert result.exit_code == 0, result.output
    for word in ("facts-refined", "SmolLM2", "Mira, lighthouses"):
        assert word in result.output
    assert graph_of(page.read_text())["focus"] == log.adapter.leaf_hash
