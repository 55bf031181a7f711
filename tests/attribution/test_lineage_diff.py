"""What changed between two versions, and what it did to the score."""

import pytest

from attribution.key_changes import rotate
from attribution.lineage_diff import Change, diff
from attribution.lineage_layout import LineageError
from attribution.trail import Trail
from tests.attribution.lineage_story import Versions, add_version, erase, tell_versions


@pytest.fixture
def story(trail: Trail) -> Versions:
    return tell_versions(trail)


def test_two_versions_of_a_model(story: Versions) -> None:
    found = diff(story.trail, "support@1", "support@2")
    assert found == diff(story.trail, "support@2") or found.newer.reference == "support@2"
    inputs = {(item.change, item.label) for item in found.inputs if item.kind in ("dataset", "contributor")}
    assert inputs == {("added", "otto-rows"), ("added", "otto")}
    assert {(item.change, item.leaf_hash) for item in found.inputs if item.kind == "refinement"} == {
        ("added", story.leaf("refinement2")),
        ("removed", story.leaf("refinement1")),
    }
    rows = {row.contributor: (row.before, row.after, row.added, row.removed) for row in found.rows}
    assert rows == {"mira": (5, 4, 0, 1), "otto": (0, 3, 3, 0)}
    assert found.config == (Change("train.rank", "8", "16"),)
    assert Change("rank", "8", "16") in found.facts
    assert found.code == (Change("seed", "1", "2"),)
    assert [change.what for change in found.rules] == ["length"]
    assert found.packages == ()
    assert (found.older.publications, found.newer.publications) == (("support@1",), ("support@2",))


def test_the_score_comes_with_intervals(story: Versions) -> None:
    (score,) = diff(story.trail, "support@1", "support@2").scores
    assert (score.suite, score.metric, score.verdict) == ("questions", "contains", "improved")
    assert score.difference.value == pytest.approx(8 / 12)
    assert 0 < score.difference.low < score.difference.value < score.difference.high
    assert score.before.value == pytest.approx(2 / 12, abs=1e-6) and score.after.value == pytest.approx(
        10 / 12, abs=1e-6
    )
    assert score.recorded_confidence == 0.9
    assert score.links == (story.leaf("benchmark1"), story.leaf("benchmark2"))
    summary = diff(story.trail, "support@1", "support@2").summary
    assert (
        "datasets +otto-rows" in summary
        and "+2 rows" in summary
        and "contains on questions improved (+0.667)" in summary
    )


def test_a_thing_and_itself_do_not_differ(story: Versions) -> None:
    found = diff(story.trail, "support@2", story.leaf("adapter2"))
    assert not any((found.inputs, found.rows, found.rules, found.facts, found.config, found.code, found.packages))
    assert found.scores[0].verdict == "no measurable effect"
    assert found.summary.startswith("nothing recorded differs")


def test_who_rotated_a_key_between_two_versions_neither_came_nor_went(story: Versions) -> None:
    story.entries["mira"] = rotate(story.trail, "mira")  # its key is the one that rows are labelled with now
    add_version(story, 3, {"mira": story.rows["mira"][1:], "otto": story.rows["otto"][:2]}, rank=16, right=10)
    (row,) = diff(story.trail, "support@2", "support@3").rows
    assert (row.contributor, row.before, row.after, row.added, row.removed) == ("otto", 3, 2, 0, 1)


def test_what_is_gone_is_named(story: Versions) -> None:
    trail = story.trail
    for digest in (
        story.entries["refinement1"].record.body.rows,
        story.entries["adapter1"].record.config,
        story.entries["benchmark1"].record.body.details,
    ):
        trail.store.path_of(digest).unlink()
    found = diff(trail, "support@1", "support@2")
    assert {row.contributor: (row.before, row.added) for row in found.rows} == {"mira": (5, None), "otto": (0, None)}
    assert found.config == ()
    assert (found.scores[0].difference, found.scores[0].verdict) == (None, "not compared")
    missing = " ".join(found.missing)
    for text in ("rows was erased", "settings changed", "score: ", "cause: "):
        assert text in missing
    assert found.to_dict()["rows"][0]["added"] is None


def test_refinements_and_bare_names(story: Versions) -> None:
    found = diff(story.trail, story.leaf("refinement1"), story.leaf("refinement2"))
    assert [row.contributor for row in found.rows] == ["mira", "otto"]
    assert not found.scores
    bare = diff(story.trail, "support")
    assert (bare.older.leaf_hash, bare.newer.leaf_hash) == (story.leaf("adapter1"), story.leaf("adapter2"))


def test_refusals(story: Versions) -> None:
    trail = story.trail
    for older, newer, message in (
        ("support@1", None, "no earlier published version"),
        ("nothing@1", None, "no record"),
        ("suport@2", None, "support@2"),
        ("suport", None, "support"),
        ("support@1", "tiny", "two of one kind"),
        ("support@1", "rule:length", "takes two records"),
        ("support@1", story.rows["mira"][0], "takes two records"),
        ("support@1", "support@7", "no record"),
    ):
        with pytest.raises(LineageError, match=message):
            diff(trail, older, newer)
    erase(trail, story.leaf("adapter1"))
    with pytest.raises(LineageError, match="was erased"):
        diff(Trail.open(trail.home), story.leaf("adapter1"), "support@2")
