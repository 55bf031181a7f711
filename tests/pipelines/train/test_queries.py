"""Query sets: what is read, what is refused, what is warned of, and how often their gradients are taken."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from attribution.influence.encode import num_targets
from attribution.trail import Trail
from configs.errors import UserError
from configs.schema import TrainSettings
from pipelines.benchmark.suites import SuiteError
from pipelines.train.data import Example
from pipelines.train.in_run import deal_queries
from pipelines.train.queries import QueryError, QuerySet, read_query_sets, register, stale_warning, warnings
from tests.pipelines.train.refined import FACTS, add_refined


def suite(path: Path, pairs: tuple[tuple[str, str], ...] = FACTS[:3]) -> Path:
    rows = [{"id": f"q{i}", "prompt": q, "expected": [a], "reference": a} for i, (q, a) in enumerate(pairs)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(trail: Trail, tiny_base: Path, *references: str | Path, max_length: int = 64) -> list[QuerySet]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    return read_query_sets(trail, [str(reference) for reference in references], tokenizer, max_length=max_length)


def test_file_dataset_and_digest_name_a_set(trail: Trail, tiny_base: Path, tmp_path: Path) -> None:
    add_refined(trail, tmp_path / "rows")
    from_file, from_name = read(trail, tiny_base, suite(tmp_path / "held-out.jsonl"), "facts")
    assert (from_file.name, from_file.artefact.kind, len(from_file.items)) == ("held-out", "suite", 3)
    assert (from_name.name, from_name.artefact.kind, len(from_name.items)) == ("facts", "refined", len(FACTS))
    assert [item.item_id for item in from_file.items[:2]] == ["q0", "q1"] and from_name.items[1].item_id == "row 1"
    (tmp_path / "held-out.jsonl").unlink()  # a replay has only the digest
    (again,) = read(trail, tiny_base, from_file.artefact.digest)
    assert again.items == from_file.items
    assert from_file.items[0].encoded == from_name.items[0].encoded


def test_what_cannot_be_scored_against_is_named(trail: Trail, tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(QueryError, match=r"'nothing': no such file; .*no such refined dataset; known: none"):
        read(trail, tiny_base, "nothing")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(SuiteError, match="it has no rows"):
        read(trail, tiny_base, tmp_path / "empty.jsonl")
    add_refined(trail, tmp_path / "none", (), name="none")
    with pytest.raises(QueryError, match="query set none: it has no rows"):
        read(trail, tiny_base, "none")
    with pytest.raises(QueryError, match=r"query q0: .* no token of the answer fits in max_length=8"):
        read(trail, tiny_base, suite(tmp_path / "long.jsonl"), max_length=8)
    (tmp_path / "other").mkdir()
    twice = [suite(tmp_path / "a.jsonl"), suite(tmp_path / "other" / "a.jsonl", FACTS[3:5])]
    with pytest.raises(UserError, match="two sets are called 'a'"):
        read(trail, tiny_base, *twice)


def test_training_rows_and_one_token_answers_are_warned_of(trail: Trail, tiny_base: Path, tmp_path: Path) -> None:
    (found,) = read(trail, tiny_base, suite(tmp_path / "a.jsonl"))
    ids, labels = found.items[1].encoded
    example = Example(0, "sha256:ab", "someone", "", tuple(ids), tuple(labels))
    assert warnings([found], []) == []
    (said,) = warnings([found], [example])
    assert "1 of its 3 queries are training rows too (q1 is row sha256:ab)" in said
    prompt_only = next(i for i, label in enumerate(labels) if label != -100)
    (cut,) = read(trail, tiny_base, suite(tmp_path / "b.jsonl", FACTS[1:2]), max_length=prompt_only + 1)
    assert num_targets(cut.items[0].encoded[1]) == 1
    (said,) = warnings([cut], [])
    assert "1 answers have one token only (q0)" in said


def test_gradients_are_taken_as_often_as_the_tokens_allow(trail: Trail, tiny_base: Path, tmp_path: Path) -> None:
    (found,) = read(trail, tiny_base, suite(tmp_path / "a.jsonl"))
    num_tokens = sum(len(item.encoded[0]) for item in found.items)
    assert register([], TrainSettings(), tokens_per_step=100) is None
    registered = register([found], TrainSettings(), tokens_per_step=100)
    assert registered is not None and registered.groups == (0, 0, 0)
    assert num_tokens / (100 * registered.refresh_steps) <= 0.07 < num_tokens / (100 * (registered.refresh_steps - 1))
    assert [(c.query_set, c.query, c.num_items) for c in registered.columns] == [("a", "", 3)]
    rare = TrainSettings(in_run_refresh_steps=9, in_run_per_query=True)
    each = register([found], rare, tokens_per_step=100)
    assert each is not None and each.refresh_steps == 9 and each.groups == (0, 1, 2)
    assert [column.query for column in each.columns] == ["q0", "q1", "q2"]


def test_a_run_too_short_for_its_queries_is_warned_of() -> None:
    assert stale_warning(25, num_steps=100) == []
    (said,) = stale_warning(34, num_steps=100)
    assert "renewed 3 times in 100 steps" in said and "train.in_run_refresh_steps = 25" in said
    assert "refresh_steps = 1 " in stale_warning(5, num_steps=2)[0]


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_ranks_run_every_query_once_and_equally_many_batches(
    trail: Trail, tiny_base: Path, tmp_path: Path, world_size: int
) -> None:
    add_refined(trail, tmp_path / "rows")
    registered = register(read(trail, tiny_base, "facts"), TrainSettings(), tokens_per_step=100)
    assert registered is not None
    dealt = [deal_queries(registered, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert len({len(batches) for batches in dealt}) == 1
    run = [query for batches in dealt for batch in batches for query in batch if query >= 0]
    assert sorted(run) == list(range(len(FACTS)))
    assert all(batch for batches in dealt for batch in batches)
