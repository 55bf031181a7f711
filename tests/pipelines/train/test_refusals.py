"""What training refuses: names that would leave the home, rows of a revoked key, features beyond float16."""

from pathlib import Path

import pytest

from attribution.key_changes import revoke
from attribution.trail import Trail
from configs.schema import TrainSettings
from pipelines.contribute import add_contributor, contribute
from pipelines.publish import PublishError
from pipelines.refine.read import DatasetError
from pipelines.train.driver import train
from pipelines.train.refined import TrainError
from pipelines.train.trace import AttemptStarted
from tests.pipelines.train.refined import add_refined


@pytest.mark.parametrize("name", ["../../x", "Facts", "a/b", ""])
def test_a_name_that_cannot_be_published_is_refused_before_anything_else(
    trail: Trail, tmp_path: Path, name: str
) -> None:
    add_refined(trail, tmp_path / "rows")
    with pytest.raises(PublishError, match="use a-z, 0-9"):
        train(trail, "facts", name=name, base="no-such-base", settings=TrainSettings())
    assert not (trail.home / "run" / "train").exists()


def test_rows_refined_before_their_key_was_revoked_are_refused(trail: Trail, tmp_path: Path) -> None:
    add_contributor(trail, "ana")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Who is Ana?", "completion": "Ana is a contributor."}\n')
    given = contribute(trail, tmp_path / "rows.jsonl", contributor="ana", licence="MIT").entry
    add_refined(trail, tmp_path / "refined", parents=[given.leaf_hash])
    revoke(trail, "ana", reason="laptop stolen", from_us=given.leaf.time_us)
    with pytest.raises(DatasetError, match=r"of ana: signed with key .* \(laptop stolen\).*; then refine again"):
        train(trail, "facts", name="a", base="no-such-base", settings=TrainSettings())


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_gradient_that_is_not_finite_ends_the_run_on_all_ranks_without_a_retry(
    trail: Trail, tiny_base: Path, tmp_path: Path
) -> None:
    def enlarge(attempt: int, rank: int, step: int) -> None:
        """Make every row that this worker will compute infinite."""
        from attribution.influence.codec import GradientCodec

        if step == 1:
            encode = GradientCodec.encode_gradients
            GradientCodec.encode_gradients = lambda *args: encode(*args) * float("inf")  # type: ignore[method-assign]

    add_refined(trail, tmp_path / "rows")
    size = trail.log.size
    settings = TrainSettings(rank=2, max_steps=1, batch_size=4, max_length=64, num_workers=2)
    events: list[object] = []
    with pytest.raises(
        TrainError, match=r"training stopped: example .* gradient is not finite in view 1; lower train.learning_ra"
    ):
        train(trail, "facts", name="big", base=str(tiny_base), settings=settings, progress=events.append, hook=enlarge)
    assert sum(isinstance(event, AttemptStarted) for event in events) == 1
    assert [entry.leaf.kind for entry in trail.entries(start=size)] == ["base_model"]
