"""What reads the log beside its trail goes on after a key was rotated: lineage index and fsck."""

from pathlib import Path

from attribution import fsck
from attribution.key_changes import rotate
from attribution.lineage import Lineage
from attribution.lineage_index import LineageIndex
from attribution.lineage_queries import LineageQueries
from attribution.trail import Trail
from tests.attribution.story import tell


def test_lineage_and_fsck_go_on_after_every_key_was_rotated(tmp_path: Path) -> None:
    trail = Trail.open(tmp_path / "home")
    story = tell(trail)
    lineage, queries = Lineage(trail), LineageQueries.of(trail)
    before = lineage.contributor_names()
    for name in ("Amara", "operator", "log"):
        rotate(trail, name)
    names = lineage.contributor_names()
    assert before.items() <= names.items() and names[trail.keys.get("Amara").key_id] == "Amara"
    assert queries.resolve("Amara").role == "contributor"
    assert lineage.descendants(story.base.leaf_hash)
    assert LineageIndex(trail.home, trail.log.key).check() == []
    report = fsck.check(trail.home)
    assert report.is_sound and report.checked["records"] == trail.log.size
