"""Receipts as questions to a gradient store, and what is said where there is none to ask."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from attribution.influence.ekfac import CodecSettings
from attribution.influence.gradient_store import GradientStore, GradientStoreError
from attribution.influence.query import AdapterModels
from attribution.influence.question import OpenStores, asked_of_all, asked_views, question_of
from attribution.influence.rows import STORE_FOLDER, StoreRows
from attribution.influence.scores import Normalise, score_parts
from attribution.influence.store import Trace
from attribution.influence.topk import top_examples
from attribution.influence.who import ExplainError, ExplainSettings, explain, subject_of
from attribution.receipts import append_completions, new_receipt_id
from attribution.trail import Trail
from tests.attribution.influence.planted import FACTS, Planted, with_store
from tests.attribution.influence.planted_home import PlantedHome, answer, furnish, receipt_row, record_adapter

QUESTION = "What do bees make?"
GOLDEN = Path(__file__).parents[2] / "golden" / "gradient_store_v1"


@pytest.fixture(scope="module")
def stored_home(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> PlantedHome:
    folder = tmp_path_factory.mktemp("stored")
    return furnish(folder / "home", with_store(planted, folder, CodecSettings("ekfac", dim=1024)))


@pytest.fixture(scope="module")
def models() -> AdapterModels:
    return AdapterModels()


def test_the_row_behind_each_answer_is_among_the_best(stored_home: PlantedHome, models: AdapterModels) -> None:
    stores = OpenStores(stored_home.trail)
    first = {}
    for owner, answers in FACTS.items():
        for index, question in enumerate(answers):
            asked = question_of(stored_home.trail, stored_home.receipts[question], models, stores)
            assert asked.asked.views == stores.get(asked.trace).views and np.ptp(asked.asked.rows, axis=0).max() == 0
            hits = top_examples(stores.get(asked.trace), asked.asked, k=2)[0]
            anew = OpenStores(stored_home.trail)
            again = question_of(stored_home.trail, stored_home.receipts[question], models, anew)
            assert top_examples(stores.get(again.trace), again.asked, k=2)[0] == hits
            first[question] = f"{owner[0]}-{index}" in {hit.example_id for hit in hits}
    assert sum(first.values()) >= 5, first


@pytest.mark.parametrize("normalise", ["cosine", "none"])
def test_who_clears_an_answer_of_what_many_rows_share(
    stored_home: PlantedHome, models: AdapterModels, normalise: Normalise
) -> None:
    """Contributors' scores are those of the cleared gradients, made here by hand; nats are left as they are."""
    trail, receipt_id = stored_home.trail, stored_home.receipts[QUESTION]
    subject = subject_of(trail, receipt_id)
    base, adapter = (trail.store.get_directory(subject.receipt[key]) for key in ("base", "adapter"))
    found = explain(trail, receipt_id, ExplainSettings(normalise=normalise, num_token_groups=2), models=models)
    digest = str(trail.store.manifest(subject.receipt["adapter"]).meta["trace"])
    rows = StoreRows(Trace(trail.store.get_directory(digest)), OpenStores(trail).get(digest))
    query = models.features(subject.completion, rows, base=base, adapter=adapter, num_groups=2)
    assert rows.store.residual is not None
    cleared = rows.store.residual.take_from(query)
    assert np.linalg.norm(query - cleared) > 0.05 * np.linalg.norm(query)
    parts = score_parts(cleared if normalise == "cosine" else query, rows, normalise=normalise)
    owners = np.array([example.contributor for example in rows.trace.examples])
    for part in found.contributors:
        assert part.score == pytest.approx(parts.sum(axis=(0, 1))[owners == part.key_id].sum(), rel=1e-4)
    assert ("cleared" in found.method) == (normalise == "cosine")


@pytest.mark.parametrize("normalise", ["cosine", "none"])
def test_a_store_from_before_rows_were_sums_answers_as_it_did(tmp_path: Path, normalise: Normalise) -> None:
    """A store with rows at two checkpoints and a residual, and its answers, as the code of that day wrote them."""
    shutil.copytree(GOLDEN, tmp_path / "golden")
    said = json.loads((tmp_path / "golden" / "answer.json").read_text())
    store = GradientStore(tmp_path / "golden" / "store", digest=said["digest"])
    assert not store.is_summed and store.views == store.steps == asked_views(store.steps)
    queries = np.asarray(said["queries"], np.float32)
    hits = top_examples(store, asked_of_all(store, queries, normalise), k=8)[0]
    assert [hit.example_id for hit in hits] == [name for name, _ in said["hits"][normalise]]
    np.testing.assert_allclose([hit.score for hit in hits], [score for _, score in said["hits"][normalise]], rtol=1e-5)
    store.delete(["e0"])
    assert store.residual is not None and "e0" not in GradientStore(store.path).ids()


