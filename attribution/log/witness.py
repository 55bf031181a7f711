"""A witness: cosigns the checkpoints of the logs it knows, and never two that contradict each other.

Source: c2sp.org/tlog-witness@v1.0.0; where that is silent, its editor's draft of 2026 (403 for a bad signature of a
known key, 422 for an empty tree with a root of its own, the monitoring address).

DIR/witness.key        its Ed25519 key; ml-dsa-44.key beside it when it has a second one
DIR/name               its name
DIR/logs               verifier keys of the logs it cosigns, one a line
DIR/seen/<origin hash> the newest checkpoint it cosigned of each log, with the log's signature and its own
DIR/refused/           requests that contradict what it had seen: evidence
DIR/lock               flock'ed by the one process that answers

What was seen is on disk (fsync, rename, fsync of the folder) before a cosignature leaves the process.
"""

import threading
import time
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from attribution.keys import SigningKey
from attribution.log.cosignature import ED25519_COSIGNATURE, Cosigner, CosignerKey
from attribution.log.merkle import EMPTY_ROOT, HASH_BYTES, MerkleError, verify_consistency
from attribution.log.note import (
    Checkpoint,
    NoteError,
    NoteKey,
    decode_base64,
    is_decimal,
    is_key_name,
    signature_line,
    split_note,
    verified_signatures,
)
from attribution.store import make_directory, write_atomically
from configs.errors import UserError

KEY_FILE, ML_DSA_FILE, NAME_FILE, LOGS_FILE = "witness.key", "ml-dsa-44.key", "name", "logs"
SIZE_TYPE, TEXT_TYPE = "text/x.tlog.size", "text/plain; charset=utf-8"
MAX_PROOF_LINES = 63
MAX_REFUSALS = 1000
"""Files of evidence kept; anyone may send a request, so there is a bound."""


class WitnessError(UserError):
    """A witness's folder that is missing, taken or damaged."""


@dataclass(frozen=True)
class Answer:
    """An HTTP answer: status, content type, body."""

    status: int
    content_type: str
    body: str


class _Refused(Exception):
    """A request that is not cosigned, and what is answered instead."""

    def __init__(self, status: int, reason: str, *, size: int | None = None) -> None:
        super().__init__(reason)
        self.answer = Answer(status, TEXT_TYPE, reason + "\n") if size is None else Answer(409, SIZE_TYPE, f"{size}\n")


@dataclass(frozen=True)
class Request:
    """A parsed add-checkpoint request."""

    old_size: int
    proof: tuple[bytes, ...]
    note: str
    text: str
    checkpoint: Checkpoint


