"""The tree against pymerkle, against the RFC's own recursion, and against every wrong proof we can think of."""

from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymerkle import InmemoryTree

from attribution.log.merkle import (
    EMPTY_ROOT,
    Frontier,
    MerkleError,
    Tree,
    hash_leaf,
    hash_node,
    verify_consistency,
    verify_inclusion,
)

SIZES = st.integers(1, 300)


def data(index: int) -> bytes:
    return f"entry {index}".encode()


def tree_of(size: int) -> Tree:
    return Tree(hash_leaf(data(index)) for index in range(size))


def mth(leaves: list[bytes]) -> bytes:
    """MTH(D[n]) as RFC 6962 section 2.1 writes it."""
    if not leaves:
        return sha256(b"").digest()
    if len(leaves) == 1:
        return sha256(b"\x00" + leaves[0]).digest()
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    return sha256(b"\x01" + mth(leaves[:split]) + mth(leaves[split:])).digest()


def subproof(old: int, leaves: list[bytes], whole: bool) -> list[bytes]:
    """SUBPROOF(m, D[n], b) as RFC 6962 section 2.1.2 writes it."""
    if old == len(leaves):
        return [] if whole else [mth(leaves)]
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    if old <= split:
        return [*subproof(old, leaves[:split], whole), mth(leaves[split:])]
    return [*subproof(old - split, leaves[split:], False), mth(leaves[:split])]


def test_known_roots() -> None:
    """The roots of RFC 6962's reference inputs (certificate-transparency-go testdata)."""
    inputs = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
    tree = Tree(hash_leaf(bytes.fromhex(text)) for text in inputs)
    assert Tree().root() == EMPTY_ROOT
    assert EMPTY_ROOT.hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert tree.root(1).hex() == "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d"
    assert tree.root(2).hex() == "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"
    assert tree.root(8).hex() == "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328"


def test_every_size_agrees_with_pymerkle_and_the_rfc() -> None:
    oracle, tree, frontier = InmemoryTree(algorithm="sha256"), Tree(), Frontier()
    for size in range(1, 130):
        oracle.append_entry(data(size - 1))
        tree.append(hash_leaf(data(size - 1)))
        frontier.append(hash_leaf(data(size - 1)))
        assert tree.root() == oracle.get_root() == frontier.root()
        assert tree.root() == mth([data(index) for index in range(size)])
    for size in (1, 2, 7, 64, 100, 129):
        assert tree.root(size) == oracle.get_root(size) == tree_of(size).root()


def test_inclusion_paths_hold_pymerkles_hashes() -> None:
    oracle, tree = InmemoryTree(algorithm="sha256"), tree_of(37)
    for index in range(37):
        oracle.append_entry(data(index))
    for size in (1, 2, 5, 32, 33, 37):
        for index in range(size):
            theirs = [bytes.fromhex(node) for node in oracle.prove_inclusion(index + 1, size).serialize()["path"]]
            assert sorted([tree.leaf(index), *tree.inclusion_path(index, size)]) == sorted(theirs)


@given(SIZES, st.data())
@settings(max_examples=200, deadline=None)
def test_inclusion(size: int, draw: st.DataObject) -> None:
    tree, index = tree_of(size), draw.draw(st.integers(0, size - 1))
    path, root = tree.inclusion_path(index), tree.root()
    verify_inclusion(tree.leaf(index), index, size=size, root=root, path=path)
    wrong = [
        (tree.leaf(index), index + 1, size, path),
        (hash_leaf(b"another"), index, size, path),
        (tree.leaf(index), index, size, [*path, root]),
        (tree.leaf(index), index, size, path[:-1] if path else [root]),
        (tree.leaf(index), size, size, path),
    ]
    if path:
        flipped = draw.draw(st.integers(0, len(path) - 1))
        other = bytes([path[flipped][0] ^ 1]) + path[flipped][1:]
        wrong.append((tree.leaf(index), index, size, [*path[:flipped], other, *path[flipped + 1 :]]))
    for leaf, position, width, nodes in wrong:
        with pytest.raises(MerkleError):
            verify_inclusion(leaf, position, size=width, root=root, path=nodes)


@given(SIZES, st.data())
@settings(max_examples=200, deadline=None)
def test_consistency(size: int, draw: st.DataObject) -> None:
    old_size = draw.draw(st.integers(1, size))
    tree = tree_of(size)
    path, old_root, root = tree.consistency_path(old_size), tree.root(old_size), tree.root()
    assert path == subproof(old_size, [data(index) for index in range(size)], True)
    verify_consistency(old_size, size, old_root=old_root, root=root, path=path)
    forked = Tree(hash_leaf(data(index) if index else b"rewritten") for index in range(size))
    for wrong_old, wrong_new, wrong_path in (
        (forked.root(old_size), root, path),
        (old_root, forked.root(), path),
        (old_root, root, [*path, root]),
        (old_root, root, [hash_node(node, node) for node in path] if path else [root]),
    ):
        with pytest.raises(MerkleError):
            verify_consistency(old_size, size, old_root=wrong_old, root=wrong_new, path=wrong_path)


@given(st.integers(2, 200), st.data())
@settings(max_examples=100, deadline=None)
def test_a_frontier_continues_a_tree(size: int, draw: st.DataObject) -> None:
    split = draw.draw(st.integers(0, size))
    frontier = tree_of(split).frontier()
    for index in range(split, size):
        frontier.append(hash_leaf(data(index)))
    assert (frontier.size, frontier.root()) == (size, tree_of(size).root())


@pytest.mark.parametrize(("old_size", "size"), [(0, 3), (4, 3)])
def test_no_consistency_proof_outside_the_tree(old_size: int, size: int) -> None:
    with pytest.raises(MerkleError):
        tree_of(3).consistency_path(old_size, size)
    with pytest.raises(MerkleError):
        verify_consistency(old_size, size, old_root=EMPTY_ROOT, root=EMPTY_ROOT, path=[])
