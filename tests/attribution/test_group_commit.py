"""Requests that come together are committed together; each thread gets its own outcome."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from attribution.group_commit import GroupCommit

TIMEOUT_S = 20.0


class Recorder:
    """Commits by noting the groups; the first commit waits until the test lets it go."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self.may_go = threading.Event()
        self.has_begun = threading.Event()

    def __call__(self, requests: Sequence[int]) -> list[int | Exception]:
        self.groups.append(list(requests))
        self.has_begun.set()
        assert self.may_go.wait(TIMEOUT_S)
        if 99 in requests:
            raise OSError("the disk is full")
        return [ValueError(f"{request} is odd") if request % 2 else 10 * request for request in requests]


def outcome_of(commits: GroupCommit[int, int], request: int) -> int | str:
    try:
        return commits.submit(request)
    except (ValueError, OSError) as error:
        return str(error)


def run_behind_one(commits: GroupCommit[int, int], recorder: Recorder, requests: list[int]) -> list[int | str]:
    """Submit a first request, and the others while its commit runs; return the outcomes of the others."""
    with ThreadPoolExecutor(len(requests) + 1) as pool:
        first = pool.submit(outcome_of, commits, 0)
        assert recorder.has_begun.wait(TIMEOUT_S)
        others = [pool.submit(outcome_of, commits, request) for request in requests]
        while len(commits._waiting) < len(requests):
            pass
        recorder.may_go.set()
        assert first.result(TIMEOUT_S) == 0
        return [other.result(TIMEOUT_S) for other in others]


def test_what_comes_during_a_commit_is_the_next_group_and_each_fails_alone() -> None:
    recorder = Recorder()
    commits = GroupCommit(recorder, max_requests=10)
    assert run_behind_one(commits, recorder, [1, 2, 3, 4]) == ["1 is odd", 20, "3 is odd", 40]
    assert recorder.groups[0] == [0] and sorted(recorder.groups[1]) == [1, 2, 3, 4] and len(recorder.groups) == 2


def test_a_failed_commit_fails_for_all_of_its_group_and_no_other() -> None:
    recorder = Recorder()
    commits = GroupCommit(recorder, max_requests=10)
    assert run_behind_one(commits, recorder, [2, 99, 4]) == ["the disk is full"] * 3
    assert commits.submit(6) == 60


def test_a_group_has_a_bound() -> None:
    recorder = Recorder()
    commits = GroupCommit(recorder, max_requests=2)
    assert run_behind_one(commits, recorder, [2, 4, 6, 8, 10]) == [20, 40, 60, 80, 100]
    assert max(len(group) for group in recorder.groups) == 2


def test_an_interrupted_leader_leaves_the_others_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    recorder.may_go.set()
    commits = GroupCommit(recorder, max_requests=10)

    def interrupted(*_: object) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(commits._arrived, "wait_for", interrupted)
        with pytest.raises(KeyboardInterrupt):
            commits.submit(2)
    assert recorder.groups == []
    assert commits.submit(4) == 40


def test_requests_submitted_together_share_a_commit_with_other_threads_and_each_has_its_outcome() -> None:
    recorder = Recorder()
    commits = GroupCommit(recorder, max_requests=10)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(commits.submit, 0)
        assert recorder.has_begun.wait(TIMEOUT_S)
        several = pool.submit(commits.submit_each, [2, 3, 4])
        one = pool.submit(commits.submit, 6)
        while len(commits._waiting) < 4:
            pass
        recorder.may_go.set()
        found = several.result(TIMEOUT_S)
        assert (first.result(TIMEOUT_S), one.result(TIMEOUT_S), found[0], str(found[1]), found[2]) == (
            *(0, 60, 20, "3 is odd", 40),
        )
    assert len(recorder.groups) == 2 and sorted(recorder.groups[1]) == [2, 3, 4, 6]


def test_requests_submitted_together_that_were_interrupted_are_all_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    recorder.may_go.set()
    commits = GroupCommit(recorder, max_requests=10)
    with monkeypatch.context() as patch:
        patch.setattr(commits._arrived, "wait_for", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            commits.submit_each([2, 4, 6])
    assert commits.submit(8) == 80 and recorder.groups == [[8]]


def test_many_threads_each_get_their_own_result() -> None:
    recorder = Recorder()
    recorder.may_go.set()
    commits = GroupCommit(recorder, max_requests=512)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(commits.submit, range(0, 2000, 2))) == list(range(0, 20_000, 20))
    assert sorted(request for group in recorder.groups for request in group) == list(range(0, 2000, 2))
