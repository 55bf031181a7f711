"""The text of an offline inclusion proof.

Source: c2sp.org/tlog-proof@v1: a header line, the leaf's index, its inclusion path from the leaf's sibling upwards,
an empty line and the checkpoint as it was signed.
"""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass

from attribution.log.merkle import HASH_BYTES, verify_inclusion
from attribution.log.note import Checkpoint, NoteError, NoteKey, decode_base64, is_decimal, open_checkpoint

HEADER = "c2sp.org/tlog-proof@v1"
MAX_PATH = 64


@dataclass(frozen=True)
class TlogProof:
    """Leaf `index` lies in the tree of the signed note `checkpoint`, by `path` (32-byte hashes, leaf side first).

    `extra` is whatever the sender added; nothing vouches for it, so Trailmark writes none and its verifier takes none.
    """

    index: int
    path: tuple[bytes, ...]
    checkpoint: str
    extra: bytes = b""

    def open(self, key: NoteKey) -> Checkpoint:
        """Return the checkpoint when the log `key` signed it; NoteError when it did not."""
        return open_checkpoint(self.checkpoint, key)

    def include(self, leaf_hash: bytes, checkpoint: Checkpoint) -> None:
        """Raise MerkleError unless the path leads from `leaf_hash` to the root of the opened `checkpoint`."""
        verify_inclusion(leaf_hash, self.index, size=checkpoint.size, root=checkpoint.root, path=self.path)


def format_proof(index: int, path: Sequence[bytes], *, checkpoint: str) -> str:
    """Return the proof's text."""
    hashes = "".join(f"{b64encode(sibling).decode()}\n" for sibling in path)
    return f"{HEADER}\nindex {index}\n{hashes}\n{checkpoint}"


def parse_proof(text: str) -> TlogProof:
    """Return the proof of a text; NoteError says what is wrong."""
    head, separator, checkpoint = text.partition("\n\n")
    lines = head.split("\n")
    if not separator or lines[0] != HEADER:
        raise NoteError(f"proof: the first line must be {HEADER}, and an empty line must stand before the checkpoint")
    body, extra = lines[1:], b""
    if body and body[0].startswith("extra "):
        extra = decode_base64(body[0].removeprefix("extra "), what="extra data")
        body = body[1:]
        if not extra:
            raise NoteError("proof: an extra line without data; leave the line out")
    if not body or not body[0].startswith("index "):
        raise NoteError("proof: no index line")
    number = body[0].removeprefix("index ")
    if not is_decimal(number):
        raise NoteError(f"proof: index {number!r} is not a plain decimal number")
    if len(body) - 1 > MAX_PATH:
        raise NoteError(f"proof: more than {MAX_PATH} hashes in the path")
    path = tuple(decode_base64(line, what="path hash") for line in body[1:])
    if any(len(sibling) != HASH_BYTES for sibling in path):
        raise NoteError("proof: a path hash is not 32 bytes")
    return TlogProof(int(number), path, checkpoint, extra)
