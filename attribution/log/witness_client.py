"""The log's side of the witness protocol: asks a witness to cosign a checkpoint, and tells a laggard from a fork.

Source: c2sp.org/tlog-witness.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import requests

from attribution.log.cosignature import CosignerKey, cosigned_at
from attribution.log.merkle import MerkleError
from attribution.log.note import (
    Checkpoint,
    NoteError,
    NoteKey,
    is_decimal,
    open_checkpoint,
    signature_line,
    split_note,
    verified_signatures,
)
from attribution.log.witness import SIZE_TYPE, format_request, hash_of_origin

TIMEOUT_S = 5.0  # for the beginning of an answer, and again for the rest of it
MAX_ANSWER_BYTES = 1 << 16  # a cosignature by ML-DSA-44 takes 3.4 kB

Consistency = Callable[[int, int], Sequence[bytes]]
"""(old size, new size) -> the consistency path of this log's tree."""


@dataclass(frozen=True)
class Reply:
    """An answer as far as it is looked at."""

    status_code: int
    content_type: str
    text: str


@dataclass
class WitnessClient:
    """One witness by its submission prefix and its keys (an Ed25519 key, an ML-DSA-44 key, or both).

    `size` is that of the checkpoint it cosigned last, as far as is known here. `error` says why the last request got no
    cosignature; `alarm` that the witness has seen another history than this log shows: not to be retried away.
    """

    name: str
    url: str
    keys: tuple[CosignerKey, ...]
    size: int = 0
    cosigned_s: int = 0
    error: str = ""
    alarm: str = ""
    _session: requests.Session = field(default_factory=requests.Session, repr=False)

    def cosign(self, note: str, consistency: Consistency, *, log_key: NoteKey) -> str:
        """Return the cosignature lines that this witness gives a checkpoint of our log; "" when it gives none."""
        checkpoint = Checkpoint.parse(split_note(note)[0])
        try:
            for _ in range(3):  # a witness that was cosigned by somebody else meanwhile says so twice at most
                answer = self._ask(note, checkpoint, consistency)
                if answer.status_code != 409 or not self._is_behind(answer, checkpoint, log_key):
                    break
            return self._take(answer, note, checkpoint)
        except requests.Timeout:
            self.error = f"did not answer within {TIMEOUT_S:.0f} s"
        except requests.RequestException as error:
            self.error = f"does not answer ({type(error).__name__})"
        except (NoteError, MerkleError) as error:
            self.error = str(error)
        return ""

    def _fetch(self, method: str, path: str, data: bytes | None = None) -> Reply:
        """Ask and read the answer, however much and however slowly the witness would go on.

        Raises:
            NoteError: more than MAX_ANSWER_BYTES.
            requests.RequestException: no answer, or not all of it in time.
        """
        with self._session.request(method, f"{self.url}/{path}", data=data, timeout=TIMEOUT_S, stream=True) as answer:
            deadline, body = time.monotonic() + TIMEOUT_S, bytearray()
            for byte in answer.iter_content(1):  # a longer read would wait for all of it, byte by byte
                body += byte
                if len(body) > MAX_ANSWER_BYTES:
                    raise NoteError(f"answered with more than {MAX_ANSWER_BYTES >> 10} KiB")
                if time.monotonic() > deadline:
                    raise requests.Timeout
            kind = answer.headers.get("Content-Type", "")
            return Reply(answer.status_code, kind, body.decode("utf-8", "replace"))

    def know(self, size: int, cosigned_s: int) -> None:
        """Take in that it cosigned a checkpoint of this size, at a time in seconds since 1970."""
        self.size, self.cosigned_s = size, cosigned_s

    def _ask(self, note: str, checkpoint: Checkpoint, consistency: Consistency) -> Reply:
        old = min(self.size, checkpoint.size)
        path = consistency(old, checkpoint.size) if 0 < old < checkpoint.size else []
        body = format_request(old, path, note)
        return self._fetch("POST", "add-checkpoint", body)

    def _is_behind(self, answer: Reply, checkpoint: Checkpoint, log_key: NoteKey) -> bool:
        """Whether the witness named a size to prove from; a size beyond ours raises the alarm."""
        body = answer.text
        if answer.content_type != SIZE_TYPE or not body.endswith("\n") or not is_decimal(body[:-1]):
            return False
        self.size = int(body)
        if self.size > checkpoint.size:
            seen = self._shown(checkpoint.origin, log_key)
            proof = f", and shows it: {seen.size} leaves signed by this log's key" if seen else ""
            self.alarm = f"rolled back: it cosigned {self.size} leaves, this log has {checkpoint.size}{proof}"
            return False
        return True

    def _take(self, answer: Reply, note: str, checkpoint: Checkpoint) -> str:
        if answer.status_code == 200:
            lines = self._own_lines(note, answer.text)
            if lines:
                self.size, self.error, self.alarm = checkpoint.size, "", ""
                return lines
            self.error = "answered without a cosignature by its key"
            return ""
        self.error = f"{answer.status_code}: {answer.text.strip()[:200]}"
        if answer.status_code == 422 or (answer.status_code == 409 and answer.content_type != SIZE_TYPE):
            self.alarm = f"forked: it refused {checkpoint.size} leaves ({answer.text.strip()[:200]})"
        return ""

    def _own_lines(self, note: str, answer: str) -> str:
        """The lines of the answer that are cosignatures by this witness's keys, with a time."""
        _, found = verified_signatures(f"{note}{answer}", self.keys)
        found = {key: signature for key, signature in found.items() if cosigned_at(signature)}
        if found:
            self.cosigned_s = max(map(cosigned_at, found.values()))
        return "".join(signature_line(key, found[str(key)]) for key in self.keys if str(key) in found)

    def _shown(self, origin: str, log_key: NoteKey) -> Checkpoint | None:
        """The checkpoint that the witness serves to monitors, when this log's key did sign it."""
        answer = self._fetch("GET", f"{hash_of_origin(origin)}/checkpoint")
        try:
            return open_checkpoint(answer.text, log_key) if answer.status_code == 200 else None
        except NoteError:
            return None
