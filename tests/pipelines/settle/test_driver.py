"""Settling a real adapter on Ray: against every coalition trained by itself, resumed, refused where it cannot be."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attribution.bodies import AdapterBody
from attribution.credit import RULE, Credit, CreditError
from attribution.exact_values import all_coalitions, exact_banzhaf, leave_one_out
from attribution.key_changes import revoke, rotate
from attribution.records import Artefact
from attribution.settled_evidence import unit_of
from attribution.settlement import settlements
from attribution.trail import Trail
from attribution.void_records import VoidRecordError
from configs.schema import SettleSettings
from pipelines.benchmark.run import BenchmarkError
from pipelines.benchmark.suites import read_suite
from pipelines.settle.answers import greedy_answers, matches
from pipelines.settle.asked import asked
from pipelines.settle.cells import Cells
from pipelines.settle.driver import Budget, SettleReport, settle
from pipelines.settle.game import Game
from pipelines.settle.recheck import recheck
from pipelines.settle.retrain import Retrainer, Task, UtilityName, encode_items, valued
from pipelines.settle.subject import SettleError, subject_of
from pipelines.settle.switches import SWITCHES
from tests.pipelines.settle.settled_world import QUESTIONS, SETTINGS, World, add_adapter, build_world

pytestmark = pytest.mark.ray
TOLERANCE = 5e-4  # of a likelihood, or nats: see pipelines/settle/plan.py


@pytest.fixture(scope="module")
def world(ray_cluster: str, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("settle"), tiny_base)


@pytest.fixture(scope="module")
def report(world: World) -> SettleReport:
    return run(world)


def run(world: World, *, over: str = "contributors", **given: Any) -> SettleReport:
    others = given.pop("others", ())
    settings = SettleSettings(num_workers=1, **given)
    ready = asked(world.trail, "facts", suite=world.suite, over=over, settings=settings, others=others)
    found = settle(world.trail, ready)
    assert found is not None
    return found


def game_of(world: World, over: str) -> Game:
    return SWITCHES[over].build(world.trail, subject_of(world.trail, "facts"), ())


def retrainer_of(world: World, game: Game, *, utility: UtilityName = "likelihood") -> Retrainer:
    subject = subject_of(world.trail, "facts")
    items = read_suite(world.suite)
    encoded = encode_items(items, subject.adapter.base_path)
    return Retrainer(
        Task(
            game.mode,
            str(subject.adapter.base_path),
            "tiny",
            subject.adapter.base_digest,
            subject.settings,
            game.examples,
            (),
            items,
            encoded,
            utility,
            16,
        )
    )


def test_values_are_those_of_all_coalitions_trained_one_by_one(world: World, report: SettleReport) -> None:
    game = game_of(world, "contributors")
    assert [player.name for player in game.players] == sorted(
        ("mira", "otto", "tiny"), key=lambda name: world.trail.keys.get(name).key_id
    )
    alone = retrainer_of(world, game)
    utilities = valued([alone.measure(game.chosen(row)[None])[0] for row in all_coalitions(3)], "likelihood")
    assert ((utilities > 0) & (utilities < 1)).all()
    assert report.credit.stopped == "exact" and report.settlement.num_coalitions == 8
    np.testing.assert_allclose(report.credit.banzhaf.cells, exact_banzhaf(utilities), atol=TOLERANCE * utilities.max())
    np.testing.assert_allclose(
        report.credit.leave_one_out.cells, leave_one_out(utilities), atol=TOLERANCE * utilities.max()
    )
    assert report.settlement.full_value == pytest.approx(utilities[-1].mean(), rel=TOLERANCE)


def test_the_record_tells_who_mattered(world: World, report: SettleReport) -> None:
    (found,) = [one for one in settlements(world.trail, world.adapter) if one.leaf_hash == report.entry.leaf_hash]
    by_name = {player.name: player for player in found.players}
    assert by_name["mira"].verdict == by_name["otto"].verdict == "helped"
    assert by_name["tiny"].value < min(by_name["mira"].value, by_name["otto"].value)
    assert found.full_value > 5 * found.empty_value > 0
    items = np.array(report.item_ids)
    cells = report.credit.banzhaf.cells
    ferries, towns = (np.isin(items, [f"q{number}" for number in numbers]) for numbers in (range(4), range(4, 8)))
    places = {player.name: place for place, player in enumerate(report.game.players)}
    leans = {name: cells[place, ferries].mean() - cells[place, towns].mean() for name, place in places.items()}
    assert leans["mira"] > leans["otto"]


def test_the_full_coalition_is_the_adapter_itself(world: World, report: SettleReport) -> None:
    from attribution.influence.gradients import target_log_likelihoods
    from pipelines.train.lora import load_base, reload_adapter

    subject = subject_of(world.trail, "facts")
    base = load_base(str(subject.adapter.base_path), dtype="float32")
    model = reload_adapter(base, world.trail.store.get_directory(world.adapter))
    encoded = encode_items(read_suite(world.suite), subject.adapter.base_path)
    by_peft = [float(part.mean().exp()) for part in target_log_likelihoods(model, encoded)]
    np.testing.assert_allclose(report.credit.full, by_peft, rtol=TOLERANCE)
    with model.disable_adapter():
        of_base = [float(part.mean().exp()) for part in target_log_likelihoods(model, encoded)]
    np.testing.assert_allclose(report.credit.empty, of_base, rtol=TOLERANCE)


def test_cost_is_told_first_and_what_is_measured_is_not_trained_again(world: World, report: SettleReport) -> None:
    events: list[object] = []
    settings = SettleSettings(num_workers=1)
    ready = asked(world.trail, "facts", suite=world.suite, over="contributors", settings=settings)
    size = world.trail.log.size
    assert settle(world.trail, ready, progress=events.append, dry_run=True) is None
    budget = next(event for event in events if isinstance(event, Budget))
    assert (budget.num_retrains, budget.num_all) == (7, 7) and budget.seconds_each > 0
    assert not any(isinstance(event, Credit) for event in events) and world.trail.log.size == size
    again = run(world)
    assert again.num_reused == again.settlement.num_coalitions == 8
    assert again.settlement.players == report.settlement.players


def test_a_killed_run_goes_on_where_it_was(world: World, report: SettleReport) -> None:
    """Some of the cells are gone, one is damaged, as after a kill: those are trained again, the result is the same."""
    files = sorted((world.trail.home / "run" / "settle").glob("*.json"))
    assert len(files) == 8
    for file in files[:3]:
        file.unlink()
    files[3].write_text("{")
    again = run(world)
    assert again.num_reused in (4, 5)  # the full coalition is measured for the cost, before the others are counted
    for old, new in zip(report.settlement.players, again.settlement.players, strict=True):
        assert (
            new.value == pytest.approx(old.value, abs=TOLERANCE * again.settlement.full_value)
            and new.verdict == old.verdict
        )


def test_whatever_decides_a_utility_decides_its_cell(world: World, report: SettleReport) -> None:
    game = game_of(world, "contributors")
    setting = {"base": "b", "settings": "s", "suite": "q", "utility": "u", "tokens": 0}
    chosen = game.chosen(np.array([True, False, True]))
    known = Cells(world.trail.home, game, setting).digest(chosen)
    assert known == Cells(world.trail.home, game_of(world, "datasets"), setting).digest(chosen)
    others = [Cells(world.trail.home, game, {**setting, name: "other"}).digest(chosen) for name in setting]
    others.append(Cells(world.trail.home, game, setting).digest(~chosen))
    others.append(Cells(world.trail.home, replace(game, mode="train"), setting).digest(chosen))
    others.append(Cells(world.trail.home, replace(game, examples=game.examples[1:]), setting).digest(chosen))
    assert len({known, *others}) == 1 + len(others)


def test_datasets_of_one_contributor_each_come_to_the_same(world: World, report: SettleReport) -> None:
    found = run(world, over="datasets")
    assert {player.id for player in found.settlement.players} == {world.datasets[n] for n in ("mira", "otto", "tiny")}
    by_name = {player.name: player.value for player in found.settlement.players}
    for player in report.settlement.players:
        assert by_name[player.name] == pytest.approx(player.value, abs=1e-6)
    assert found.num_reused == 8  # equal coalitions of rows are equal, whoever asks


def test_a_rule_switched_off_brings_its_rows_back(world: World) -> None:
    game = game_of(world, "rules")
    (rule,) = game.players
    assert (rule.kind, rule.name, rule.num_rows) == ("rule", "exact_duplicates", 3)
    on, off = game.chosen(np.array([True])), game.chosen(np.array([False]))
    assert on.sum() == 13 and off.sum() == 16
    settled = {example.example_id for example, is_in in zip(game.examples, on, strict=True) if is_in}
    kept = {example.example_id for example in game_of(world, "contributors").examples}
    assert settled == kept
    with_rule, without, of_rows = (
        np.array(cell.utilities)
        for cell in retrainer_of(world, game).measure(np.stack([on, off]))
        + retrainer_of(world, game_of(world, "contributors")).measure(np.ones((1, 13), dtype=bool))
    )
    np.testing.assert_allclose(with_rule, of_rows, atol=TOLERANCE)  # with the rule on: the adapter itself
    assert abs(with_rule - without).max() > 10 * TOLERANCE


def test_adapters_are_switched_on_one_base(world: World, tmp_path: Path) -> None:
    subject = subject_of(world.trail, "facts")
    changed = SETTINGS.model_copy(update={"epochs": 1, "learning_rate": 1e-5})
    where = {"base": subject.adapter.base_digest, "dataset": subject.dataset, "settings": changed}
    idle = add_adapter(world.trail, tmp_path / "idle", name="idle", **where)  # type: ignore[arg-type]
    found = run(world, over="adapters", others=(idle,))
    by_name = {player.name: player for player in found.settlement.players}
    assert by_name["facts"].verdict == "helped"
    assert abs(by_name["idle"].value) < 0.02 * by_name["facts"].value
    alone = next(
        row for row, on in zip(found.credit.utilities, found.credit.coalitions, strict=True) if list(on) == [1, 0]
    )
    assert alone.mean() == pytest.approx(run(world).settlement.full_value, rel=TOLERANCE)


def test_a_plan_of_version_1_is_still_measured_again(world: World) -> None:
    """As settlements before likelihood was the default left them: by log-likelihood, without a rule."""
    settlement = run(world, utility="log_likelihood").settlement
    plan = world.trail.get_json(settlement.plan)
    assert (plan.pop("rule"), plan.pop("version")) == (RULE, 2)
    old = replace(settlement, plan=world.trail.put_json({**plan, "version": 1}))
    again = recheck(world.trail, old, num_cells=3, seed=4)
    assert len(again) == 3 and all(cell.agrees for cell in again)


def test_one_retrain_serves_likelihood_and_its_logarithm(world: World, report: SettleReport) -> None:
    """The values differ, as do the units; nothing is trained again, and cells of both can be measured again."""
    logs = run(world, utility="log_likelihood")
    assert logs.num_reused == logs.settlement.num_coalitions == 8
    np.testing.assert_allclose(np.exp(logs.credit.utilities), report.credit.utilities, rtol=1e-12)
    assert report.settlement.utility == "likelihood of the reference answer, probability per token"
    assert logs.settlement.utility == "log-likelihood of the reference answer, nats per token"
    assert [unit_of(one.settlement) for one in (report, logs)] == ["probability per token", "nats per token"]
    gain = report.settlement.full_value - report.settlement.empty_value
    assert 0 < gain < 1 and logs.settlement.empty_value < logs.settlement.full_value < 0
    again = recheck(world.trail, logs.settlement, num_cells=2, seed=1)
    assert all(cell.agrees and cell.recorded < 0 for cell in again)


def test_exact_matches_can_be_the_utility(world: World, tmp_path: Path) -> None:
    retrainer = retrainer_of(world, game_of(world, "contributors"), utility="exact_match")
    taught = read_suite(world.suite)[0]
    retrainer.task = replace(
        retrainer.task, items=(taught, replace(taught, item_id="no", reference="Never.", expected=("x",)))
    )
    full, none = retrainer.measure(np.array([[True] * 13, [False] * 13]))
    assert full.utilities in ((1.0, 0.0), (0.0, 0.0)) and none.utilities == (0.0, 0.0)
    adapter = tmp_path / "adapter"  # without the manifest, whose digest the engine would ask for
    shutil.copytree(world.trail.store.get_directory(world.adapter), adapter, ignore=lambda *_: ["manifest.json"])
    answers = greedy_answers(
        [replace(taught, prompt=QUESTIONS[0][0])],
        [adapter],
        base_path=retrainer.task.base_path,
        base_digest=retrainer.task.base_digest,
        max_new_tokens=16,
    )
    assert matches([taught], answers[0]) == [full.utilities[0]]


def test_any_cell_can_be_measured_again(world: World, report: SettleReport) -> None:
    again = recheck(world.trail, report.settlement, num_cells=5, seed=3)
    assert len(again) == 5 and all(cell.agrees for cell in again)
    assert len({(cell.coalition, cell.item) for cell in again}) == 5
    table = world.trail.get_table(report.settlement.table).to_pylist()
    for row in table:
        row["utilities"] = [value * 1.002 for value in row["utilities"]]  # likelihoods of some 1e-3
    import pyarrow

    forged = replace(report.settlement, table=world.trail.put_table(pyarrow.Table.from_pylist(table)))
    assert not any(cell.agrees for cell in recheck(world.trail, forged, num_cells=3, seed=0))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"over": "contributers"}, SettleError, "did you mean 'contributors'"),
        ({"budget": 6}, CreditError, "budget 6: 3 players need at least 7"),
        ({"others": ("sha256:" + "0" * 64,)}, SettleError, "only --over adapters"),
        ({"over": "adapters", "others": ("sha256:" + "0" * 64,)}, SettleError, "not in this log"),
        ({"over": "adapters", "utility": "exact_match"}, SettleError, "measured by likelihood or its log"),
    ],
)
def test_what_cannot_be_settled_is_refused(
    world: World, given: dict[str, Any], error: type[Exception], message: str
) -> None:
    size = world.trail.log.size
    with pytest.raises(error, match=message):
        run(world, **given)
    assert world.trail.log.size == size


def test_what_is_gone_is_named(world: World, tiny_base: Path, tmp_path: Path) -> None:
    subject = subject_of(world.trail, "facts")
    where = {"base": subject.adapter.base_digest, "dataset": "sha256:" + "0" * 64}
    settings = SettleSettings(num_workers=1)
    with pytest.raises(BenchmarkError, match="nobody"):
        asked(world.trail, "nobody", suite=world.suite, over="contributors", settings=settings)
    for number, name in enumerate(("lost", "bare")):
        _record_adapter_like(world, tmp_path / name, name=name, dataset=where["dataset"], has_settings=not number)
    with pytest.raises(SettleError, match="rows it was trained on are not in this home"):
        asked(world.trail, "lost", suite=world.suite, over="contributors", settings=settings)
    with pytest.raises(SettleError, match="the settings it was trained under are not in this home"):
        asked(world.trail, "bare", suite=world.suite, over="contributors", settings=settings)


def test_an_adapter_of_revoked_rows_is_refused_before_a_cluster_is_asked(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.trail.home, tmp_path / "home")
    trail = Trail.open(tmp_path / "home")
    settings, given = SettleSettings(budget=15), trail.entry(world.datasets["otto"])
    for name in ("otto", "operator"):
        rotate(trail, name)
    assert asked(trail, "facts", suite=world.suite, over="contributors", settings=settings).game.players
    revoke(trail, "otto", reason="laptop stolen", from_us=given.leaf.time_us)
    for over in ("contributors", "datasets", "rules", "adapters"):
        with pytest.raises(VoidRecordError, match=r"cannot settle .*\ndataset 'otto' .* of otto: .* \(laptop stolen\)"):
            asked(trail, "facts", suite=world.suite, over=over, settings=settings)


def _record_adapter_like(world: World, folder: Path, *, name: str, dataset: str, has_settings: bool) -> None:
    """Record an adapter as others hand them in: without its rows, or without its settings too."""
    record = subject_of(world.trail, "facts").entry.record
    assert record is not None and isinstance(record.body, AdapterBody)
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"name": name}))
    digest = world.trail.store.put_directory(folder, kind="adapter", meta={})
    world.trail.record(
        "adapter",
        replace(record.body, name=name, dataset=dataset),
        inputs=record.inputs,
        outputs=[Artefact("adapter", name, digest)],
        config=record.config if has_settings else None,
    )


def test_gains_of_players_add_up_and_a_prior_may_start_from_them(world: World, report: SettleReport) -> None:
    game = game_of(world, "contributors")
    alone = np.stack([game.chosen(row) for row in np.eye(3, dtype=bool)])
    gains = retrainer_of(world, game).predicted_gains(alone)
    exact = report.credit.banzhaf.cells
    together = retrainer_of(world, game).predicted_gains(np.ones((1, 13), dtype=bool))
    np.testing.assert_allclose(gains.sum(axis=0), together[0], rtol=1e-3)
    found = run(world, gradient_prior=True, precision=0)
    np.testing.assert_allclose(
        found.credit.banzhaf.cells, exact, atol=TOLERANCE * report.credit.full.max()
    )  # all were measured: nothing to guess


def test_the_command_prints_cost_first_and_a_verdict_each(
    world: World, report: SettleReport, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import typer
    from typer.testing import CliRunner

    from cluster.commands import settle as command

    monkeypatch.setenv("TRAILMARK_HOME", str(world.trail.home))
    monkeypatch.setenv("COLUMNS", "220")
    app = typer.Typer()
    command.register(app)
    words = ["facts", "--suite", str(world.suite)]
    dry = CliRunner().invoke(app, [*words, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert "3 contributors: at most 7 retrains (all 7 coalitions), 1 of them measured already" in dry.output
    assert "verdict" not in dry.output and "from nothing" not in dry.output
    few = tmp_path / "few.jsonl"
    few.write_text("".join(world.suite.read_text(encoding="utf-8").splitlines(keepends=True)[:4]))
    short = CliRunner().invoke(app, ["facts", "--suite", str(few), "--dry-run"])
    assert "4 items cannot tell any of 3 parts from nothing; 6 could" in short.output
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert done.output.index("at most 7 retrains") < done.output.index("verdict")
    for name in ("mira", "otto", "tiny", "helped", "every coalition was measured"):
        assert name in done.output
    monkeypatch.setattr("cluster.session.ray_session", None)  # told before Ray takes its seconds to start
    few.write_text("{")
    for wrong, message in (
        ([*words, "--over", "contributers"], "did you mean 'contributors'"),
        ([*words, "--budget", "3"], "budget 3: 3 players need at least 7"),
        (["nobody", *words[1:]], "nobody"),
        (["facts", "--suite", str(few)], "few.jsonl"),
    ):
        assert message in str(CliRunner().invoke(app, wrong).exception)
