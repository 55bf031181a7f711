"""Flips bits of everything a reader is handed, one at a time, and counts the changes that would pass.

    python -m benchmarks.bitflip [--quick] [--only NAME] [--check] [--out FILE]

The golden receipt of the tests, cosigned by two witnesses (Ed25519 and ML-DSA-44), is what a reader holds: receipt
file, its adapter's ancestry, both in one bundle (these two with the Ed25519 witness alone), record proof, bare
tlog-proof, leaf, checkpoint with cosignatures, trust file with keys and policy; and of a small log a tile and an entry
bundle. The trust file is also taken as `trailmark up` writes it, and after keys were rotated and revoked.
Every bit of the small ones is flipped; of the long ones every bit, or with `--quick` a seeded sample. Beside the bits,
each base64 text is written again in every other way that decodes to the same bytes (its unused bits). The floor is 0
changes that pass under a policy that asks for both witnesses. Under a policy that asks for none, a changed name makes a
witness unknown, which a reader must ignore (c2sp.org/signed-note): those are counted, and each must lower the number of
witnesses that is told.

A trust file is what its reader starts from. What neither its own records nor a proof's notices can show to be wrong is
counted under `unproven`, without a floor; each such change gives the file another digest, which `trailmark verify`
prints and `--trust-digest` demands. The last line is one JSON object; `--check` exits 1 when a floor is missed.
"""

import argparse
import json
import platform
import random
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from attribution.bodies import ApprovalBody
from attribution.key_changes import revoke, rotate
from attribution.keys import SigningKey
from attribution.lineage import record_bundle
from attribution.log.cosignature import Cosigner
from attribution.log.merkle import MerkleError, Tree, hash_leaf
from attribution.log.mldsa import MlDsaKey
from attribution.log.note import Checkpoint, NoteError, NoteKey, sign_checkpoint
from attribution.log.policy import Policy
from attribution.log.proof import parse_proof
from attribution.log.proved import VerifyError
from attribution.log.publisher import policy_of
from attribution.log.tile_client import TileLog
from attribution.log.tiles import TilesError, TileWriter
from attribution.log.trust import trust_bytes
from attribution.log.verify import Trust, verify_bytes
from attribution.records import Leaf
from attribution.trail import Trail
from cluster.witnesses import prepare_witnesses
from configs.schema import WitnessSettings
from pipelines.contribute import add_contributor

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
TIME_S = 1_795_100_000
SEED = 20_261_125
BASE64_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
BASE64_END = re.compile(rb"(?<=[A-Za-z0-9+/]{3})([A-Za-z0-9+/])(={1,2})(?=[^A-Za-z0-9+/=]|$)")
REFUSALS = (VerifyError, NoteError, MerkleError, TilesError)
"""What a refusal looks like; any other error is a crash, and counts as one."""


@dataclass(frozen=True)
class Target:
    """A thing that is changed, and the reader's check of it, which raises one of REFUSALS or returns what it told."""

    name: str
    data: bytes
    check: Callable[[bytes], Any]


@dataclass(frozen=True)
class Figure:
    """How many changes of one target were tried, and how many passed or crashed; both have the floor 0."""

    name: str
    num_bytes: int
    num_bits: int
    num_base64: int
    num_passed: int
    num_crashed: int
    examples: tuple[str, ...]

    @property
    def is_good(self) -> bool:
        return self.num_passed == self.num_crashed == 0


@dataclass(frozen=True)
class Handed:
    """The golden files with two cosignatures, and whom their reader trusts."""

    receipt: dict[str, Any]
    ancestry: dict[str, Any]
    bundle: dict[str, Any]
    record: dict[str, Any]
    trust: dict[str, Any]
    short_trust: dict[str, Any]
    policy: str

    @property
    def lenient(self) -> str:
        """The policy without its quorum."""
        return re.sub(r"group .*\nquorum .*\n", "quorum none\n", self.policy)


