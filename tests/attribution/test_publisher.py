"""Tiles and cosignatures of a log that grows: witnesses away and back, a fork, a rollback, and what a verifier says."""

import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from attribution.bodies import ApprovalBody
from attribution.log.note import open_checkpoint
from attribution.log.policy import Policy
from attribution.log.proof import parse_proof
from attribution.log.proved import VerifyError
from attribution.log.publisher import Publisher, load_outcome, policy_of
from attribution.log.tile_client import TileLog
from attribution.log.tiles import Folder, TilesError
from attribution.log.verify import Trust, Verified, verify_bytes
from attribution.log.witness import Witness
from attribution.trail import Trail
from cluster.processes import free_port
from tests.attribution.witnessed import answering

DIGEST = "sha256:" + "ab" * 32


@dataclass
class World:
    """A home whose policy asks two witnesses, which can be stopped and started."""

    trail: Trail
    witnesses: list[Witness]
    ports: list[int]
    running: ExitStack

    @property
    def home(self) -> Path:
        return self.trail.home

    def start(self, *numbers: int) -> None:
        for number in numbers:
            self.running.enter_context(answering(self.witnesses[number], self.ports[number]))

    def stop(self) -> None:
        self.running.close()

    def policy(self, quorum: str) -> str:
        listed = [
            (f"w{number}", f"http://127.0.0.1:{port}", witness.keys)
            for number, (witness, port) in enumerate(zip(self.witnesses, self.ports, strict=True))
        ]
        return policy_of(listed, self.trail.log.key, quorum)

    def ask_for(self, quorum: str) -> None:
        (self.home / "policy").write_text(self.policy(quorum))

    def record(self) -> str:
        return self.trail.record("approval", ApprovalBody(DIGEST, "approved", "")).leaf_hash

    def publisher(self) -> Publisher:
        return Publisher(Trail.open(self.home).log, home=self.home)

    def verify(self, leaf_hash: str, quorum: str = "all") -> Verified:
        trust = Trust.load(self.home / "trust.json").under(self.policy(quorum), "policy")
        return verify_bytes(json.dumps(self.trail.proof(leaf_hash)).encode(), trust=trust)


@pytest.fixture
def world(trail: Trail, tmp_path: Path) -> Iterator[World]:
    witnesses = [Witness.create(tmp_path / f"w{n}", f"witness.test/{n}", with_ml_dsa=n == 1) for n in range(2)]
    for witness in witnesses:
        witness.add_log(trail.log.key)
    with ExitStack() as running:
        world = World(trail, witnesses, [free_port(), free_port()], running)
        world.ask_for("all")
        yield world


def test_proofs_carry_cosignatures(world: World) -> None:
    world.start(0, 1)
    leaf_hash = world.record()
    with pytest.raises(VerifyError, match=r"0 of 3 cosigned; the policy asks for 2 of w0, w1 .*take its proof again"):
        world.verify(leaf_hash)
    done = world.publisher().publish()
    assert (done.size, done.num_new, done.num_cosigned, done.is_published) == (1, 1, 2, True)
    verified = world.verify(leaf_hash)
    assert "witnesses: 3 of 3 cosigned; the policy asks for 2 of w0, w1" in verified.checks
    assert set(verified.facts["witnesses"]) == {"w0", "w1", "w1-ml-dsa-44"}
    plain = verify_bytes(json.dumps(world.trail.proof(leaf_hash)).encode(), trust=Trust.load(world.home / "trust.json"))
    assert not [check for check in plain.checks if check.startswith("witnesses")], "nobody trusts a witness here"


def test_growth_needs_no_new_size_from_the_witness(world: World) -> None:
    world.start(0, 1)
    publisher = world.publisher()
    for size in range(1, 6):
        world.record()
        assert publisher.publish().num_cosigned == 2
        log = TileLog(Folder(world.home / "tiles"), world.trail.log.key)
        assert log.checkpoint.size == size
    world.record()
    assert world.publisher().publish().num_cosigned == 2, "a new process asks the witnesses where they are"


