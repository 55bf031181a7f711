"""Publishes a log: static tiles, and the checkpoint over them with the witnesses' cosignatures.

It follows the log from outside and takes no part in an append: a witness that is down, or a publisher that is, delays
cosignatures and nothing else. HOME/tiles is what it writes; HOME/policy says which witnesses it asks and how many
cosignatures a checkpoint needs before the tiles show it; HOME/views/witnesses.json says how the last round went.
"""

import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from attribution.log.cosignature import CosignerKey
from attribution.log.note import NoteError, NoteKey, parse_signature_line, split_note
from attribution.log.policy import Policy, with_log_key
from attribution.log.published import TILES, published_note
from attribution.log.sequencer import Log
from attribution.log.tiles import TilesError, TileWriter
from attribution.log.witness import KEY_FILE, Witness
from attribution.log.witness_client import WitnessClient
from attribution.store import make_directory, write_atomically
from configs.errors import UserError

POLICY_FILE, STATE_FILE = "policy", "witnesses.json"
WITNESSES = "witnesses"
"""The folder below a home where the witnesses lie that it runs itself."""
RETRY_S, MAX_RETRY_S = 1.0, 30.0
ROUND_S = 15.0  # after which a round goes on without a witness that is still answering
BATCH = 65_536
"""Leaves read from the log at once."""
RoundReport = Callable[[str], None]


@dataclass(frozen=True)
class WitnessState:
    """How a witness stands: leaves it cosigned last, when, and what is wrong ("" when nothing is)."""

    name: str
    url: str
    size: int
    cosigned_s: int
    error: str
    alarm: str


@dataclass(frozen=True)
class Outcome:
    """How the last round went: why nothing could be published ("" when it could), and each witness."""

    error: str
    witnesses: tuple[WitnessState, ...]


@dataclass(frozen=True)
class Round:
    """What one round of publishing did."""

    size: int
    num_new: int
    witnesses: tuple[WitnessState, ...]
    is_published: bool

    @property
    def num_cosigned(self) -> int:
        """Witnesses that cosigned this size."""
        return sum(not state.error and state.size == self.size for state in self.witnesses)

    def __str__(self) -> str:
        shown = "" if self.is_published else "; too few for HOME/policy, so the tiles still show the checkpoint before"
        asked = f", {self.num_cosigned} of {len(self.witnesses)} witnesses cosigned" if self.witnesses else ""
        return f"{self.size} leaves, {self.num_new} of them new{asked}{shown}"