class Witness:
    """One witness over its folder; safe from many threads of one process, which `serve` in witness_http.py sees to."""

    def __init__(self, directory: Path, *, now: Callable[[], float] = time.time) -> None:
        if not (directory / KEY_FILE).is_file():
            raise WitnessError(f"witness {directory}: no {KEY_FILE} here; make one with `trailmark witness create`")
        self.directory = directory
        self.name = (directory / NAME_FILE).read_text(encoding="utf-8").strip()
        self._cosigners = [Cosigner(self.name, SigningKey.load(directory / KEY_FILE))]
        if (directory / ML_DSA_FILE).is_file():
            from attribution.log.mldsa import MlDsaKey

            self._cosigners.append(Cosigner(self.name, MlDsaKey.load(directory / ML_DSA_FILE)))
        self._now = now
        self._mutex = threading.Lock()

    @staticmethod
    def create(directory: Path, name: str, *, with_ml_dsa: bool = False) -> "Witness":
        """Make keys and folder; WitnessError when there is a witness already or the name cannot be a key's."""
        if not is_key_name(name):
            raise WitnessError(f"witness name {name!r}: must be non-empty, without spaces and without '+'")
        if (directory / KEY_FILE).exists():
            raise WitnessError(f"witness {directory}: there is one already; a witness keeps its key for good")
        make_directory(directory)
        directory.chmod(0o700)
        for folder in ("seen", "refused"):
            (directory / folder).mkdir(mode=0o700, exist_ok=True)
        write_atomically(directory / NAME_FILE, f"{name}\n".encode())
        write_atomically(directory / LOGS_FILE, b"")
        if with_ml_dsa:
            from attribution.log.mldsa import MlDsaKey

            MlDsaKey.generate().save(directory / ML_DSA_FILE)
        SigningKey.generate("witness").save(directory / KEY_FILE)
        return Witness(directory)

    @property
    def keys(self) -> list[CosignerKey]:
        """The public keys it cosigns with, Ed25519 first."""
        return [cosigner.key for cosigner in self._cosigners]

    @property
    def logs(self) -> dict[str, list[NoteKey]]:
        """The keys of the logs it knows, by origin; read anew each time, so that a log can be added while it runs."""
        found: dict[str, list[NoteKey]] = {}
        for line in (self.directory / LOGS_FILE).read_text(encoding="utf-8").splitlines():
            if line.strip():
                key = NoteKey.parse(line.strip())
                found.setdefault(key.name, []).append(key)
        return found

    def add_log(self, key: NoteKey) -> None:
        """Cosign this log from now on."""
        if key in self.logs.get(key.name, []):
            return
        if any(own.public_bytes == key.public_bytes for own in self.keys):
            raise WitnessError(f"log {key.name}: its key is this witness's own; a witness must be somebody else")
        before = (self.directory / LOGS_FILE).read_text(encoding="utf-8")
        write_atomically(self.directory / LOGS_FILE, f"{before}{key}\n".encode())

    def seen(self, origin: str) -> str | None:
        """Return the newest checkpoint it cosigned of a log, with both signatures; None when it never did."""
        try:
            return self._seen_path(origin).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def seen_by_hash(self, origin_hash: str) -> str | None:
        """Return `seen` for the lower-case hex SHA-256 of an origin: what the monitoring address serves."""
        return next((self.seen(origin) for origin in self.logs if hash_of_origin(origin) == origin_hash), None)

    def refusals(self) -> list[Path]:
        """Return the files of refused requests that a known log had signed, oldest first."""
        return sorted((self.directory / "refused").iterdir())

    def add_checkpoint(self, body: bytes) -> Answer:
        """Answer an add-checkpoint request: 200 with cosignatures, or why not (400, 403, 404, 409, 422)."""
        try:
            request = parse_request(body)
            log_signatures = self._check_log(request)
            with self._mutex:
                self._check_history(request, body)
                return Answer(200, TEXT_TYPE, self._cosign(request, log_signatures))
        except _Refused as refused:
            return refused.answer

    def _check_log(self, request: Request) -> str:
        """The signature lines of the log's own keys, all of which hold."""
        keys = self.logs.get(request.checkpoint.origin)
        if keys is None:
            raise _Refused(404, f"log {request.checkpoint.origin!r} is not known here")
        try:
            _, found = verified_signatures(request.note, keys)
        except NoteError as error:
            raise _Refused(403, str(error)) from error
        if not found:
            raise _Refused(403, f"no signature by a key of log {request.checkpoint.origin!r}")
        return "".join(signature_line(key, found[str(key)]) for key in keys if str(key) in found)

    def _check_history(self, request: Request, body: bytes) -> None:
        """Refuse a checkpoint that does not continue the one seen last."""
        new, last = request.checkpoint, self._last(request.checkpoint.origin)
        if request.old_size > new.size:
            raise _Refused(400, f"old size {request.old_size} is above the checkpoint's {new.size}")
        if request.old_size != last.size:
            raise _Refused(409, "", size=last.size)
        if new.size == 0 and new.root != EMPTY_ROOT:
            raise _Refused(422, "an empty tree has one root, and it is not this one")
        if new.size == last.size and new.root != last.root:
            self._keep(request, body)
            raise _Refused(409, f"another tree of {new.size} leaves was cosigned before: the log has forked")
        if last.size == 0 and request.proof:
            raise _Refused(422, "a proof from size 0 must be empty")
        if last.size == 0:
            return
        try:
            verify_consistency(last.size, new.size, old_root=last.root, root=new.root, path=request.proof)
        except MerkleError as error:
            self._keep(request, body)
            reason = f"{error}: {new.size} leaves do not continue the {last.size} cosigned before"
            raise _Refused(422, reason) from error

    def _cosign(self, request: Request, log_signatures: str) -> str:
        """Cosign, store what was seen, and only then return the lines."""
        time_s = int(self._now())
        has_extensions = request.text != request.checkpoint.text()
        cosigners = [
            item for item in self._cosigners if not has_extensions or item.key.algorithm == ED25519_COSIGNATURE
        ]
        lines = "".join(cosigner.cosign(request.note, time_s) for cosigner in cosigners)
        kept = f"{request.text}\n{log_signatures}{lines}"
        write_atomically(self._seen_path(request.checkpoint.origin), kept.encode())
        return lines

    def _last(self, origin: str) -> Checkpoint:
        note = self.seen(origin)
        if note is None:
            return Checkpoint(origin, 0, EMPTY_ROOT)
        try:
            text, found = verified_signatures(note, self.keys)
            last = Checkpoint.parse(text, with_extensions=True)
        except NoteError as error:
            raise WitnessError(f"witness {self.directory}: {self._seen_path(origin)} is damaged: {error}") from error
        if not found or last.origin != origin:
            raise WitnessError(f"witness {self.directory}: {self._seen_path(origin)} is not what it cosigned")
        return last

    def _keep(self, request: Request, body: bytes) -> None:
        """Keep a request that contradicts what was seen, beside the checkpoint that it contradicts."""
        folder = self.directory / "refused"
        checkpoint = request.checkpoint
        name = f"{hash_of_origin(checkpoint.origin)[:16]}-{checkpoint.size}-{sha256(body).hexdigest()[:16]}"
        if len(list(folder.iterdir())) < MAX_REFUSALS and not (folder / name).exists():
            seen = (self.seen(checkpoint.origin) or "").encode()
            write_atomically(folder / name, body + b"\n# cosigned before:\n\n" + seen)

    def _seen_path(self, origin: str) -> Path:
        return self.directory / "seen" / hash_of_origin(origin)


