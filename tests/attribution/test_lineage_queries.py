"""Lineage by the names that people hold: what they mean, what is found, what is refused."""

import pytest

from attribution.bodies import RedactionBody
from attribution.lineage_index import LineageIndex
from attribution.lineage_layout import LineageError, UnknownThing
from attribution.lineage_queries import Answer, LineageQueries
from attribution.trail import Trail
from tests.attribution.lineage_oracle import PlainGraph
from tests.attribution.lineage_story import Versions, digest_of, erase, tell_versions


@pytest.fixture
def story(trail: Trail) -> Versions:
    return tell_versions(trail)


@pytest.fixture
def queries(story: Versions) -> LineageQueries:
    return LineageQueries.of(story.trail)


def found(story: Versions, answer: Answer) -> set[str]:
    """Short names of the records on the page."""
    names = {entry.leaf_hash: name for name, entry in story.entries.items()}
    return {names[item.leaf_hash] for item in answer.items}


def test_a_row_leads_to_the_refinements_that_kept_it_and_no_others(story: Versions, queries: LineageQueries) -> None:
    first, later = story.rows["mira"][0], story.rows["mira"][1]
    dropped = queries.descendants(first)  # support@2 was made without it
    assert found(story, dropped) == {"refinement1", "adapter1", "publication1", "benchmark1", "both"}
    kept = queries.descendants(later)
    assert {"refinement1", "refinement2", "adapter2", "second", "influence"} <= found(story, kept)
    assert "otto-rows" not in found(story, kept)
    assert found(story, queries.ancestors(first)) == {"mira", "mira-rows"}
    otto = queries.impact(story.rows["otto"][2][7:19])
    assert found(story, otto) == {"adapter2", "both", "second"}
    assert "of otto-rows" in otto.subject.title


def test_impact_names_versions_and_the_receipts_concerned(story: Versions, queries: LineageQueries) -> None:
    answer = queries.impact("contributor:otto")
    items = {item.leaf_hash: item for item in answer.items}
    adapter, both = items[story.leaf("adapter2")], items[story.leaf("both")]
    assert (adapter.names, adapter.num_batches) == (("support@2",), 2)
    assert both.receipts == (story.receipts["both"][1],), "the others were answered by version 1 and by the base"
    assert answer.counts["completions"] == 2 and answer.counts["adapter"] == 1 and answer.counts["dataset"] == 1
    seen = queries.impact("contributor:otto", may_see=lambda tenant: tenant == "acme")
    receipts = {item.leaf_hash: item.receipts for item in seen.items}
    assert receipts[story.leaf("second")] == (story.receipts["second"][1],)
    by_base = queries.impact("tiny", kinds=["completions"])
    assert [item.receipts for item in by_base.items] == [tuple(story.receipts[name]) for name in ("second", "both")]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("support", "adapter2"),
        ("support@1", "adapter1"),
        ("adapter:support", "adapter2"),
        ("mira", "mira"),
        ("mira-rows", "mira-rows"),
        ("dataset:otto-rows", "otto-rows"),
        ("prompt:greeting", "prompt"),
        ("greeting", "prompt"),
        ("refined:facts", "refinement2"),
        ("benchmark:questions", "benchmark2"),
        ("0", "base"),
        (digest_of("refined", 1), "refinement1"),
        (digest_of("refined", 1)[:20], "refinement1"),
        (digest_of("refined", 1)[7:20], "refinement1"),
    ],
)
def test_names_that_mean_one_record(story: Versions, queries: LineageQueries, text: str, name: str) -> None:
    assert queries.resolve(text).above == (story.entries[name].index,)


def test_hashes_of_every_sort(story: Versions, queries: LineageQueries) -> None:
    trail = story.trail
    for name, entry in story.entries.items():
        for text in (entry.leaf_hash, entry.leaf_hash[:12], entry.leaf_hash[:12].upper()):
            assert queries.resolve(text).above == (entry.index,), name
        for output in entry.record.outputs if name not in story.receipts else ():
            assert queries.resolve(output.digest).above[-1] in (entry.index, trail.find(output.digest).index)
    key_id = story.entries["mira"].record.body.key_id
    assert queries.resolve(key_id).title == queries.resolve(key_id[:10]).title == "contributor mira"
    rule = queries.resolve("rule:length")
    assert rule.below == tuple(story.entries[name].index for name in ("refinement1", "refinement2"))
    assert queries.resolve(digest_of("length")).below == rule.below
    assert found(story, queries.impact("rule:length", kinds=["refinement"])) == {"refinement1", "refinement2"}
    trace = digest_of("trace", 1)
    assert queries.resolve(trace).above == (story.entries["adapter1"].index,)


