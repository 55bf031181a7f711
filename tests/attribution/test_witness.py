"""The witness protocol, answer by answer; what a witness signs never contradicts itself, whoever asks and when."""

import http.client
import itertools
import os
import random
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attribution.keys import SigningKey
from attribution.log.cosignature import cosigned_at
from attribution.log.merkle import Tree, verify_consistency
from attribution.log.note import Checkpoint, sign_note, split_note, verified_signatures
from attribution.log.witness import SIZE_TYPE, TEXT_TYPE, Witness, WitnessError, format_request, hash_of_origin
from attribution.log.witness_http import MAX_BODY_BYTES, serve
from tests.attribution.witnessed import (
    LOG,
    LOG_KEY,
    NOW_S,
    ORIGIN,
    answering,
    new_witness,
    note_of,
    request_of,
    tree_of,
)

STRANGER = SigningKey.from_seed("stranger", bytes(31) + b"\x09")


@pytest.fixture
def witness(tmp_path: Path) -> Witness:
    return new_witness(tmp_path / "w1")


def seen(witness: Witness) -> tuple[int, bytes]:
    note = witness.seen(ORIGIN)
    checkpoint = Checkpoint.parse(split_note(note)[0]) if note else Checkpoint(ORIGIN, 0, b"")
    return checkpoint.size, checkpoint.root


def test_cosigns_what_continues(witness: Witness) -> None:
    for old, new in ((0, 3), (3, 3), (3, 4), (4, 11), (11, 300)):
        answer = witness.add_checkpoint(request_of(tree_of(new), old))
        assert (answer.status, answer.content_type) == (200, TEXT_TYPE), answer.body
        _, found = verified_signatures(note_of(tree_of(new)) + answer.body, witness.keys)
        assert [cosigned_at(signature) for signature in found.values()] == [NOW_S]
        assert seen(witness) == (new, tree_of(new).root())
    kept = witness.seen_by_hash(hash_of_origin(ORIGIN))
    assert kept is not None
    assert len(verified_signatures(kept, [LOG_KEY, *witness.keys])[1]) == 2, "the log's signature and its own"
    assert witness.seen_by_hash("0" * 64) is None


def test_an_empty_log_may_be_cosigned_first(witness: Witness) -> None:
    assert witness.add_checkpoint(request_of(tree_of(0))).status == 200
    assert witness.add_checkpoint(request_of(tree_of(2))).status == 200
    rooted = format_request(0, [], sign_note(Checkpoint(ORIGIN, 0, bytes(32)).text(), name=ORIGIN, signer=LOG))
    assert new_witness(witness.directory.parent / "w2").add_checkpoint(rooted).status == 422


def test_another_size_than_the_last_is_told_the_last(witness: Witness) -> None:
    witness.add_checkpoint(request_of(tree_of(5)))
    for old in (0, 4, 6):
        answer = witness.add_checkpoint(request_of(tree_of(9), old))
        assert (answer.status, answer.content_type, answer.body) == (409, SIZE_TYPE, "5\n")
    assert witness.add_checkpoint(request_of(tree_of(3), 0)).body == "5\n", "a rollback"
    assert seen(witness)[0] == 5
    assert not witness.refusals(), "an old checkpoint is no evidence: anyone may send it again"