def handed_out() -> Handed:
    """Return the golden receipt, record proof and trust file, their checkpoint cosigned by two witnesses."""
    trust = json.loads((GOLDEN / "trust.json").read_text())
    cosigners = [
        Cosigner("witness.example/w1", SigningKey.from_seed("w1", sha256(b"witness 1").digest())),
        Cosigner("witness.example/w2", MlDsaKey.from_seed(sha256(b"witness 2").digest())),
    ]
    note = (GOLDEN / "checkpoint").read_text()
    lines = [cosigner.cosign(note, TIME_S) for cosigner in cosigners]
    names = ("receipt.json", "ancestry.json", "receipt_bundle.json", "record_proof.json")
    receipt, ancestry, bundle, record = (json.loads((GOLDEN / name).read_text()) for name in names)
    for item in (receipt, record):
        item["proof"] += "".join(lines)
    for item in (*ancestry["lineage"], bundle["record"], *bundle["lineage"]):  # the same lines again in each proof
        item["proof"] += lines[0]
    listed = [(f"w{number}", "", [cosigner.key]) for number, cosigner in enumerate(cosigners, 1)]
    log = NoteKey.parse(trust["log"])
    policy, short = policy_of(listed, log, "all"), {**trust, "policy": policy_of(listed[:1], log, "all")}
    return Handed(receipt, ancestry, bundle, record, {**trust, "policy": policy}, short, policy)


def targets(handed: Handed, folder: Path) -> list[Target]:
    """Return everything that a reader is handed or trusts."""
    trust, short = _trust(handed.trust, folder), _trust(handed.short_trust, folder)
    policy, proof = Policy.parse(handed.policy.encode()), handed.record["proof"]
    receipt, ancestry = _compact(handed.receipt), _compact(handed.ancestry)
    leaf, checkpoint = Leaf.from_json(handed.record["leaf"]).to_bytes(), proof.partition("\n\n")[2]

    def open_proof(data: bytes, leaf_bytes: bytes) -> None:
        parsed = parse_proof(_text(data))
        opened, _ = policy.open(parsed.checkpoint)
        parsed.include(hash_leaf(leaf_bytes), opened)
        if parsed.extra:
            raise NoteError("an extra line, for which nothing vouches")

    def trusted(data: bytes) -> None:
        path = folder / "changed.json"
        path.write_bytes(data)
        verify_bytes(_compact(handed.record), trust=Trust.load(path))

    return [
        Target("receipt file", receipt, lambda data: verify_bytes(data, trust=trust)),
        Target("ancestry", ancestry, lambda data: verify_bytes(data, trust=short)),
        Target("receipt bundle", _compact(handed.bundle), lambda data: verify_bytes(data, trust=short)),
        Target("record proof", _compact(handed.record), lambda data: verify_bytes(data, trust=trust)),
        Target("tlog-proof", proof.encode(), lambda data: open_proof(data, leaf)),
        Target("leaf", leaf, lambda data: open_proof(proof.encode(), data)),
        Target("checkpoint and cosignatures", checkpoint.encode(), lambda data: policy.open(_text(data))),
        Target("trust file: keys and policy", trust_bytes(handed.trust), trusted),
        *_tile_targets(folder / "tiles"),
    ]


@dataclass(frozen=True)
class Kept:
    """trust.json of a home, and proofs of one record, before and after keys were rotated and revoked."""

    written: bytes
    changed: bytes
    older: bytes
    newer: bytes

    @property
    def without_records(self) -> bytes:
        """The changed file as versions before this wrote it: no signed record beside what it repeats."""
        value = json.loads(self.changed)
        for entry in (*value["former"], *value["revoked"]):
            del entry["record"]
        return trust_bytes(value)


