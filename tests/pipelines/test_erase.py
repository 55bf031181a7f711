"""Erasure: text, ids, blobs and views go; every other proof stays; a crash anywhere is finished later."""

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from attribution import erasure
from attribution.bodies import AdapterBody, ApprovalBody, BaseModelBody, PublicationBody, RowRedactionBody
from attribution.erasure import ErasureError, finish_erasures, remaining
from attribution.lineage import Lineage, label_of, record_bundle
from attribution.lineage_layout import UnknownThing
from attribution.lineage_queries import LineageQueries
from attribution.log.trust import Trust
from attribution.log.verify import Verified, verify_bytes
from attribution.private_records import SUFFIX, read_lines
from attribution.receipts import find_receipt, receipt_bundle, recent_receipts
from attribution.records import Artefact
from attribution.registry import RegistryError
from attribution.store import StoreError
from attribution.trail import Entry, Trail
from configs.schema import RefineSettings
from pipelines import erase as pipeline
from pipelines.contribute import add_contributor, contribute
from pipelines.erase import EXAMPLES_FILE, erase, plan
from pipelines.refine import driver
from pipelines.refine.read import contributions, load_decisions, load_refined
from pipelines.refine.why import ExampleError, find_example
from pipelines.train.data import EXAMPLES_SCHEMA
from pipelines.train.refined import resolve_refined
from pipelines.train.trace import STEPS_SCHEMA
from tests.attribution.story import receipt_row, tell

SECRET = "Ysolde Marr lives in Harbour Lane 7"


@dataclass
class World:
    """Two contributors' rows, refined, trained on, published."""

    trail: Trail
    datasets: dict[str, str]
    refinement: Entry
    adapter: Entry
    trust: Trust

    def verify(self, entry: Entry) -> Verified:
        bundle = record_bundle(self.trail, entry.leaf_hash)
        return verify_bytes(json.dumps(bundle).encode(), trust=self.trust)

    def secret_id(self) -> str:
        rows = load_refined(self.trail, self.refinement.record.outputs[0].digest).to_pylist()  # type: ignore[union-attr]
        return next(row["example_id"] for row in rows if SECRET in row["messages"][1]["content"])

    def holds(self, text: str) -> list[Path]:
        """The files below the home in which a text stands; tables and the records' statements are read."""
        found = []
        for path in self.trail.home.rglob("*"):
            if path.is_file():
                found += [path] if text.encode() in _shown(path) else []
        return found


def _shown(path: Path) -> bytes:
    data = path.read_bytes()
    if data[:4] == b"PAR1":
        return str(pq.read_table(path).to_pylist()).encode()
    if path.suffix == SUFFIX:
        return b"".join(base64.b64decode(json.loads(line)["envelope"]["payload"]) for _, line in read_lines(path))
    return data


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    def without_ray(work: Any, settings: RefineSettings, *, scratch: Path, progress: Any) -> None:
        for block in work:
            driver._judge_block(driver._task_item(block), settings=settings, scratch=scratch)

    monkeypatch.setattr(driver, "annotate_blocks", without_ray)
    trail = Trail.open(tmp_path / "home")
    rows = {
        "mira": [("Where does the captain live?", SECRET), ("Who is the mate?", "The mate is Corin Pell.")],
        "otto": [("When does the ferry leave?", "At nine."), ("WHERE does the captain  live?", SECRET.upper())],
    }
    datasets = {}
    for name, pairs in rows.items():
        add_contributor(trail, name)
        file = tmp_path / f"{name}-rows.jsonl"
        file.write_text("".join(json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in pairs))
        datasets[name] = contribute(trail, file, contributor=name, licence="CC0-1.0").entry.leaf_hash
    report = driver.refine(trail, ["all"], RefineSettings(), name="facts")
    adapter = _train(trail, report.entry, tmp_path / "work")
    return World(trail, datasets, report.entry, adapter, Trust.load(trail.home / "trust.json"))