def test_a_fork_is_refused_and_kept(witness: Witness) -> None:
    witness.add_checkpoint(request_of(tree_of(5)))
    before = seen(witness)
    same_size = witness.add_checkpoint(request_of(tree_of(5, fork_at=2), 5))
    assert (same_size.status, same_size.content_type) == (409, TEXT_TYPE)
    assert "the log has forked" in same_size.body
    larger = witness.add_checkpoint(request_of(tree_of(9, fork_at=2), 5))
    assert larger.status == 422
    assert "do not continue the 5 cosigned before" in larger.body
    assert seen(witness) == before
    evidence = [path.read_text() for path in witness.refusals()]
    assert len(evidence) == 2
    for fork, text in zip((5, 9), sorted(evidence, key=len), strict=True):
        assert note_of(tree_of(fork, fork_at=2)) in text
        assert note_of(tree_of(5)) in text, "beside what it contradicts"


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"", 400, "must begin with"),
        (b"old 0\n" + note_of(tree_of(1)).encode(), 400, "base64"),
        (b"old 00\n\n" + note_of(tree_of(1)).encode(), 400, "must begin with"),
        (b"old -1\n\n" + note_of(tree_of(1)).encode(), 400, "must begin with"),
        (b"old  0\n\n" + note_of(tree_of(1)).encode(), 400, "must begin with"),
        (b"old 0\n\xff\n\n" + note_of(tree_of(1)).encode(), 400, "utf-8"),
        (b"old 0\nAAAA\n\n" + note_of(tree_of(1)).encode(), 400, "32 bytes"),
        (b"old 0\n!\n\n" + note_of(tree_of(1)).encode(), 400, "base64"),
        (format_request(0, [bytes(32)] * 64, note_of(tree_of(1))), 400, "more than 63"),
        (format_request(0, [], "not a note"), 400, "blank line"),
        (format_request(9, [], note_of(tree_of(5))), 400, "old size 9 is above"),
        (
            format_request(0, [], sign_note("o.test\n1\n" + "A" * 43 + "=\n", name="o.test", signer=LOG)),
            404,
            "not known",
        ),
        (format_request(0, [], note_of(tree_of(1), STRANGER)), 403, "no signature by a key of log"),
        (format_request(0, [], note_of(tree_of(1)).replace("\n1\n", "\n2\n")), 403, "is wrong"),
        (format_request(0, [bytes(32)], note_of(tree_of(1))), 422, "must be empty"),
    ],
)
def test_wrong_requests(witness: Witness, body: bytes, status: int, reason: str) -> None:
    answer = witness.add_checkpoint(body)
    assert (answer.status, reason in answer.body) == (status, True), answer
    assert seen(witness)[0] == 0


def test_other_peoples_signatures_and_extension_lines(witness: Witness) -> None:
    text = Checkpoint(ORIGIN, 2, tree_of(2).root()).text() + "an extension\n"
    note = sign_note(text, name=ORIGIN, signer=LOG)
    stranger = sign_note(text, name="stranger.test", signer=STRANGER).rpartition("\n\n")[2]
    answer = witness.add_checkpoint(format_request(0, [], note + stranger))
    assert answer.status == 200
    assert verified_signatures(note + answer.body, witness.keys)[0] == text, "the extension line is cosigned too"
    assert "stranger" not in (witness.seen(ORIGIN) or "")
    assert witness.add_checkpoint(request_of(tree_of(3), 2)).status == 200


def test_two_keys_give_two_lines(tmp_path: Path) -> None:
    witness = new_witness(tmp_path / "w", with_ml_dsa=True)
    note = note_of(tree_of(3))
    answer = witness.add_checkpoint(format_request(0, [], note))
    assert len(verified_signatures(note + answer.body, witness.keys)[1]) == len(witness.keys) == 2


@given(
    requests=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20), st.sampled_from([None, 0, 3, 9])), max_size=12)
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_asked_the_cosigned_trees_are_one_history(
    tmp_path_factory: pytest.TempPathFactory, requests: list[tuple[int, int, int | None]]
) -> None:
    witness = new_witness(tmp_path_factory.mktemp("w") / "w")
    cosigned: list[Tree] = []
    for old, new, fork_at in requests:
        tree = tree_of(new, fork_at=fork_at)
        if witness.add_checkpoint(request_of(tree, old)).status == 200:
            cosigned.append(tree)
    for older, newer in itertools.pairwise(cosigned):
        assert older.size <= newer.size
        if older.size:
            path = newer.consistency_path(older.size)
            verify_consistency(older.size, newer.size, old_root=older.root(), root=newer.root(), path=path)


def test_two_requests_at_once_leave_one_history(witness: Witness) -> None:
    """Many checkpoints from the same old size: one wins, the others are told its size."""
    witness.add_checkpoint(request_of(tree_of(4)))
    bodies = [request_of(tree_of(size, fork_at=4 if size % 2 else None), 4) for size in range(5, 25)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(witness.add_checkpoint, bodies))
    won = [answer for answer in answers if answer.status == 200]
    assert len(won) == 1
    assert {answer.body for answer in answers if answer.status == 409} == {f"{seen(witness)[0]}\n"}


