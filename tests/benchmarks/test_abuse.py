"""The abuse table at toy size: real retrains, few of them; the floors need the real one."""

from pathlib import Path

import pytest
import torch

from benchmarks.abuse import ATTACKS, DEFAULT, HONEST, THIEVES, World, figures_of, payouts, plan_digest, upper_bound
from benchmarks.abuse_lab import LabSize, settle, train_base
from benchmarks.abuse_traffic import traffic_gains

TOY = LabSize(num_people=2, num_rows=6, num_asked=3, epochs=3, batch_rows=6, budget=7, hidden=32, base_steps=15)


def test_copies_of_a_registered_row_earn_exactly_nothing() -> None:
    torch.set_num_threads(1)
    world = World(0, TOY)
    base = train_base(TOY, seed=0)
    games = world.games()
    for attack in (attack for attack in ATTACKS if attack.name in THIEVES[2:]):
        settled = settle(base, games[attack.game], world.questions, TOY, seed=0)
        assert len(settled.players) == 3 and settled.num_coalitions == 8
        paid = payouts(settled, games[attack.game], attack.near)
        assert paid["copy1"] == 0
    # The rows do something: full and empty differ, and so do the players.
    assert settled.gain != 0 and len({player.value for player in settled.players}) > 1


def test_every_game_is_another_one_and_the_plan_says_so() -> None:
    world = World(0, TOY)
    games = world.games()
    assert {attack.game for attack in ATTACKS} | {HONEST} == set(games)
    assert len({tuple(person.rows for person in people) for people in games.values()}) == len(games)
    assert {name for attack in ATTACKS for name in attack.mine} <= {p.name for people in games.values() for p in people}
    assert plan_digest(TOY) == plan_digest(TOY) != plan_digest(LabSize())
    assert World(0, TOY).games() == games and World(1, TOY).games() != games


def test_replay_self_dealing_and_relabelling_gain_nothing(tmp_path: Path) -> None:
    found = traffic_gains(tmp_path / "traffic")
    assert found.pop("self-dealing traffic") < -50  # more than half of what was paid goes to others
    assert len(found) == 3 and set(found.values()) == {0.0}


def test_the_bound_is_students() -> None:
    assert upper_bound([1.0, 1.0, 1.0]) == 1.0
    assert upper_bound([0.0, 1.0, 2.0]) == pytest.approx(1 + 2.920 / 3**0.5)
    figures = figures_of({"thief, exact copy": [0.0, 0.0], "random-token spam": [0.0, 9.0], "~ fact": [1.0]})
    assert [(figure.floor, figure.is_good) for figure in figures] == [
        (None, True), (0.0, True), (None, True), (2.0, False), (None, True)
    ]  # fmt: skip
    assert DEFAULT.method == "lexical"
