"""A log in memory and the requests a witness is asked with, for the tests of witnesses and what asks them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

from attribution.keys import SigningKey
from attribution.log.merkle import Tree, hash_leaf
from attribution.log.note import Checkpoint, NoteKey, sign_checkpoint
from attribution.log.witness import Witness, format_request
from attribution.log.witness_http import serve

ORIGIN = "trailmark.test/log"
LOG = SigningKey.from_seed("log", bytes(32))
LOG_KEY = NoteKey(ORIGIN, LOG.public_bytes)
NOW_S = 1_795_000_000


def tree_of(size: int, *, fork_at: int | None = None) -> Tree:
    """A tree of `size` leaves; from `fork_at` on it differs from the others."""
    return Tree(
        hash_leaf(f"{'fork ' if fork_at is not None and index >= fork_at else ''}{index}".encode())
        for index in range(size)
    )


def note_of(tree: Tree, signer: SigningKey = LOG) -> str:
    """The tree's checkpoint, signed."""
    return sign_checkpoint(Checkpoint(ORIGIN, tree.size, tree.root()), signer)


def request_of(tree: Tree, old: int = 0) -> bytes:
    """The add-checkpoint request for a tree, with the proof from `old`."""
    return format_request(old, tree.consistency_path(old) if 0 < old < tree.size else [], note_of(tree))


def new_witness(folder: Path, name: str = "witness.test/w1", *, with_ml_dsa: bool = False) -> Witness:
    """A witness that knows the log and whose clock stands still."""
    Witness.create(folder, name, with_ml_dsa=with_ml_dsa).add_log(LOG_KEY)
    return Witness(folder, now=lambda: NOW_S)


@contextmanager
def answering(witness: Witness, port: int = 0) -> Iterator[str]:
    """The witness on an address of its own, in a thread."""
    with serve(witness, host="127.0.0.1", port=port) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
