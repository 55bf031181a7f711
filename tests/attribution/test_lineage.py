"""The graph of parents: ancestors, descendants, paths, and the JSON that the pages draw."""

import pytest

from attribution.bodies import ApprovalBody
from attribution.lineage import Lineage
from attribution.trail import Entry, Trail, TrailError
from tests.attribution.story import tell


def hashes(entries: list[Entry]) -> list[str]:
    return [entry.leaf_hash for entry in entries]


def test_ancestors_and_descendants(trail: Trail) -> None:
    story, lineage = tell(trail), Lineage(trail)
    before = [story.base, *(entry for pair in zip(story.contributors, story.datasets, strict=True) for entry in pair)]
    assert lineage.ancestors(story.adapter.leaf_hash) == [*before, story.refinement]
    assert lineage.ancestors(story.base.leaf_hash) == []
    after = [story.refinement, story.adapter, story.publication, story.completions]
    assert lineage.descendants(story.datasets[1].leaf_hash) == after
    assert lineage.descendants(story.completions.leaf_hash) == []
    assert lineage.contributor_names() == {
        entry.record.body.key_id: entry.record.body.name  # type: ignore[union-attr]
        for entry in story.contributors
    }


def test_path(trail: Trail) -> None:
    story, lineage = tell(trail), Lineage(trail)
    chain = [story.contributors[0], story.datasets[0], story.refinement, story.adapter, story.publication]
    assert lineage.path(chain[0].leaf_hash, chain[-1].leaf_hash) == chain
    assert lineage.path(chain[-1].leaf_hash, chain[0].leaf_hash) == []
    assert lineage.path(chain[0].leaf_hash, chain[0].leaf_hash) == [chain[0]]
    assert hashes(lineage.path(story.base.leaf_hash, story.completions.leaf_hash)) == [
        story.base.leaf_hash,
        story.completions.leaf_hash,
    ]


def test_graph(trail: Trail) -> None:
    story, lineage = tell(trail), Lineage(trail)
    graph = lineage.graph(story.adapter.leaf_hash)
    assert [node["id"] for node in graph["nodes"]] == hashes(list(trail.entries()))
    assert {(edge["from"], edge["to"]) for edge in graph["edges"]} == {
        (parent, entry.leaf_hash) for entry in trail.entries() for parent in entry.leaf.parents
    }
    node = next(node for node in graph["nodes"] if node["kind"] == "publication")
    assert node["label"] == "support@1"
    dataset = next(node for node in graph["nodes"] if node["kind"] == "dataset")
    assert dataset["facts"]["num_rows"] == 4
    assert dataset["contributors"] == [story.contributors[0].record.body.key_id]  # type: ignore[union-attr]
    near = lineage.graph(story.adapter.leaf_hash, depth=1)
    kinds = {node["kind"] for node in near["nodes"]}
    assert kinds == {"base_model", "refinement", "adapter", "publication", "completions"}
    assert lineage.graph(story.adapter.leaf_hash, depth=0)["edges"] == []


def test_it_grows_with_the_log_and_survives_erasure(trail: Trail) -> None:
    story, lineage = tell(trail), Lineage(trail)
    assert lineage.descendants(story.publication.leaf_hash) == []
    digest = "sha256:" + "ab" * 32
    later = trail.record("approval", ApprovalBody(digest, "approved", ""), parents=[story.publication.leaf_hash])
    assert lineage.descendants(story.publication.leaf_hash) == [later]
    assert trail.delete_record(story.refinement.leaf_hash)
    fresh = Lineage(Trail.open(trail.home))
    assert story.datasets[0].leaf_hash in hashes(fresh.ancestors(later.leaf_hash))
    erased = next(node for node in fresh.graph(later.leaf_hash)["nodes"] if node["kind"] == "refinement")
    assert (erased["facts"], erased["label"]) == ({"erased": True}, "refinement (erased)")


def test_an_unknown_leaf_is_named(trail: Trail) -> None:
    tell(trail)
    with pytest.raises(TrailError, match="not in the log"):
        Lineage(trail).graph("ab" * 32)