def kept(home: Path) -> Kept:
    """Make a home as `trailmark up` does, and change the keys of its log, its operator and a contributor."""
    trail, file = Trail.open(home), home / "trust.json"
    add_contributor(trail, "Amara")
    entry = trail.record("approval", ApprovalBody("sha256:" + "ab" * 32, "approved", ""))
    prepare_witnesses(home, WitnessSettings())
    written, older = file.read_bytes(), _compact(record_bundle(trail, entry.leaf_hash))
    first = {name: trail.keys.get(name).key_id for name in ("operator", "log")}
    for name in first:
        rotate(trail, name)
    revoke(trail, "operator", reason="left on a train", key_id=first["operator"])
    revoke(trail, "Amara", reason="lost")
    return Kept(written, file.read_bytes(), older, _compact(record_bundle(trail, entry.leaf_hash)))


def kept_targets(found: Kept, folder: Path) -> tuple[list[Target], list[Target]]:
    """Return the trust files whose every change must be refused, and those of which a reader cannot see all."""

    def check(proof: bytes, digest: str | None = None) -> Callable[[bytes], None]:
        def verify(data: bytes) -> None:
            path = folder / "kept.json"
            path.write_bytes(data)
            verify_bytes(proof, trust=Trust.load(path, digest=digest))

        return verify

    pinned = sha256(found.without_records).hexdigest()
    return [
        Target("trust.json of `up`", found.written, check(found.older)),
        Target("trust.json, keys changed", found.changed, check(found.newer)),
        Target("trust.json, digest demanded", found.without_records, check(found.older, pinned)),
    ], [
        Target("trust.json, keys changed, older proof", found.changed, check(found.older)),
        Target("trust.json of old form", found.without_records, check(found.newer)),
        Target("trust.json of old form, older proof", found.without_records, check(found.older)),
    ]


def _tile_targets(root: Path) -> list[Target]:
    """A tile and an entry bundle of a small log of their own, each read for every entry it holds."""
    signer, writer = SigningKey.from_seed("log", bytes(32)), TileWriter(root)
    key, entries = NoteKey("tiles.example/log", signer.public_bytes), [b"entry %d" % number for number in range(20)]
    writer.extend(entries)
    tree = Tree(map(hash_leaf, entries))
    writer.publish(sign_checkpoint(Checkpoint(key.name, len(entries), tree.root()), signer))

    def target(name: str, path: Path) -> Target:
        good = path.read_bytes()

        def check(data: bytes) -> None:
            path.write_bytes(data)
            try:
                log = TileLog(writer_source, key)
                for index in range(len(entries)):
                    log.entry(index)
            finally:
                path.write_bytes(good)

        return Target(name, good, check)

    from attribution.log.tiles import Folder

    writer_source = Folder(root)
    return [
        target("tile", root / "tile" / "0" / "000.p" / "20"),
        target("entry bundle", root / "tile" / "entries" / "000.p" / "20"),
    ]


def measure(target: Target, *, max_bits: int | None) -> Figure:
    """Try every bit of a target, or a seeded sample of `max_bits`, and every other form of its base64."""
    target.check(target.data)  # unchanged it must pass, or nothing is shown
    num_all = 8 * len(target.data)
    is_sample = max_bits is not None and num_all > max_bits
    places = sorted(random.Random(SEED).sample(range(num_all), max_bits)) if is_sample and max_bits else range(num_all)
    forms = list(_other_base64(target.data))
    if max_bits is not None and len(forms) > max_bits:
        forms = random.Random(SEED).sample(forms, max_bits)
    passed: list[str] = []
    crashed: list[str] = []
    for place in places:
        _try(target, _flipped(target.data, place), f"bit {place}", passed=passed, crashed=crashed)
    for number, changed in enumerate(forms):
        _try(target, changed, f"base64 form {number}", passed=passed, crashed=crashed)
    examples = tuple((passed + crashed)[:5])
    return Figure(target.name, len(target.data), len(places), len(forms), len(passed), len(crashed), examples)