class Publisher:
    """Publishes one home's log into a folder; one publisher per folder (see `exclusive`)."""

    def __init__(self, log: Log, *, home: Path, out: Path | None = None, cosigned: str = "") -> None:
        """`cosigned` is a checkpoint whose cosignatures are kept if it is still the newest."""
        self._log = log
        self._cosigned_before = cosigned
        self._checked = ""  # the text of the checkpoint that the tiles were last found to lead to
        self._home = home
        self.out = out or home / TILES
        self._writer: TileWriter | None = None
        self._clients: list[WitnessClient] = []
        self._retry_at: dict[str, float] = {}
        self._failures: dict[str, int] = {}
        self._asked: dict[str, Future[str]] = {}  # by URL; one that is not done is asked nothing more

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Be the one publisher into this folder. TilesError when there is another."""
        make_directory(self.out)
        descriptor = os.open(self.out / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError as error:
            raise TilesError(f"tiles {self.out}: another publisher is at work; `trailmark up` starts one") from error
        finally:
            os.close(descriptor)

    def shown(self) -> str:
        """Return the checkpoint that the folder shows; "" when there is none."""
        try:
            return (self.out / "checkpoint").read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""

    def publish(self, *, ask_all: bool = True) -> Round:
        """Write the tiles of what the log has, ask the witnesses, and publish the checkpoint.

        `ask_all=False` leaves out witnesses that did not answer a moment ago.

        Raises:
            TilesError, LogError: tiles and log contradict each other; nothing is published.
        """
        self._log.refresh()
        policy = self._policy()
        writer = self._writer or TileWriter(self.out)
        self._writer = None  # taken back below, once it is known to agree with the log
        note, size, before = self._log.checkpoint, self._log.size, writer.size
        if size < before:
            raise TilesError(
                f"tiles {self.out}: show {before} leaves, the log has {size}: it was rolled back; restore it"
            )
        for start in range(before, size, BATCH):
            writer.extend(self._log.leaves(start, min(start + BATCH, size)))
        if split_note(note)[0] != self._checked:
            writer.check(note)  # before anybody is asked: a fork is not put to the witnesses as if it were one history
            self._checked = split_note(note)[0]
        note = _with_signatures(note, writer.note or self._cosigned_before)
        if policy is not None:
            note = self._cosigned(note, policy, ask_all=ask_all)
        is_published = policy is None or policy.is_met_by(policy.cosigned(note).times)
        if is_published and note != writer.note:
            writer.publish(note)
        self._writer = writer
        states = tuple(_state(client) for client in self._clients)
        save_outcome(self._home, Outcome("", states))
        return Round(size, size - before, states, is_published)

    def follow(self, stop: threading.Event, *, interval_s: float, on_round: RoundReport) -> None:
        """Publish whenever the log has grown or a cosignature is missing, until `stop`; then once more."""
        last = ""
        while True:
            is_last = stop.wait(interval_s if last else 0)
            try:
                done = self.publish(ask_all=is_last or not last)
                told = f"{done}" + "".join(
                    f"; {s.name}: {s.alarm or s.error}" for s in done.witnesses if s.error or s.alarm
                )
            except (UserError, NoteError, OSError) as error:
                told = str(error)
                save_outcome(self._home, Outcome(told, tuple(_state(client) for client in self._clients)))
            if told != last:
                on_round(told)
            last = told
            if is_last:
                return

    def _policy(self) -> Policy | None:
        """The operator's policy, read anew each round; its witnesses keep what is known of them."""
        path = self._home / POLICY_FILE
        if not path.is_file():
            self._clients = []
            return None
        policy = Policy.load(path)
        known = {(client.url, client.keys): client for client in self._clients}
        wanted: dict[str, list[int]] = {}
        for number, witness in enumerate(policy.witnesses):
            if witness.url is not None:
                wanted.setdefault(witness.url.rstrip("/"), []).append(number)
        self._clients = []
        for url, numbers in wanted.items():
            keys = tuple(policy.witnesses[number].key for number in numbers)
            name = policy.witnesses[numbers[0]].name
            self._clients.append(known.get((url, keys)) or self._client(name, url, keys))
        return policy

    def _client(self, name: str, url: str, keys: tuple[CosignerKey, ...]) -> WitnessClient:
        """A witness, with what the round before this process knew of it."""
        client, outcome = WitnessClient(name, url, keys), load_outcome(self._home)
        for state in outcome.witnesses if outcome is not None else ():
            if state.url == url:
                client.know(state.size, state.cosigned_s)
        return client

    def _cosigned(self, note: str, policy: Policy, *, ask_all: bool) -> str:
        """The checkpoint with the cosignatures that it had and those that are to be had now."""
        have = policy.cosigned(note).times
        names = {str(witness.key): witness.name for witness in policy.witnesses}
        missing = []
        for client in self._clients:
            times = [have.get(names[str(key)]) for key in client.keys]
            if None in times:
                missing.append(client)
            else:
                client.know(self._log.size, max(time_s for time_s in times if time_s is not None))
        missing = [client for client in missing if client.url not in self._asked or self._asked[client.url].done()]
        due = [client for client in missing if ask_all or self._retry_at.get(client.url, 0.0) <= time.monotonic()]
        if not due:
            return note
        for client in due:
            self._asked[client.url] = _begun(client.cosign, note, self._consistency, log_key=self._log.key)
        wait([self._asked[client.url] for client in due], timeout=ROUND_S)
        added = "".join(future.result() for client in due if (future := self._asked[client.url]).done())
        for client in due:
            if not self._asked[client.url].done():
                client.error = f"did not finish its answer within {ROUND_S:.0f} s"
            self._note_outcome(client)
        return _with_signatures(note, f"{split_note(note)[0]}\n{added}") if added else note

    def _consistency(self, old: int, new: int) -> Sequence[bytes]:
        return self._log.consistency_path(old, new)

    def _note_outcome(self, client: WitnessClient) -> None:
        """A witness that did not answer is asked again after 1, 2, 4, ... and at most 30 seconds."""
        failures = self._failures.get(client.url, 0) + 1 if client.error or client.alarm else 0
        self._failures[client.url] = failures
        pause_s = min(RETRY_S * 2 ** (failures - 1), MAX_RETRY_S) if failures else 0.0
        self._retry_at[client.url] = time.monotonic() + pause_s