def test_a_damaged_memory_signs_nothing(witness: Witness) -> None:
    witness.add_checkpoint(request_of(tree_of(4)))
    path = witness.directory / "seen" / hash_of_origin(ORIGIN)
    path.write_text(path.read_text().replace("\n4\n", "\n3\n"))
    with pytest.raises(WitnessError, match="damaged"):
        witness.add_checkpoint(request_of(tree_of(5), 3))
    path.write_text(note_of(tree_of(3)))
    with pytest.raises(WitnessError, match="not what it cosigned"):
        witness.add_checkpoint(request_of(tree_of(5), 3))


def test_the_folder(tmp_path: Path) -> None:
    witness = new_witness(tmp_path / "w")
    assert (tmp_path / "w").stat().st_mode & 0o077 == 0
    with pytest.raises(WitnessError, match="keeps its key for good"):
        Witness.create(tmp_path / "w", "again.test")
    with pytest.raises(WitnessError, match="trailmark witness create"):
        Witness(tmp_path)
    with pytest.raises(WitnessError, match="without spaces"):
        Witness.create(tmp_path / "v", "a b")
    own = type(LOG_KEY)("own.test", witness.keys[0].public_bytes)
    with pytest.raises(WitnessError, match="somebody else"):
        witness.add_log(own)
    with (
        serve(witness, host="127.0.0.1", port=0),
        pytest.raises(WitnessError, match="another process"),
        serve(witness, host="127.0.0.1", port=0),
    ):
        pass


def ask(address: str, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, str, bytes]:
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=10)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    found = answer.status, answer.headers["Content-Type"], answer.read()
    connection.close()
    return found


def test_over_http(witness: Witness) -> None:
    with answering(witness) as address:
        connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=10)
        for old, new, status in ((0, 3, 200), (0, 4, 409), (3, 7, 200)):  # one connection, kept alive
            connection.request("POST", "/add-checkpoint", request_of(tree_of(new), old))
            answer = connection.getresponse()
            assert answer.status == status
            assert answer.read()
        connection.close()
        status, kind, note = ask(address, "GET", f"/{hash_of_origin(ORIGIN)}/checkpoint")
        assert (status, kind, note.decode()) == (200, TEXT_TYPE, witness.seen(ORIGIN))
        assert ask(address, "GET", f"/{'0' * 64}/checkpoint")[0] == 404
        assert ask(address, "GET", f"/{hash_of_origin(ORIGIN).upper()}/checkpoint")[0] == 404
        assert ask(address, "POST", "/elsewhere", b"x")[0] == 404
        assert f"log {ORIGIN} 7" in ask(address, "GET", "/health")[2].decode()
        long = str(MAX_BODY_BYTES + 1)
        assert ask(address, "POST", "/add-checkpoint", b"", **{"Content-Length": long})[0] == 413


def test_killed_at_any_time_it_never_contradicts_itself(tmp_path: Path) -> None:
    """A process that is killed while it answers: what it sent is on disk, and after a restart it goes on from there."""
    witness, chance, sent = new_witness(tmp_path / "w"), random.Random(7), 0
    command = [sys.executable, "-m", "cluster", "witness", "run", str(tmp_path / "w"), "--port", "0"]
    for _ in range(4):
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
        )
        assert child.stdout is not None
        address = child.stdout.readline().rpartition(" ")[2].strip()
        for number in range(stop := chance.randrange(3, 12)):
            size = seen(witness)[0]
            if number == stop - 1:  # killed with a request in flight
                connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=10)
                connection.request("POST", "/add-checkpoint", request_of(tree_of(size + 1), size))
                os.kill(child.pid, signal.SIGKILL)
                connection.close()
                break
            assert ask(address, "POST", "/add-checkpoint", request_of(tree_of(size + 1), size))[0] == 200
            assert seen(witness)[0] == size + 1
            sent = size + 1
        child.wait(timeout=10)
        child.stdout.close()
        assert seen(witness)[0] in (sent, sent + 1), "an answer that was sent is remembered"
    assert witness.add_checkpoint(request_of(tree_of(60, fork_at=1), seen(witness)[0])).status == 422