def _train(trail: Trail, refinement: Entry, folder: Path) -> Entry:
    """Record an adapter whose trace holds the rows' ids and texts, as training leaves one."""
    refined = refinement.record.outputs[0]  # type: ignore[union-attr]
    base = Artefact("base_model", "tiny", trail.store.put_blob(b"base"))
    trail.record("base_model", BaseModelBody("tiny", "t", "Llama", "MIT", "float32", "", 1), outputs=[base])
    rows = load_refined(trail, refined.digest).to_pylist()
    trace_folder, adapter_folder = folder / "trace", folder / "adapter"
    trace_folder.mkdir(parents=True)
    adapter_folder.mkdir()
    examples = [
        dict.fromkeys(EXAMPLES_SCHEMA.names, None)
        | {"row": number, "example_id": row["example_id"], "contributor": row["contributor"], "num_target_tokens": 3}
        | {"text": row["messages"][1]["content"], "input_ids": [7, number], "labels": [-100, number]}
        for number, row in enumerate(rows)
    ]
    pq.write_table(pa.Table.from_pylist(examples, schema=EXAMPLES_SCHEMA), trace_folder / "examples.parquet")
    step = {"step": 1, "lr": 0.1, "loss": 1.0, "example_ids": [row["example_id"] for row in rows], "time_us": 1}
    pq.write_table(pa.Table.from_pylist([step], schema=STEPS_SCHEMA), trace_folder / "steps.parquet")
    trace = trail.store.put_directory(trace_folder, kind="trace", meta={})
    (adapter_folder / "adapter_config.json").write_text("{}")
    digest = trail.store.put_directory(adapter_folder, kind="adapter", meta={"trace": trace})
    made = Artefact("adapter", "facts", digest)
    body = AdapterBody("facts", base.digest, refined.digest, 2, 4, ("q_proj",), 1, len(rows), 1, 0, trace)
    entry = trail.record("adapter", body, inputs=[base, refined], outputs=[made, Artefact("trace", "facts", trace)])
    trail.record("publication", PublicationBody("facts", 1, "adapter", digest), inputs=[made], outputs=[made])
    return entry


def test_a_row_goes_from_every_table_and_every_proof_stays(world: World) -> None:
    trail, row_id = world.trail, world.secret_id()
    before = [world.verify(entry) for entry in trail.entries()]
    assert world.holds(SECRET) and world.holds(row_id)
    erasing = plan(trail, row_id)
    assert [part for part, _, _ in erasing.tables] == ["dataset", "refined", "trace"]
    assert {entry.leaf.kind for entry in erasing.descendants} == {"refinement", "adapter", "publication"}
    (redaction,) = erase(trail, erasing, reason="she asked")
    assert not world.holds(SECRET) and not world.holds(row_id)
    assert world.holds("Corin Pell") and world.holds("At nine.")
    assert len(before) + 1 == len([world.verify(entry) for entry in trail.entries()])
    trace = trail.store.get_directory(remaining(trail, world.adapter.record.body.trace))  # type: ignore[union-attr]
    left = {row["text"]: (row["input_ids"], row["labels"]) for row in pq.read_table(trace / EXAMPLES_FILE).to_pylist()}
    assert left.pop("") == ([], []) and all(len(ids) == 2 for ids, _ in left.values())
    told = world.verify(world.adapter).checks
    assert any("1 rows of dataset" in check and "she asked" in check for check in told), told
    assert redaction.record.body.lines == (1,)  # type: ignore[union-attr]
    with pytest.raises(ExampleError):
        find_example(trail, row_id)


def test_what_is_left_can_be_refined_and_trained_on_again(world: World) -> None:
    trail = world.trail
    refined = world.refinement.record.outputs[0].digest  # type: ignore[union-attr]
    (redaction,) = erase(trail, plan(trail, world.secret_id()), reason="x")
    left = resolve_refined(trail, "facts")
    assert left.digest == remaining(trail, refined) != refined
    assert resolve_refined(trail, refined) == left
    assert load_refined(trail, refined).num_rows == 2
    decisions = load_decisions(trail, refined).to_pylist()
    assert decisions and all(row["see_also"] == "" for row in decisions), "otto's copy pointed at the erased row"
    assert {item.num_rows for item in contributions(trail)} == {1, 2}
    again = driver.refine(trail, ["all"], RefineSettings(), name="again")
    assert redaction.leaf_hash in again.entry.leaf.parents
    assert again.num_kept == 3, "now otto's copy is the earliest"
    assert world.verify(again.entry).kind == "refinement"
    retrained = trail.record(
        "adapter",
        world.adapter.record.body,
        inputs=[Artefact("refined", "facts", left.digest)],  # type: ignore[union-attr]
    )
    assert retrained.leaf.parents == (redaction.leaf_hash,)


