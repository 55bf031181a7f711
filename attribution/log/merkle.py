"""The RFC 6962 Merkle tree (SHA-256): roots, inclusion and consistency proofs, and their checks.

Source: RFC 6962 section 2.1; checks after RFC 9162 sections 2.1.3.2 and 2.1.4.2 (same tree).

        root(5)                a tree of 5 leaves: [0,4) is perfect and never hashed again,
        /    \\                 [4,5) hangs on the right edge
     [0,4)   [4,5)
     /   \\
  [0,2) [2,4)
"""

from collections.abc import Iterable, Sequence
from hashlib import sha256

HASH_BYTES = 32
EMPTY_ROOT = sha256(b"").digest()


class MerkleError(ValueError):
    """A proof that does not prove what it claims, or a range outside the tree."""


def hash_leaf(data: bytes) -> bytes:
    """Return SHA-256(0x00 || data)."""
    return sha256(b"\x00" + data).digest()


def hash_node(left: bytes, right: bytes) -> bytes:
    """Return SHA-256(0x01 || left || right)."""
    return sha256(b"\x01" + left + right).digest()


def root_of_peaks(peaks: Sequence[bytes]) -> bytes:
    """Return the root of a tree given its perfect subtrees, widest first."""
    if not peaks:
        return EMPTY_ROOT
    root = peaks[-1]
    for peak in reversed(peaks[:-1]):
        root = hash_node(peak, root)
    return root


class Frontier:
    """The perfect subtrees of a growing tree: O(log n) memory, enough for the next root and no proof."""

    def __init__(self, size: int = 0, peaks: Iterable[bytes] = ()) -> None:
        self.size = size
        self._peaks = list(peaks)

    def append(self, leaf_hash: bytes) -> None:
        """Add one leaf hash; merges as many peaks as the old size has trailing one bits."""
        carry, size = leaf_hash, self.size
        while size & 1:
            carry = hash_node(self._peaks.pop(), carry)
            size >>= 1
        self._peaks.append(carry)
        self.size += 1

    def peaks(self) -> list[bytes]:
        """Return the perfect subtrees, widest first."""
        return list(self._peaks)

    def root(self) -> bytes:
        """Return the root at the present size."""
        return root_of_peaks(self._peaks)


class Tree:
    """Every perfect subtree's hash by level: append is O(1) amortised, root and proofs O(log^2 n) at any past size."""

    def __init__(self, leaf_hashes: Iterable[bytes] = ()) -> None:
        self._levels: list[list[bytes]] = [[]]
        for leaf_hash in leaf_hashes:
            self.append(leaf_hash)

    @property
    def size(self) -> int:
        """Number of leaves."""
        return len(self._levels[0])

    def append(self, leaf_hash: bytes) -> None:
        """Add one leaf hash and every perfect subtree it completes."""
        carry, level = leaf_hash, 0
        self._levels[0].append(carry)
        while len(self._levels[level]) % 2 == 0:
            carry = hash_node(self._levels[level][-2], carry)
            level += 1
            if level == len(self._levels):
                self._levels.append([])
            self._levels[level].append(carry)

    def leaf(self, index: int) -> bytes:
        """Return the hash of leaf `index`."""
        return self._levels[0][index]

    def frontier(self) -> Frontier:
        """Return a copy of the right edge, to compute a later root without touching this tree."""
        return Frontier(self.size, self._peaks(self.size))

    def root(self, size: int | None = None) -> bytes:
        """Return the root of the first `size` leaves (all by default)."""
        return root_of_peaks(self._peaks(self._checked(size)))

    def inclusion_path(self, index: int, size: int | None = None) -> list[bytes]:
        """Return the sibling hashes of leaf `index`, leaf's sibling first, in the tree of the first `size` leaves."""
        size = self._checked(size)
        if not 0 <= index < size:
            raise MerkleError(f"leaf {index} is not in a tree of {size} leaves")
        path, start, end = [], 0, size
        while end - start > 1:
            middle = start + _split(end - start)
            if index < middle:
                path.append(self._subtree(middle, end))
                end = middle
            else:
                path.append(self._subtree(start, middle))
                start = middle
        return path[::-1]

    def consistency_path(self, old_size: int, size: int | None = None) -> list[bytes]:
        """Return the hashes that prove the first `old_size` leaves to be a prefix of the first `size`."""
        size = self._checked(size)
        if not 0 < old_size <= size:
            raise MerkleError(f"no consistency proof from {old_size} to {size} leaves; the old size is 1 to {size}")
        path, start, end, whole = [], 0, size, True
        while old_size < end:
            middle = start + _split(end - start)
            if old_size <= middle:
                path.append(self._subtree(middle, end))
                end = middle
            else:
                path.append(self._subtree(start, middle))
                start, whole = middle, False
        if not whole:
            path.append(self._subtree(start, end))
        return path[::-1]

    def _checked(self, size: int | None) -> int:
        size = self.size if size is None else size
        if not 0 <= size <= self.size:
            raise MerkleError(f"size {size} is outside this tree of {self.size} leaves")
        return size

    def _peaks(self, size: int) -> list[bytes]:
        """The perfect subtrees of the first `size` leaves, widest first: one per set bit of `size`."""
        peaks, start = [], 0
        for level in range(size.bit_length() - 1, -1, -1):
            if size >> level & 1:
                peaks.append(self._levels[level][start >> level])
                start += 1 << level
        return peaks

    def _subtree(self, start: int, end: int) -> bytes:
        """The hash of leaves [start, end), where start is aligned as the RFC's recursion aligns it."""
        width = end - start
        if width & (width - 1) == 0:
            level = width.bit_length() - 1
            return self._levels[level][start >> level]
        middle = start + _split(width)
        return hash_node(self._subtree(start, middle), self._subtree(middle, end))


