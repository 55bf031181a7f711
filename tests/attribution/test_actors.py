"""The Ray shells: appends are durable and never wait for a gradient, a scorer answers as the library does."""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray

from attribution import actors
from attribution.bodies import ApprovalBody
from attribution.erasure import erase
from attribution.influence import gradient_store
from attribution.influence.ekfac import CodecSettings
from attribution.influence.query import AdapterModels
from attribution.influence.question import OpenStores, question_of
from attribution.influence.rows import ShardsElsewhere
from attribution.influence.topk import top_examples
from attribution.influence.who import RANKED, ExplainError, ExplainSettings, explain
from attribution.question_who import ONE_MACHINE, ask_who
from attribution.receipts import find_receipt, new_receipt_id
from attribution.records import Party
from attribution.store import digest_of
from attribution.trail import Trail, TrailError
from configs.errors import UserError
from configs.schema import AttributionSettings
from tests.attribution.influence.planted import plant, with_store
from tests.attribution.influence.planted_home import PlantedHome, furnish, receipt_row

pytestmark = pytest.mark.ray
SETTINGS = AttributionSettings(num_scorers=1, num_bootstrap=100)


@pytest.fixture(scope="module")
def home(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> PlantedHome:
    folder = tmp_path_factory.mktemp("actors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradient_store, "SHARD_ROWS", 2)
        run = with_store(plant(tiny_base, folder / "run"), folder / "stored", CodecSettings("adam", dim=512))
    return furnish(folder / "home", run)


@pytest.fixture(scope="module")
def started(ray_cluster: str, home: PlantedHome) -> Iterator[PlantedHome]:
    actors.start(home.trail.home, SETTINGS)
    yield home
    actors.stop()


def batch(home: PlantedHome, question: str = "What do bees make?") -> list[Any]:
    return [receipt_row(home.trail, new_receipt_id(), question, ([3, 4], [5]), base=home.base, adapter=home.adapter)]


def test_completions_are_in_the_log_when_acknowledged(started: PlantedHome) -> None:
    rows = batch(started)
    leaf_hash = ray.get(actors.log_writer().append_completions.remote(rows, "replica-0"))
    stored = find_receipt(Trail.open(started.trail.home), rows[0].receipt["id"])
    assert stored is not None and stored.leaf_hash == leaf_hash


def test_other_records_go_the_same_way(started: PlantedHome) -> None:
    writer = actors.log_writer()
    loaded = ray.get(writer.adapter_loaded.remote("replica-0", started.adapter, started.base))
    body = ApprovalBody(digest_of(b"x"), "approved", "looks right")
    approved = ray.get(writer.append.remote("approval", body, seed=4))
    trail = Trail.open(started.trail.home)
    adapter = trail.find(started.adapter)
    assert adapter is not None and adapter.leaf_hash in trail.entry(loaded).leaf.parents
    record = trail.entry(approved).record
    assert record is not None and (record.body, record.seed) == (body, 4)


def test_threads_share_messages_to_the_writer_and_fail_alone(started: PlantedHome) -> None:
    client = actors.LogClient()
    body = ApprovalBody(digest_of(b"x"), "approved", "together")

    def append(number: int) -> str:
        parents = {"parents": ["ab" * 32]} if number == 3 else {}  # a parent that is not in the log
        try:
            return client.append("approval", body, **parents)
        except TrailError as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(append, range(8)))
    assert answers[3].startswith("parent abab") and len(set(answers)) == 8
    trail = Trail.open(started.trail.home)
    recorded = [trail.entry(leaf_hash).record for leaf_hash in answers if leaf_hash != answers[3]]
    assert all(record is not None and record.body == body for record in recorded)


def test_the_writer_has_no_torch(started: PlantedHome) -> None:
    modules = ray.get(actors.log_writer().loaded_modules.remote())
    assert "attribution" in modules
    assert not {"torch", "transformers", "peft"} & set(modules)


def test_a_busy_scorer_delays_no_acknowledgement(started: PlantedHome) -> None:
    """Appends are acknowledged while long answers are being scored: none waits for the scorer to end."""
    scorer, writer = actors.scorers()[0], actors.log_writer()
    tokens = ([3, 4, 5, 6], [20 + number % 100 for number in range(250)])
    rows = [
        receipt_row(started.trail, new_receipt_id(), "q", tokens, base=started.base, adapter=started.adapter)
        for _ in range(2)
    ]
    ray.get(writer.append_completions.remote(rows, "replica-0"))
    explaining = [scorer.explain.remote(row.receipt["id"]) for row in rows]
    for _ in range(3):
        ray.get(writer.append_completions.remote(batch(started), "replica-0"))
        _, unfinished = ray.wait(explaining, num_returns=len(explaining), timeout=0)
        assert unfinished, "the scorer was done before the append: give it more to do"
    assert {answer["receipt_id"] for answer in ray.get(explaining)} == {row.receipt["id"] for row in rows}


def test_a_scorer_answers_as_the_library_does(started: PlantedHome) -> None:
    receipt_id = started.receipts["What colour is grass?"]
    remote = actors.explain_remotely(receipt_id)
    local = explain(started.trail, receipt_id, ExplainSettings.of(SETTINGS)).to_dict()
    assert {**remote, "influence_leaf": None} == local
    assert remote["contributors"][0]["name"] == "otto"
    recorded = [e for e in Trail.open(started.trail.home).entries(kind="influence") if e.record is not None]
    leaf_of = {entry.record.body.receipt_id: entry.leaf_hash for entry in recorded if entry.record}
    assert leaf_of[receipt_id] == remote["influence_leaf"]
    more = actors.explain_remotely(receipt_id, 6)
    assert more["examples"][:5] == remote["examples"] and len(more["examples"]) == 6


def test_what_was_erased_is_not_told_from_memory(home: PlantedHome, tmp_path: Path) -> None:
    copy = tmp_path / "home"
    shutil.copytree(home.trail.home, copy)
    scorer, receipt_id = actors.Scorer(str(copy), ExplainSettings.of(SETTINGS), 1), home.receipts["What do bees make?"]
    assert scorer.explain(receipt_id)["examples"]
    trail = Trail.open(copy)
    stored = find_receipt(trail, receipt_id)
    assert stored is not None
    operator = Party(trail.keys.get("operator").key_id, "operator")
    erase(trail, [stored.leaf_hash], reason="she asked", requester=operator)
    with pytest.raises(UserError, match="not in this home's log"):
        scorer.explain(receipt_id)


def test_shards_on_several_nodes_are_merged(started: PlantedHome, tmp_path: Path) -> None:
    """A second scorer has a home of its own that lacks two of the four shards, as a node would."""
    partial = tmp_path / "home"
    shutil.copytree(started.trail.home, partial)
    stores, models = OpenStores(started.trail), AdapterModels()
    receipt_id = started.receipts["What do bees make?"]
    question = question_of(started.trail, receipt_id, models, stores)
    for shard in stores.get(question.trace).shards[1:3]:
        shutil.rmtree(partial / shard.folder.relative_to(started.trail.home))
    settings = ExplainSettings.of(SETTINGS)
    other = ray.remote(actors.Scorer).options(num_cpus=actors.SCORER_CPUS).remote(str(partial), settings, 1)
    (expected,) = top_examples(stores.get(question.trace), question.asked, k=5)
    pool = [other, actors.scorers()[0]]
    assert actors.top_examples_over(pool, receipt_id, k=5) == expected
    assert actors.top_examples_over(pool[::-1], receipt_id, k=5) == expected
    assert expected[0].example_id == "b-2"
    with pytest.raises(ShardsElsewhere, match="shards 000002, 000003 of its gradient store are not on this machine"):
        actors.Scorer(str(partial), settings, 1).explain(receipt_id)
    told = actors.ranked_over(pool, receipt_id, 5)
    assert [row["example_id"] for row in told["examples"]] == [hit.example_id for hit in expected]
    assert told["contributors"] == [] and told["reason"] == RANKED and told["examples"][0]["low"] is None
    found = ask_who(started.trail, receipt_id, explain=lambda _: told)
    assert found.details["examples"][0]["bm25_rank"] == 1 and found.missing[0].remedy == ONE_MACHINE
    with pytest.raises(actors.ShardMissing, match="shard 000002 of the gradient store: no scorer's home holds it"):
        actors.top_examples_over(pool[:1], receipt_id, k=5)
    with pytest.raises(ExplainError, match="the request was for the base model"):
        actors.top_examples_over(pool, started.base_receipt, k=5)
    ray.kill(other)


def test_a_mistake_comes_back_as_its_message(started: PlantedHome) -> None:
    with pytest.raises(ExplainError, match=r"^receipt 'rcpt_nothing'"):
        actors.explain_remotely("rcpt_nothing")


def test_starting_again_leaves_what_runs(started: PlantedHome) -> None:
    before = actors.log_writer()._actor_id
    actors.start(started.trail.home, SETTINGS)
    assert actors.log_writer()._actor_id == before
    assert len(actors.scorers()) == SETTINGS.num_scorers
