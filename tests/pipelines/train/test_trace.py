"""The journal survives retries and half-written lines; checkpoints and gradients refuse what is not whole."""

from pathlib import Path

import pytest
import torch

from pipelines.train.trace import AttemptStarted, GradientsTaken, Journal, JournalFollower, StepTaken


def step(number: int, loss: float) -> StepTaken:
    return StepTaken(number, 1e-3, loss, (1, 0), 12, 0.25, 0.5, 7)


def test_a_step_taken_twice_counts_once_and_the_later_wins(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    events = [AttemptStarted(1, 2, 0, 1), step(1, 3.0), step(2, 2.5), AttemptStarted(2, 2, 1, 2), step(2, 2.0)]
    for event in [*events, GradientsTaken(3, 6)]:
        journal.append(event)
    assert journal.read() == [*events, GradientsTaken(3, 6)]
    assert [(s.step, s.loss) for s in journal.steps()] == [(1, 3.0), (2, 2.0)]
    assert [a.step for a in journal.attempts()] == [0, 1]


def test_follower_waits_for_the_end_of_a_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    follower = JournalFollower(journal.path)
    assert list(follower.new_events()) == []
    journal.append(step(1, 3.0))
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole + whole[:20])
    assert list(follower.new_events()) == [step(1, 3.0)]
    assert list(follower.new_events()) == []
    journal.path.write_bytes(whole + whole)
    assert list(follower.new_events()) == [step(1, 3.0)]


def test_checkpoint_refuses_altered_bytes(tmp_path: Path) -> None:
    from pipelines.train.checkpoint import Checkpoint, CheckpointError, load, save

    tensors = {"layer.lora_A.weight": torch.arange(6.0).reshape(2, 3)}
    save(Checkpoint(5, tensors, tensors, tensors), tmp_path / "5")
    loaded = load(tmp_path / "5")
    assert loaded.step == 5
    assert torch.equal(loaded.exp_avg_sq["layer.lora_A.weight"], tensors["layer.lora_A.weight"])
    weights = tmp_path / "5" / "exp_avg.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    with pytest.raises(CheckpointError, match=r"exp_avg\.safetensors: its bytes do not match"):
        load(tmp_path / "5")
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        load(tmp_path / "6")