def test_a_trace_with_an_altered_store_is_refused(planted: Planted, tmp_path: Path, models: AdapterModels) -> None:
    home = furnish(tmp_path / "home", with_store(planted, tmp_path, CodecSettings("adam", dim=256)))
    stores = OpenStores(home.trail)
    trace = question_of(home.trail, home.receipts[QUESTION], models, stores).trace
    header = home.trail.store.get_directory(trace) / STORE_FOLDER / "store.json"
    header.chmod(0o644)
    codes = next(header.parent.rglob("*.codes.npy"))
    content = json.loads(header.read_text())
    header.write_text(json.dumps(content))  # the same values, other bytes
    with pytest.raises(GradientStoreError, match=r"store\.json was altered"):
        OpenStores(home.trail).get(trace)
    header.write_text(json.dumps(content, indent=1, sort_keys=True))
    OpenStores(home.trail).get(trace)
    codes.chmod(0o644)
    data = bytearray(codes.read_bytes())
    data[-1] ^= 1
    codes.write_bytes(data)
    with pytest.raises(GradientStoreError, match=codes.name.replace(".", r"\.")):
        OpenStores(home.trail).get(trace)


def test_what_has_no_store_says_what_is_left(
    planted: Planted, planted_home: PlantedHome, tmp_path: Path, models: AdapterModels
) -> None:
    stores = OpenStores(planted_home.trail)
    with pytest.raises(ExplainError, match="the request was for the base model"):
        question_of(planted_home.trail, planted_home.base_receipt, models, stores)
    with pytest.raises(ExplainError, match="rcpt_nothing"):
        question_of(planted_home.trail, "rcpt_nothing", models, stores)
    with pytest.raises(GradientStoreError, match=r"before gradient stores; `trailmark ask who`"):
        question_of(planted_home.trail, planted_home.receipts[QUESTION], models, stores)
    trail = Trail.open(tmp_path / "home")
    base = trail.store.put_directory(planted.base, kind="base_model", meta={})
    receipt_id = ask_adapter(trail, planted, base, record_adapter(trail, planted, base, with_trace=False))
    with pytest.raises(ExplainError, match="no training trace"):
        question_of(trail, receipt_id, models, OpenStores(trail))


def test_an_adapter_merged_since_its_training_gets_no_shares(
    planted: Planted, tmp_path: Path, models: AdapterModels
) -> None:
    """The mean of the trained adapter and half of it: no run ended with these weights."""
    from dataclasses import replace

    merged = tmp_path / "merged"
    shutil.copytree(planted.adapter, merged)
    weights = load_file(merged / "adapter_model.safetensors")
    save_file({name: value * 0.75 for name, value in weights.items()}, merged / "adapter_model.safetensors")
    trail = Trail.open(tmp_path / "home")
    base = trail.store.put_directory(planted.base, kind="base_model", meta={})
    adapter = record_adapter(trail, replace(planted, adapter=merged), base)
    receipt_id = ask_adapter(trail, planted, base, adapter)
    found = explain(trail, receipt_id, models=models)
    assert not found.base_did_it and "merged, averaged or edited" in found.reason
    assert found.gain_nats is not None and found.gain_nats.low > 0
    assert (found.contributors, found.unattributed) == ((), 1.0)
    assert found.baselines["bm25"]


def test_a_deleted_gradient_scores_nothing(planted: Planted, tmp_path: Path, models: AdapterModels) -> None:
    """The row that states the fact is taken out of the store: it is no longer among the examples with a score."""
    stored = with_store(planted, tmp_path, CodecSettings("adam", dim=1024))
    store = GradientStore(stored.trace / STORE_FOLDER)
    store.delete(["b-2"], compact=True)
    home = furnish(tmp_path / "home", stored)
    found = explain(home.trail, home.receipts[QUESTION], models=models)
    assert found.contributors and found.examples[0].example_id != "b-2"
    scores = {part.example_id: part.score for part in found.examples}
    assert scores.get("b-2", 0.0) == 0.0


def ask_adapter(trail: Trail, planted: Planted, base: str, adapter: str) -> str:
    """Record a completion of the question and return its receipt id."""
    row = receipt_row(
        trail, new_receipt_id(), QUESTION, answer(planted, [QUESTION])[QUESTION], base=base, adapter=adapter
    )
    append_completions(trail, [row], replica="replica-0")
    return str(row.receipt["id"])
