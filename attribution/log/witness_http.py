"""The witness protocol over HTTP: POST /add-checkpoint, GET /<origin hash>/checkpoint, and GET / for people.

Source: c2sp.org/tlog-witness. Plain HTTP/1.1 with keep-alive on an address of the operator's choice; TLS and limits per
client are a reverse proxy's work.
"""

import fcntl
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from attribution.log.witness import TEXT_TYPE, Answer, Witness, WitnessError

MAX_BODY_BYTES = 256 << 10
"""64 ML-DSA-44 signatures fit; a checkpoint with two Ed25519 signatures has half a kilobyte."""
SOCKET_TIMEOUT_S = 30.0
MONITORING = re.compile(r"/([0-9a-f]{64})/checkpoint")
logger = logging.getLogger(__name__)


@contextmanager
def serve(witness: Witness, *, host: str, port: int) -> Iterator[ThreadingHTTPServer]:
    """Yield a server that is bound (port 0: any) and not yet answering; hold the witness's folder meanwhile.

    Raises:
        WitnessError: another process answers for this folder, or the address cannot be bound.
    """
    descriptor = os.open(witness.directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with _bound(witness, host, port) as server:
            yield server
    except BlockingIOError as error:
        raise WitnessError(
            f"witness {witness.directory}: another process answers for it; stop that one first"
        ) from error
    finally:
        os.close(descriptor)


def _bound(witness: Witness, host: str, port: int) -> ThreadingHTTPServer:
    class Handler(_Handler):
        answers_for = witness

    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise WitnessError(f"witness {witness.name}: cannot listen on {host}:{port}: {error.strerror}") from error
    server.daemon_threads = True
    return server


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    answers_for: Witness
    protocol_version = "HTTP/1.1"
    timeout = SOCKET_TIMEOUT_S

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()) or int(length) > MAX_BODY_BYTES:
            self.close_connection = True  # its body is still in the pipe
            self._send(
                Answer(413 if length else 411, TEXT_TYPE, f"give a Content-Length of at most {MAX_BODY_BYTES}\n")
            )
            return
        body = self.rfile.read(int(length))
        if self.path != "/add-checkpoint":
            self._send(Answer(404, TEXT_TYPE, "not found; POST /add-checkpoint\n"))
            return
        try:
            answer = self.answers_for.add_checkpoint(body)
        except (WitnessError, OSError) as error:
            logger.error("%s", error)
            answer = Answer(500, TEXT_TYPE, "this witness cannot cosign; its log says why\n")
        self._send(answer)

    def do_GET(self) -> None:
        witness, found = self.answers_for, MONITORING.fullmatch(self.path)
        if self.path in ("/", "/health"):
            self._send(Answer(200, TEXT_TYPE, describe(witness)))
            return
        note = witness.seen_by_hash(found[1]) if found else None
        self._send(Answer(404, TEXT_TYPE, "not found\n") if note is None else Answer(200, TEXT_TYPE, note))

    def _send(self, answer: Answer) -> None:
        data = answer.body.encode()
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Say refusals alone: what holds is said once a second for years."""
        if len(args) > 1 and str(args[1]) not in ("200", "409"):
            logger.info("%s: %s", self.address_string(), format % args)


def describe(witness: Witness) -> str:
    """Return the witness's name, keys and logs as lines of text."""
    lines = [f"witness {witness.name}", *(f"key {key}" for key in witness.keys)]
    for origin in sorted(witness.logs):
        note = witness.seen(origin)
        lines.append(f"log {origin} {note.split(chr(10))[1] if note else 0}")
    lines.append(f"refused {len(witness.refusals())}")
    return "\n".join(lines) + "\n"