def test_a_witness_that_is_down_delays_nothing_and_catches_up(world: World) -> None:
    world.start(0)
    publisher = world.publisher()
    first = world.record()
    done = publisher.publish()
    assert (done.num_cosigned, done.is_published) == (1, False), "the policy asks for both"
    assert "does not answer" in done.witnesses[1].error
    assert not done.witnesses[1].alarm
    began = time.monotonic()
    second = world.record()
    assert time.monotonic() - began < 1, "an append knows nothing of witnesses"
    assert publisher.publish(ask_all=False).num_cosigned == 1, "a dead witness is not asked in every round"
    world.start(1)
    assert publisher.publish().is_published
    for leaf_hash in (first, second):
        assert world.verify(leaf_hash)


@contextmanager
def lying(port: int, answer: Callable[[socket.socket], None]) -> Iterator[None]:
    """A witness that reads a request and then does with the connection what it likes."""
    with socket.create_server(("127.0.0.1", port)) as listening:
        listening.settimeout(0.05)
        stop = threading.Event()

        def run() -> None:
            while not stop.is_set():
                try:
                    connection, _ = listening.accept()
                except TimeoutError:
                    continue
                with connection, suppress(OSError):
                    connection.settimeout(5)
                    connection.recv(1 << 16)
                    answer(connection)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"])
def test_a_witness_that_trickles_its_answer_holds_up_nobody(
    world: World, monkeypatch: pytest.MonkeyPatch, head: bytes
) -> None:
    """Each byte comes in time, the whole never does."""
    monkeypatch.setattr("attribution.log.publisher.ROUND_S", 0.5)
    over = threading.Event()

    def trickle(connection: socket.socket) -> None:
        connection.sendall(head)
        while not over.wait(0.05):
            connection.sendall(b"x")

    world.start(0)
    world.ask_for("any")
    leaf_hash = world.record()
    publisher = world.publisher()
    with lying(world.ports[1], trickle):
        done = publisher.publish()
        assert (done.num_cosigned, done.is_published) == (1, True)
        assert "did not finish its answer within" in done.witnesses[1].error
        world.record()
        began = time.monotonic()
        assert publisher.publish().is_published, "nobody waits for it a second time"
        assert time.monotonic() - began < 0.4
        over.set()
    assert world.verify(leaf_hash, "any")