def hash_of_origin(origin: str) -> str:
    """Return the lower-case hex SHA-256 of a log's origin."""
    return sha256(origin.encode()).hexdigest()


def format_request(old_size: int, proof: Sequence[bytes], note: str) -> bytes:
    """Return the body of an add-checkpoint request."""
    lines = "".join(f"{b64encode(node).decode()}\n" for node in proof)
    return f"old {old_size}\n{lines}\n{note}".encode()


def parse_request(body: bytes) -> Request:
    """Return an add-checkpoint request; anything but the specified form is refused with 400."""
    try:
        head, separator, note = body.decode("utf-8").partition("\n\n")
        first, *lines = head.split("\n")
        word, _, number = first.partition(" ")
        if not separator or word != "old" or not is_decimal(number):
            raise NoteError("must begin with `old SIZE`, proof lines and an empty line")
        if len(lines) > MAX_PROOF_LINES:
            raise NoteError(f"more than {MAX_PROOF_LINES} proof lines")
        proof = tuple(decode_base64(line, what="proof line") for line in lines)
        if any(len(node) != HASH_BYTES for node in proof):
            raise NoteError("a proof line is not a hash of 32 bytes")
        text, _ = split_note(note)
        return Request(int(number), proof, note, text, Checkpoint.parse(text, with_extensions=True))
    except (NoteError, UnicodeDecodeError) as error:
        raise _Refused(400, f"request: {error}") from error
