"""The program at toy size: labs are deterministic, banks resume, floors can be missed, foreign records are refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import attribution_lds
from benchmarks.attribution import banks, record
from benchmarks.attribution.banks import DROPS, Drop, make_bank, plan_banks
from benchmarks.attribution.facts import HELD_OUT, Size, make_world
from benchmarks.attribution.lab import SETTINGS, Lab, LabSettings
from benchmarks.attribution.methods import Found
from benchmarks.attribution.ours import AUDIT, EXPLAIN

TOY = LabSettings(
    size=Size(num_people=4, num_rows=16, num_queries=4, num_contributors=4),
    train=SETTINGS.model_copy(update={"epochs": 4, "batch_size": 8, "num_checkpoints": 2}),
)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(TOY, seed=0, folder=tmp_path_factory.mktemp("lab"))


def test_a_world_follows_from_its_seed_and_asks_what_no_row_says() -> None:
    world = make_world(Size(), seed=0)
    assert world.digest == make_world(Size(), seed=0).digest != make_world(Size(), seed=1).digest
    assert {len(row.text.split()) for row in world.rows} == {18}
    texts = [row.text for row in world.rows]
    starts = {phrasing.split()[0] + " " + phrasing.split()[1] for phrasing in HELD_OUT if phrasing.startswith("when")}
    assert not [text for text in texts if any(start in text for start in starts)]
    assert not [query for query in world.queries if any(query.prompt in text for text in texts)]
    stated = {(fact.name, fact.relation, fact.value) for fact in world.facts}
    asked = {tuple(query.answer.split()) for query in world.queries}
    assert asked <= {(value, ".") for _, _, value in stated}


def test_subsets_drop_what_they_say() -> None:
    for drop in DROPS:
        kept = drop.subsets(320, 10, seed=0)
        assert (320 - kept.sum(axis=1) == round(drop.share * 320)).all()
        assert len({row.tobytes() for row in kept}) == 10


def test_a_bank_resumes_with_the_same_numbers(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(banks, "CHUNK", 3)
    plan = plan_banks(lab, (Drop("half", 0.5),), num_subsets=6, num_orders=1)[0]
    whole = make_bank(lab, plan, cache=tmp_path / "whole")
    make_bank(lab, plan, cache=tmp_path / "parts")
    files = sorted((tmp_path / "parts").rglob("*.npz"))
    assert [file.name for file in files] == ["0.npz", "3.npz"]
    files[1].unlink()
    again = make_bank(lab, plan, cache=tmp_path / "parts")
    np.testing.assert_array_equal(again.losses, whole.losses)
    run = lab.run()
    solo = run.query_losses(run.run(_weights(plan.kept[4])), lab.queries).double().numpy()
    np.testing.assert_allclose(whole.losses[4], solo, atol=1e-4)


def test_table_floors_and_costs(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = plan_banks(lab, DROPS[:2], num_subsets=8, num_orders=2)
    nothing = np.random.default_rng(0).standard_normal((len(lab.queries), len(lab.examples)))
    peer = Found(nothing, "online", 1.0, 1.0, 1e9, {}, "peer 1.0")
    peers = {"peer": peer, attribution_lds.MAGIC: replace(peer, kind="audit")}
    monkeypatch.setattr(attribution_lds, "OURS", {name: attribution_lds.OURS[name] for name in (EXPLAIN, AUDIT)})
    result = attribution_lds.measure(lab, plans, peers, cache=tmp_path, draws=50)
    assert set(result.noise) == {"keep-50%", "drop-5%"}
    assert result.scores[AUDIT]["drop-5%"].value > 0.5, "exact differentiation foretells the loss of one row"
    held = {figure.name: figure for figure in attribution_lds.figures([result])}
    assert held["keep-50%: " + EXPLAIN + " less peer"].is_good
    attribution_lds.print_tables([result])
    assert "two data orders agree" in capsys.readouterr().out
    attribution_lds.plot([result], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    json.dumps(attribution_lds._to_json([result], list(held.values())))

    blind = replace(result.found[EXPLAIN], scores=nothing)
    monkeypatch.setattr(attribution_lds, "OURS", {EXPLAIN: lambda _: blind})
    better = {"peer": replace(peer, scores=_oracle(plans[0], lab, tmp_path))}
    beaten = attribution_lds.measure(lab, plans, better, cache=tmp_path, draws=50)
    held = {figure.name: figure for figure in attribution_lds.figures([beaten])}
    assert not held["keep-50%: " + EXPLAIN + " less peer"].is_good, "a better peer is a miss"


def test_a_record_of_another_experiment_is_refused(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RECORD_FILE", tmp_path / "peers.npz")
    plans = plan_banks(lab, DROPS[:1], num_subsets=4, num_orders=1)
    found = {"peer": Found(np.eye(len(lab.queries), len(lab.examples)), "online", version="peer 1.0")}
    record.write_record(lab, plans, found)
    read = record.read_record(lab, plans)["peer"]
    np.testing.assert_array_equal(read.scores, found["peer"].scores)
    with pytest.raises(record.RecordError, match=r"recorded on experiment \w{16}, this is"):
        record.read_record(Lab(TOY, seed=1, folder=lab.folder), plans)
    with pytest.raises(record.RecordError, match="subsets of keep-50%"):
        record.read_record(lab, plan_banks(lab, DROPS[:1], num_subsets=5, num_orders=1))


def _weights(kept: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(kept.astype(np.float32))


def _oracle(plan: banks.Plan, lab: Lab, cache: Path) -> np.ndarray:
    """Least squares on the outcomes themselves: what no honest method can know."""
    gains, kept = make_bank(lab, plan, cache=cache).gains, plan.kept.astype(np.float64)
    return np.linalg.lstsq(kept - kept.mean(axis=0), gains - gains.mean(axis=0), rcond=None)[0].T