def root_from_inclusion(leaf_hash: bytes, index: int, size: int, path: Sequence[bytes]) -> bytes:
    """Return the root that `path` leads to from leaf `index` of `size`; MerkleError for a path of the wrong length."""
    if not 0 <= index < size:
        raise MerkleError(f"leaf {index} is not in a tree of {size} leaves")
    position, last, root, used = index, size - 1, leaf_hash, 0
    while last:
        if position & 1 or position < last:
            if used == len(path):
                raise MerkleError("inclusion path is too short")
            root = hash_node(path[used], root) if position & 1 else hash_node(root, path[used])
            used += 1
        position, last = position >> 1, last >> 1
    if used != len(path):
        raise MerkleError("inclusion path is too long")
    return root


def verify_inclusion(leaf_hash: bytes, index: int, *, size: int, root: bytes, path: Sequence[bytes]) -> None:
    """Raise MerkleError unless `path` proves the leaf at `index` to be in the tree of `size` leaves and `root`."""
    if root_from_inclusion(leaf_hash, index, size, path) != root:
        raise MerkleError("inclusion path does not lead to the root")


def verify_consistency(old_size: int, size: int, *, old_root: bytes, root: bytes, path: Sequence[bytes]) -> None:
    """Raise MerkleError unless `path` proves the tree (old_size, old_root) to be a prefix of (size, root)."""
    if not 0 < old_size <= size:
        raise MerkleError(f"no consistency proof from {old_size} to {size} leaves")
    if old_size == size:
        if path or old_root != root:
            raise MerkleError("trees of one size must have one root and an empty path")
        return
    hashes = list(path)
    if old_size & (old_size - 1) == 0:
        hashes.insert(0, old_root)
    if not hashes:
        raise MerkleError("consistency path is empty")
    position, last = old_size - 1, size - 1
    while position & 1:
        position, last = position >> 1, last >> 1
    old, new = hashes[0], hashes[0]
    for sibling in hashes[1:]:
        if last == 0:
            raise MerkleError("consistency path is too long")
        if position & 1 or position == last:
            old, new = hash_node(sibling, old), hash_node(sibling, new)
            while position and not position & 1:
                position, last = position >> 1, last >> 1
        else:
            new = hash_node(new, sibling)
        position, last = position >> 1, last >> 1
    if last or old != old_root or new != root:
        raise MerkleError("consistency path does not join the two roots")


def _split(width: int) -> int:
    """The largest power of two below `width` (width > 1)."""
    return 1 << ((width - 1).bit_length() - 1)