def follow_log_key(home: Path, key: NoteKey) -> None:
    """Tell HOME/policy and the witnesses in this home of a log's new key, beside the one before. Safe to repeat."""
    path = home / POLICY_FILE
    if path.is_file():
        before = path.read_text(encoding="utf-8", errors="surrogateescape")
        after = with_log_key(before, key)
        if after != before:
            write_atomically(path, after.encode(errors="surrogateescape"))
    for directory in sorted((home / WITNESSES).glob("*")):
        if (directory / KEY_FILE).is_file():
            Witness(directory).add_log(key)


def renew_published(log: Log, home: Path, *, timeout_s: float = 15.0) -> str:
    """Get the log's newest checkpoint published and cosigned at once; return how that went, "" when none ever was.

    A publisher at work does it, and is waited for; else it is done here.
    """
    publisher = Publisher(log, home=home)
    if not publisher.shown():
        return ""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with publisher.exclusive():
                return str(publisher.publish()) + _troubles(load_outcome(home))
        except TilesError as error:
            problem = str(error)
        shown = published_note(publisher.out, log)  # under the log's present key
        if shown is not None and shown[1] == log.size:
            return f"{log.size} leaves published" + _troubles(load_outcome(home))
        if time.monotonic() > deadline:
            return f"{problem}; it has not published the new key's checkpoint yet{_troubles(load_outcome(home))}"
        time.sleep(0.05)


def _troubles(outcome: Outcome | None) -> str:
    """What is wrong with each witness, in words."""
    states = outcome.witnesses if outcome is not None else ()
    return "".join(f"; {state.name}: {state.alarm or state.error}" for state in states if state.alarm or state.error)


def save_outcome(home: Path, outcome: Outcome) -> None:
    """Write down how a round went, when that has changed."""
    data = json.dumps(asdict(outcome), indent=1).encode() + b"\n"
    path = home / "views" / STATE_FILE
    if not path.exists() or path.read_bytes() != data:
        write_atomically(path, data)


def load_outcome(home: Path) -> Outcome | None:
    """Return how the last round went, None when there was none."""
    try:
        value = json.loads((home / "views" / STATE_FILE).read_text(encoding="utf-8"))
        return Outcome(value["error"], tuple(WitnessState(**item) for item in value["witnesses"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def policy_of(witnesses: Sequence[tuple[str, str, Sequence[object]]], log: NoteKey, quorum: str) -> str:
    """Return the text of a policy: witnesses as (name, url, keys), a quorum of `none`, `any`, `all` or a number.

    A witness's second key, ML-DSA-44, is a witness of its own in a policy and no member of the quorum.
    """
    lines = [f"log {log}"]
    for name, url, keys in witnesses:
        for key, suffix in zip(keys, ("", "-ml-dsa-44"), strict=False):
            lines.append(f"witness {name}{suffix} {key} {url}".rstrip())
    if quorum == "none":
        return "\n".join([*lines, "quorum none"]) + "\n"
    names = " ".join(name for name, _, _ in witnesses)
    return "\n".join([*lines, f"group witnesses {quorum} {names}", "quorum witnesses"]) + "\n"


def _begun(ask: Callable[..., str], *args: object, **options: object) -> "Future[str]":
    """Ask in a thread that nobody has to wait for: a witness may trickle its answer for as long as it likes."""
    future: Future[str] = Future()

    def run() -> None:
        try:
            future.set_result(ask(*args, **options))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _with_signatures(note: str, other: str) -> str:
    """The note with those signature lines of another note of the same text that it lacks."""
    if not other:
        return note
    text, lines = split_note(note)
    other_text, other_lines = split_note(other)
    if other_text != text:
        return note
    signed = {_signer(line) for line in lines}
    return note + "".join(f"{line}\n" for line in other_lines if _signer(line) not in signed)


def _signer(line: str) -> tuple[str, bytes]:
    """The name and key id of a signature line."""
    name, signature = parse_signature_line(line)
    return name, signature[:4]


def _state(client: WitnessClient) -> WitnessState:
    return WitnessState(client.name, client.url, client.size, client.cosigned_s, client.error, client.alarm)