def test_a_witness_without_an_end_is_not_read_to_it(world: World) -> None:
    sent: list[int] = []

    def pour(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while len(sent) < 1000:
            connection.sendall(b"x" * 100_000)
            sent.append(100_000)

    world.start(0)
    world.record()
    with lying(world.ports[1], pour):
        done = world.publisher().publish()
    assert done.witnesses[1].error == "answered with more than 64 KiB" and not done.is_published
    assert sum(sent) < 50_000_000, "what the system's own buffers take, and no more"


def test_a_missing_cosignature_is_fetched_while_the_log_rests(world: World) -> None:
    world.start(0)
    world.ask_for("none")
    leaf_hash = world.record()
    publisher = world.publisher()
    assert publisher.publish().is_published
    assert "witnesses: 1 of 3 cosigned; the policy asks for none" in world.verify(leaf_hash, "none").checks
    world.start(1)
    publisher.publish()
    assert world.verify(leaf_hash, "all")
    note = (world.home / "tiles" / "checkpoint").read_text()
    publisher.publish()
    assert (world.home / "tiles" / "checkpoint").read_text() == note, "what is there is not asked for again"


def test_an_older_cosigned_checkpoint_serves_the_records_it_covers(world: World) -> None:
    world.start(0, 1)
    old = world.record()
    world.publisher().publish()
    new = world.record()
    size = open_checkpoint(parse_proof(world.trail.proof(old)["proof"]).checkpoint, world.trail.log.key).size
    assert size == 1
    assert open_checkpoint(parse_proof(world.trail.proof(new)["proof"]).checkpoint, world.trail.log.key).size == 2
    (world.home / "tiles" / "checkpoint").write_text("damaged")
    assert verify_bytes(json.dumps(world.trail.proof(old)).encode(), trust=Trust.load(world.home / "trust.json"))


def fork(world: World, *, keep_tiles: bool) -> None:
    """Put the log back to 2 entries, as an operator would who wants the later ones gone."""
    shutil.rmtree(world.home / "log")
    shutil.copytree(world.home.parent / "backup", world.home / "log")
    if not keep_tiles:
        shutil.rmtree(world.home / "tiles")
    world.trail = Trail.open(world.home)


@pytest.fixture
def rewound(world: World) -> World:
    """A log of 4 cosigned entries, with a backup of its first 2."""
    world.start(0, 1)
    world.record(), world.record()
    shutil.copytree(world.home / "log", world.home.parent / "backup")
    world.record(), world.record()
    assert world.publisher().publish().num_cosigned == 2
    return world


def test_a_rollback_is_refused_and_shown(rewound: World) -> None:
    fork(rewound, keep_tiles=False)
    done = rewound.publisher().publish()
    assert not done.is_published
    for state in done.witnesses:
        assert state.alarm == (
            "rolled back: it cosigned 4 leaves, this log has 2, and shows it: 4 leaves signed by this log's key"
        )
    outcome = load_outcome(rewound.home)
    assert outcome is not None
    assert all(state.alarm for state in outcome.witnesses)


def test_a_fork_is_refused_and_shown(rewound: World) -> None:
    fork(rewound, keep_tiles=False)
    leaf_hash, *_ = [rewound.record() for _ in range(4)]
    done = rewound.publisher().publish()
    assert not done.is_published
    assert [state.alarm.partition(":")[0] for state in done.witnesses] == ["forked", "forked"]
    assert all(len(witness.refusals()) == 1 for witness in rewound.witnesses), "the witness keeps the evidence"
    with pytest.raises(VerifyError, match="0 of 3 cosigned"):
        rewound.verify(leaf_hash)


def test_a_fork_of_the_same_size_is_refused_and_shown(rewound: World) -> None:
    fork(rewound, keep_tiles=False)
    rewound.record(), rewound.record()
    done = rewound.publisher().publish()
    assert all("another tree of 4 leaves was cosigned before" in state.alarm for state in done.witnesses)


@pytest.mark.parametrize("num_more", [0, 2, 4])
def test_the_tiles_themselves_refuse_another_history(rewound: World, num_more: int) -> None:
    fork(rewound, keep_tiles=True)
    for _ in range(num_more):
        rewound.record()
    before = (rewound.home / "tiles" / "checkpoint").read_text()
    with pytest.raises(TilesError, match=r"rolled back|do not continue"):
        rewound.publisher().publish()
    assert (rewound.home / "tiles" / "checkpoint").read_text() == before


def test_following_publishes_what_comes_and_once_more_at_the_end(world: World) -> None:
    world.start(0, 1)
    stop, told = threading.Event(), []
    seen = threading.Event()

    def on_round(text: str) -> None:
        told.append(text)
        if text.startswith("1 leaves"):
            seen.set()

    publisher = world.publisher()
    thread = threading.Thread(target=publisher.follow, args=(stop,), kwargs={"interval_s": 0.02, "on_round": on_round})
    thread.start()
    world.record()
    assert seen.wait(10)
    world.record()
    stop.set()
    thread.join(10)
    assert TileLog(Folder(world.home / "tiles"), world.trail.log.key).checkpoint.size == 2
    policy = Policy.parse(world.policy("all").encode())
    assert policy.open((world.home / "tiles" / "checkpoint").read_text())


def test_one_publisher_at_a_time(world: World) -> None:
    with (
        world.publisher().exclusive(),
        pytest.raises(TilesError, match="another publisher"),
        world.publisher().exclusive(),
    ):
        pass


def test_a_policy_that_cannot_be_read_is_told(world: World) -> None:
    (world.home / "policy").write_text("quorum w9\n")
    stop, told = threading.Event(), []
    stop.set()
    world.publisher().follow(stop, interval_s=0.01, on_round=told.append)
    assert "line 1: 'w9': not defined" in told[0]


def test_the_whole_receipt_with_ed25519_cosignatures_is_small(world: World) -> None:
    """The tlog-proof part of a log of a million entries: 20 hashes, the checkpoint, two Ed25519 cosignatures."""
    world.start(0, 1)
    leaf_hash = world.record()
    world.publisher().publish()
    text = world.trail.proof(leaf_hash)["proof"]
    ed25519 = "".join(line for line in text.splitlines(keepends=True) if len(line) < 1000)
    assert len(ed25519.encode()) + 20 * 45 < 4000