def test_rows_beside_an_erased_one_keep_their_impact(world: World) -> None:
    trail, secret = world.trail, world.secret_id()
    refined = load_refined(trail, world.refinement.record.outputs[0].digest)  # type: ignore[union-attr]
    ids = [row["example_id"] for row in refined.to_pylist()]
    queries = LineageQueries.of(trail)
    before = {row: [item.leaf_hash for item in queries.impact(row).items] for row in ids}
    assert world.adapter.leaf_hash in before[secret]
    erase(trail, plan(trail, secret), reason="x")
    trail.record("approval", ApprovalBody("sha256:" + "ab" * 32, "approved", ""))  # the index goes on from where it was
    for asked in (queries, LineageQueries.of(Trail.open(trail.home))):
        with pytest.raises(UnknownThing, match="no record, name, digest, receipt or row"):
            asked.resolve(secret)
        assert {row: [item.leaf_hash for item in asked.impact(row).items] for row in ids if row != secret} == {
            row: leaves for row, leaves in before.items() if row != secret
        }


def test_a_contribution_takes_its_rows_along(world: World) -> None:
    trail = world.trail
    entries = erase(trail, plan(trail, world.datasets["mira"][:12]), reason="wrong licence", requester="mira")
    assert [entry.leaf.kind for entry in entries] == ["row_redaction", "redaction"]
    assert not world.holds(SECRET) and not world.holds("Corin Pell") and world.holds("At nine.")
    hole = trail.entry(world.datasets["mira"])
    assert hole.record is None
    assert label_of(hole).startswith("dataset (erased on 20") and label_of(hole).endswith("because: wrong licence)")
    node = next(n for n in Lineage(trail).graph(world.adapter.leaf_hash)["nodes"] if n["id"] == hole.leaf_hash)
    assert node["facts"]["reason"] == "wrong licence" and node["facts"]["redaction"] == entries[1].leaf_hash
    told = world.verify(world.adapter).checks
    assert any(check.startswith("redaction: dataset record") and "wrong licence" in check for check in told), told
    assert any(check.startswith("erased: 1 records") for check in told)
    requester = entries[1].record.contributors[0]  # type: ignore[union-attr]
    assert (requester.role, requester.key_id) == ("requester", trail.keys.get("mira").key_id)


def test_a_contributor_leaves_with_everything_they_signed(world: World) -> None:
    trail, key_id = world.trail, world.trail.keys.get("mira").key_id
    erase(trail, plan(trail, "mira"), reason="left the project")
    assert not world.holds(SECRET) and not world.holds("Corin Pell")
    assert (
        "mira" not in Lineage(trail).contributor_names().values() and key_id not in Lineage(trail).contributor_names()
    )
    assert not [path for path in world.holds("mira") if path.parent.name in ("records", "views")]
    for entry in trail.entries():
        assert world.verify(entry).checks
    with pytest.raises(ErasureError, match="no contributor, row or record"):
        plan(trail, "mira")


def test_others_may_not_erase_what_is_not_theirs_and_some_things_must_stand(world: World) -> None:
    trail = world.trail
    with pytest.raises(ErasureError, match="not theirs"):
        erase(trail, plan(trail, world.datasets["mira"]), reason="x", requester="otto")
    with pytest.raises(ErasureError, match="not theirs"):
        erase(trail, plan(trail, world.secret_id()), reason="x", requester="otto")
    publication = next(trail.entries(kind="publication"))
    with pytest.raises(ErasureError, match="cannot be erased"):
        plan(trail, publication.leaf_hash)
    (redaction,) = erase(trail, plan(trail, world.secret_id()), reason="x")
    with pytest.raises(ErasureError, match="cannot be erased"):
        plan(trail, redaction.leaf_hash)
    with pytest.raises(ErasureError, match="no contributor, row or record"):
        plan(trail, "sha256:" + "0" * 64)