def test_a_receipt_stands_on_its_own_adapter(story: Versions, queries: LineageQueries) -> None:
    of_first, of_second, of_base = story.receipts["both"]
    assert found(story, queries.ancestors(of_first)) == {"base", "mira", "mira-rows", "refinement1", "adapter1"}
    assert "otto" in found(story, queries.ancestors(of_second[:-1] + "1"))
    assert found(story, queries.ancestors(of_base)) == {"base"}
    explained = story.receipts["second"][0]
    assert found(story, queries.descendants(explained)) == {"influence"}
    assert queries.descendants(story.receipts["second"][1]).total == 0
    chain = queries.path("mira", of_first)
    assert [item.kind for item in chain.items] == ["contributor", "dataset", "refinement", "adapter"]
    with pytest.raises(UnknownThing, match="not in the log"):
        queries.resolve("rcpt_nothing")
    with pytest.raises(LineageError, match="several ids begin so"):
        queries.resolve("rcpt_both")


def test_pages_cover_everything_once(story: Versions, queries: LineageQueries) -> None:
    whole = queries.descendants("tiny")
    collected, before = [], None
    while True:
        page = queries.descendants("tiny", limit=2, before=before)
        assert page.counts == whole.counts
        collected += page.items
        before = page.before
        if before is None:
            break
    assert collected == list(whole.items)
    assert [item.index for item in collected] == sorted((item.index for item in collected), reverse=True)


def test_what_means_nothing_or_several_things_is_told(story: Versions, queries: LineageQueries) -> None:
    trail = story.trail
    for text, near in (
        ("suport@2", "support"),
        ("mirra", "mira"),
        ("contributor:mirra", "mira"),
        ("rule:lenght", "length"),
    ):
        with pytest.raises(UnknownThing, match=f"did you mean .*{near}"):
            queries.resolve(text)
    leaf = story.leaf("adapter1")
    wrong = leaf[:8] + ("0" if leaf[8] != "0" else "1") + leaf[9:]
    with pytest.raises(UnknownThing, match=leaf):
        queries.resolve(wrong)
    for text in ("999", "sha256:" + "0" * 64, "row:" + "0" * 12, "support@9", "nothing:support"):
        with pytest.raises(UnknownThing, match="no record, name, digest, receipt or row"):
            queries.resolve(text)
    trail.record("prompt", story.entries["prompt"].record.body.__class__("facts", digest_of("p")))
    with pytest.raises(LineageError, match="several things; give one of prompt:facts, refinement:facts"):
        queries.resolve("facts")
    with pytest.raises(LineageError, match="unknown; did you mean adapter"):
        queries.descendants("mira", kinds=["adaptor"])
    with pytest.raises(LineageError, match="limit 0"):
        queries.descendants("mira", limit=0)


def test_two_hashes_that_begin_alike(story: Versions, queries: LineageQueries) -> None:
    trail = story.trail
    prefixes: dict[str, str] = {}
    twins = None
    while twins is None:
        entry = trail.record("redaction", RedactionBody("ab" * 32, "x"))
        twins = prefixes.setdefault(entry.leaf_hash[:1], entry.leaf_hash)
        twins = (twins, entry.leaf_hash) if twins != entry.leaf_hash else None
    shared = next(n for n in range(64) if twins[0][n] != twins[1][n])
    if shared >= 6:
        with pytest.raises(LineageError, match="several hashes begin so"):
            queries.resolve(twins[0][:shared])
    assert queries.resolve(twins[0][: shared + 6]).above == (trail.entry_index(twins[0]),)


def test_an_erased_dataset_still_has_its_row_and_its_edges(story: Versions, queries: LineageQueries) -> None:
    trail = story.trail
    kept, dropped = story.rows["mira"][1], story.rows["mira"][0]
    before = queries.descendants(kept)
    dataset = story.entries["mira-rows"]
    trail.record("redaction", RedactionBody(dataset.leaf_hash, "asked for"), parents=[dataset.leaf_hash])
    erase(trail, dataset.leaf_hash)
    after = queries.descendants(kept)
    assert after.counts == before.counts and "an erased dataset" in after.subject.title
    assert found(story, queries.ancestors(kept)) == {"mira", "mira-rows"}
    assert queries.descendants(dropped).total > 0, "the first refined table still names it"
    assert queries.descendants(dataset.leaf_hash).counts["adapter"] == 2
    with pytest.raises(UnknownThing):
        queries.resolve("mira-rows")
    erased = next(item for item in queries.ancestors("support").items if item.leaf_hash == dataset.leaf_hash)
    assert erased.label is None
    fresh = LineageQueries(
        LineageIndex(trail.home, trail.log.key, path=trail.home / "fresh.sqlite"), open_trail=lambda: trail
    )
    assert fresh.descendants(kept).to_dict() == after.to_dict()


def test_every_answer_equals_the_plain_graph(story: Versions, queries: LineageQueries) -> None:
    plain = PlainGraph(story.trail)
    for entry in story.entries.values():
        above, below = queries.ancestors(entry.leaf_hash), queries.descendants(entry.leaf_hash)
        assert {item.leaf_hash for item in above.items} == plain.ancestors([entry.leaf_hash])
        assert {item.leaf_hash for item in below.items} == plain.descendants([entry.leaf_hash])
        assert below.total == len(plain.descendants([entry.leaf_hash]))