def _try(target: Target, data: bytes, what: str, *, passed: list[str], crashed: list[str]) -> None:
    try:
        target.check(data)
        passed.append(what)
    except REFUSALS:
        return
    except Exception as error:  # whatever it is: a reader that falls over is counted
        crashed.append(f"{what}: {type(error).__name__}: {error}")


def measure_lenient(handed: Handed, *, max_bits: int | None) -> Figure:
    """Flip every bit of the cosigned checkpoint under a policy that asks for no witness.

    What passes must tell fewer witnesses than the unchanged one; changes that pass and tell as many are the figure.
    """
    policy = Policy.parse(handed.lenient.encode())
    note = handed.record["proof"].partition("\n\n")[2].encode()
    full = len(policy.open(note.decode())[1].times)

    def check(data: bytes) -> None:
        if len(policy.open(_text(data))[1].times) < full:
            raise NoteError("a witness is missing")

    return measure(Target("no quorum: witnesses told", note, check), max_bits=max_bits)


def _flipped(data: bytes, place: int) -> bytes:
    changed = bytearray(data)
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


def _other_base64(data: bytes) -> Iterator[bytes]:
    """Every text that differs from `data` in the unused bits of one base64 text alone."""
    for found in BASE64_END.finditer(data):
        digit, num_unused = BASE64_DIGITS.index(found[1].decode()), 2 * len(found[2])
        for stray in range(1, 1 << num_unused):
            yield data[: found.start()] + BASE64_DIGITS[digit ^ stray].encode() + data[found.start() + 1 :]


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise NoteError("not UTF-8") from error


def _compact(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def _trust(value: dict[str, Any], folder: Path) -> Trust:
    path = folder / "trust.json"
    path.write_bytes(trust_bytes(value))
    return Trust.load(path)


def _shown(figure: Figure, *, has_floor: bool) -> Figure:
    """Print a figure as soon as it is known: over every bit the whole takes an hour."""
    tried = f"{figure.num_bits} of {8 * figure.num_bytes} bits, {figure.num_base64} base64 forms"
    verdict = "  no floor" if not has_floor else "" if figure.is_good else f"  MISSED {figure.examples}"
    told = f"{figure.num_passed} passed, {figure.num_crashed} crashed{verdict}"
    print(f"{figure.name:38} {tried:44} {told}", flush=True)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table and the JSON line; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="5,000 bits of each instead of all")
    parser.add_argument("--max-bits", type=int, help="this many bits of each instead of all")
    parser.add_argument("--only", default="", help="those whose name begins so")
    parser.add_argument("--check", action="store_true", help="exit 1 when a change passes or crashes the reader")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args(arguments)
    max_bits = options.max_bits or (5000 if options.quick else None)
    hardware = f"{platform.machine()}, Python {platform.python_version()}"
    print(f"single-bit changes against Trailmark's verifier, both witnesses asked for, on {hardware}; floor 0 and 0")
    handed = handed_out()
    with tempfile.TemporaryDirectory() as folder:
        refused, unproven_targets = kept_targets(kept(Path(folder) / "home"), Path(folder))
        figures, unproven = (
            [
                _shown(measure(target, max_bits=max_bits), has_floor=has_floor)
                for target in chosen
                if target.name.startswith(options.only)
            ]
            for chosen, has_floor in (([*targets(handed, Path(folder)), *refused], True), (unproven_targets, False))
        )
    if not options.only:
        figures.append(_shown(measure_lenient(handed, max_bits=max_bits), has_floor=True))
    told = {"figures": [asdict(item) for item in figures], "unproven": [asdict(item) for item in unproven]}
    line = json.dumps({"hardware": hardware, "seed": SEED, "floor": 0, **told})
    if options.out:
        options.out.write_text(line + "\n")
    print(line)
    is_good = all(figure.is_good for figure in figures) and not any(figure.num_crashed for figure in unproven)
    return 1 if options.check and not is_good else 0


if __name__ == "__main__":
    sys.exit(main())