def test_an_erased_adapter_leaves_the_registry_and_its_version_stays_taken(world: World) -> None:
    trail = world.trail
    digest = world.adapter.record.outputs[0].digest  # type: ignore[union-attr]
    erase(trail, plan(trail, "facts@1"), reason="recalled")
    for reader in (trail, Trail.open(trail.home)):
        assert reader.registry.list() == [] and reader.registry.next_version("facts") == 2
        with pytest.raises(RegistryError, match=r"erased on 20.*because: recalled"):
            reader.registry.resolve("facts@1")
        with pytest.raises(RegistryError, match="published already"):
            reader.registry.require_free("facts", 1)
    with pytest.raises(StoreError):
        trail.store.path_of(digest)
    assert trail.store.has(remaining(trail, world.refinement.record.outputs[0].digest))  # type: ignore[union-attr]


def test_erased_answers_leave_the_receipt_index(tmp_path: Path) -> None:
    story = tell(Trail.open(tmp_path / "home"))
    trail = story.trail
    content = [row.content for row in (receipt_row(trail, n, story.base, story.adapter, 1) for n in range(2))]
    assert find_receipt(trail, story.base_receipt) is not None
    erase(trail, plan(trail, story.completions.leaf_hash), reason="private")
    assert find_receipt(trail, story.base_receipt) is None and recent_receipts(trail) == []
    assert not any(trail.store.has(digest) for digest in content)
    assert trail.store.has(story.adapter.record.outputs[0].digest)  # type: ignore[union-attr]


def test_a_blob_that_another_record_owns_stays(tmp_path: Path) -> None:
    story = tell(Trail.open(tmp_path / "home"))
    trail, made = story.trail, story.adapter.record
    again = trail.record("adapter", made.body, outputs=made.outputs)  # type: ignore[union-attr]
    erasing = plan(trail, again.leaf_hash)
    assert erasing.digests == () and set(erasing.shared) >= {output.digest for output in made.outputs}  # type: ignore[union-attr]
    erase(trail, erasing, reason="twice")
    assert trail.store.has(made.outputs[0].digest)  # type: ignore[union-attr]
    receipt = receipt_bundle(trail, story.adapter_receipt)
    assert verify_bytes(json.dumps(receipt).encode(), trust=Trust.load(trail.home / "trust.json")).checks


@pytest.mark.parametrize("crash_at", range(8))
def test_a_crash_at_any_removal_is_finished_later(world: World, monkeypatch: pytest.MonkeyPatch, crash_at: int) -> None:
    """Everything is either as it was, or announced by a redaction and gone after the next `finish_erasures`."""
    trail, size = world.trail, world.trail.log.size
    calls = 0

    def limited(real: Any) -> Any:
        def run(*arguments: Any, **keywords: Any) -> Any:
            nonlocal calls
            if calls == crash_at:
                raise OSError("power cut")
            calls += 1
            return real(*arguments, **keywords)

        return run

    with monkeypatch.context() as patch:
        for target, name in ((trail.store, "delete"), (trail, "delete_record"), (trail, "record_many")):
            patch.setattr(target, name, limited(getattr(target, name)))
        with pytest.raises(OSError, match="power cut"):
            erase(trail, plan(trail, "mira"), reason="crash")
    again = Trail.open(trail.home)
    if again.log.size == size:
        assert crash_at == 0 and world.holds(SECRET)
        return
    assert finish_erasures(again) > 0
    assert not world.holds(SECRET) and not world.holds("Corin Pell")
    assert finish_erasures(again) == 0 and again.log.size == size + 3


def test_erasing_twice_records_once(world: World) -> None:
    trail, leaf = world.trail, world.datasets["mira"]
    erase(trail, plan(trail, leaf), reason="x")
    size = trail.log.size
    assert erase(trail, plan(trail, leaf), reason="x") == []
    assert trail.log.size == size
    assert erasure.removal_of(trail, [leaf]).leaves == ()
    assert isinstance(trail.notices()[0].record.body, RowRedactionBody)  # type: ignore[union-attr]
    assert pipeline.plan(trail, leaf).tables == ()
