"""The abuse table at toy size: real retrains, few of them; the floors need the real one."""

from collections.abc import Sequence
from pathlib import Path

import peft
import pytest
import torch

from attribution.influence.encode import IGNORED_LABEL
from attribution.statement import Player, Settled
from benchmarks import abuse
from benchmarks.abuse import (
    ATTACKS,
    DEFAULT,
    HONEST,
    THIEVES,
    World,
    all_gains,
    figures_of,
    payouts,
    plan_digest,
    upper_bound,
)
from benchmarks.abuse_lab import (
    UTILITIES,
    LabSize,
    Person,
    encode_question,
    exact_matches,
    settle,
    train_base,
    training_run,
)
from benchmarks.abuse_traffic import traffic_gains

TOY = LabSize(num_people=2, num_rows=6, epochs=3, batch_rows=6, hidden=32, base_steps=15)


def test_copies_of_a_registered_row_earn_exactly_nothing() -> None:
    torch.set_num_threads(1)
    world = World(0, TOY)
    base = train_base(TOY, seed=0)
    games = world.games
    for attack in (attack for attack in ATTACKS if attack.name in THIEVES[2:]):
        by_utility = settle(base, games[attack.game], world.questions, TOY, seed=0)
        assert list(by_utility) == list(UTILITIES)
        for settled in by_utility.values():
            assert len(settled.players) == 3 and settled.num_coalitions == 8
            assert payouts(settled, games[attack.game], attack.near)["copy1"] == 0
    # The rows do something: full and empty differ, and so do the players.
    assert settled.gain != 0 and len({player.value for player in settled.players}) > 1


def test_exact_matches_are_greedy_answers() -> None:
    torch.manual_seed(0)
    world = World(0, TOY)
    run, _ = training_run(train_base(TOY, seed=0), world.honest, TOY, seed=0)
    adapter = run.run().weights
    peft.set_peft_model_state_dict(run.lora.model, run.lora.unflatten(adapter))
    ids = list(encode_question(world.honest[0].rows[0])[0][:4])
    for _ in range(3):
        ids.append(int(run.lora.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    other = [*ids[:5], ids[5] + 1, ids[6]]
    questions = [(found, [IGNORED_LABEL] * 4 + found[4:]) for found in (ids, other)]
    assert exact_matches(run, adapter, questions).tolist() == [1.0, 0.0]


def test_every_game_is_another_one_and_the_plan_says_so() -> None:
    world = World(0, TOY)
    games = world.games
    assert {attack.game for attack in ATTACKS} | {HONEST} == set(games)
    assert len({tuple(person.rows for person in people) for people in games.values()}) == len(games)
    assert {name for attack in ATTACKS for name in attack.mine} <= {p.name for people in games.values() for p in people}
    assert plan_digest(TOY, [0]) == plan_digest(TOY, [0]) != plan_digest(LabSize(), [0])
    assert World(0, TOY).games == games and World(1, TOY).games != games


def test_gains_of_known_values_and_settlements_kept_between_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def known(base: object, people: Sequence[Person], *_: object, seed: int) -> dict[str, Settled]:
        made.append(len(people))
        value = {"spam": 200, "poison": -300}  # beside 400 of everybody else
        players = tuple(
            Player("contributor", p.name, worth, worth - 10, worth + 10, 0, len(p.rows))
            for p in people
            for worth in (value.get(p.name, 400),)
        )
        settled = Settled("", "lab", "lab", "", "", 0, 1000, 900_000, 8, seed, "", players)
        return dict.fromkeys(UTILITIES, settled)

    monkeypatch.setattr(abuse, "settle", known)
    monkeypatch.setattr(abuse, "train_base", lambda size, *, seed: None)
    world = World(0, TOY)
    found = all_gains(world, tmp_path)
    assert len(made) == len(world.games)
    assert found["~ honest, paid in all"] == 80 and found["~ honest, people paid"] == 2
    assert found["clone x1"] == pytest.approx(100 * 800 / 1200 - 40, abs=0.001)  # 800 of 1200, and 400 of 1000 before
    assert found["~ clone x1, gain if all names could be told from zero"] == pytest.approx(found["clone x1"], abs=0.001)
    assert found["thief, exact copy"] == found["outlier poisoning"] == 0 and found["random-token spam"] == 20
    assert all_gains(World(0, TOY), tmp_path) == found
    assert len(made) == len(world.games)  # read, not made again


def test_replay_self_dealing_and_relabelling_gain_nothing(tmp_path: Path) -> None:
    found = traffic_gains(tmp_path / "traffic")
    assert found.pop("self-dealing traffic") < -50  # more than half of what was paid goes to others
    assert len(found) == 3 and set(found.values()) == {0.0}


def test_the_bound_is_students() -> None:
    assert upper_bound([1.0, 1.0, 1.0]) == 1.0
    assert upper_bound([0.0, 1.0, 2.0]) == pytest.approx(1 + 2.920 / 3**0.5)
    figures = figures_of(
        {
            "thief, exact copy": [0.0, 0.0],
            "random-token spam": [0.0, 9.0],
            "~ fact": [1.0],
            f"{abuse.SHOWN['log_likelihood']}random-token spam": [9.0, 9.0],
        }
    )
    assert [(figure.floor, figure.is_good) for figure in figures] == [
        (None, True), (0.0, True), (None, True), (2.0, False), (None, True), (None, True), (None, True)
    ]  # fmt: skip
    assert DEFAULT.method == "lexical"
