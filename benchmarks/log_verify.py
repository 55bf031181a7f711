"""How long a stranger waits to check a receipt offline, in process and as the command; and how large its file is.

    python -m benchmarks.log_verify [--quick] [--check] [--out FILE] [--receipt FILE --keys FILE]

The floor in the same run is a process that starts Python, imports `cryptography` and checks as many Ed25519 signatures
as the file holds records. Measured with the tests' golden bundle (receipt and ancestry in one file) unless another file
is given, and with the small receipt as it is in a log of a million entries: in a batch of 256, its checkpoint cosigned
by two witnesses (Ed25519) whom the reader asks for. The last line is one JSON object; `--check` exits 1 when a figure
is over its bound.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from attribution.keys import SigningKey
from attribution.log.cosignature import Cosigner
from attribution.log.merkle import Tree, hash_leaf
from attribution.log.note import Checkpoint, NoteKey, sign_checkpoint
from attribution.log.proof import format_proof
from attribution.log.publisher import policy_of
from attribution.log.trust import trust_bytes
from attribution.log.verify import Trust, verify_bytes, verify_file
from attribution.receipt_file import ReceiptFile, Signature, expanded
from attribution.receipts import receipt_commitment
from attribution.records import Leaf, from_plain, record_to_envelope, to_plain

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
MILLION = 1_000_000
BATCH = 256
MAX_RECEIPT_BYTES = 4096
TIME_S = 1_795_100_000
MAX_IN_PROCESS_MS = 50.0
MAX_COMMAND_S = 1.0
_FLOOR_PROGRAM = """
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
key = Ed25519PrivateKey.generate()
signature = key.sign(b"x" * 2000)
for _ in range({num_signatures}):
    key.public_key().verify(signature, b"x" * 2000)
"""


@dataclass(frozen=True)
class Figure:
    """One measurement: the median of `num_runs`, and what it may be at most (None: for comparison only)."""

    name: str
    value: float
    unit: str
    at_most: float | None
    num_runs: int

    @property
    def is_good(self) -> bool:
        return self.at_most is None or self.value <= self.at_most


def small_json(value: object) -> bytes:
    """Return JSON as `trailmark log receipt` and the API write a receipt."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def grown(
    value: Mapping[str, Any], *, size: int, batch: int, folder: Path, signer: SigningKey | None = None
) -> tuple[bytes, Trust]:
    """Return a receipt file as a log of `size` entries would give it, and whom its reader trusts.

    The receipt stands in a batch of `batch` receipts, whose record is signed again with `signer`; its leaf in a tree of
    `size`, whose checkpoint two witnesses cosigned; the reader asks for both. All but the receipt is made anew, so
    every path has the length that it would have there.
    """
    key = signer or SigningKey.from_seed("operator", sha256(b"operator").digest())
    log = SigningKey.from_seed("log", sha256(b"log").digest())
    named = str(value["proof"]).partition("\n\n")[2].partition("\n")[0]
    file = _signed_again(from_plain(ReceiptFile, dict(value), "receipt"), batch, key)
    leaf = hash_leaf(Leaf.from_json(expanded(to_plain(file, "receipt"))["record"]["leaf"]).to_bytes())
    place = size - size // 3
    tree = Tree(leaf if n == place else sha256(n.to_bytes(8, "big")).digest() for n in range(size))
    note = sign_checkpoint(Checkpoint(named, size, tree.root()), log)
    cosigners = [
        Cosigner(f"{named}/witness-{n}", SigningKey.from_seed("w", sha256(b"witness %d" % n).digest())) for n in (1, 2)
    ]
    note += "".join(cosigner.cosign(note, TIME_S) for cosigner in cosigners)
    proof = format_proof(place, tree.inclusion_path(place), checkpoint=note)
    listed = [(f"w{n}", "", [cosigner.key]) for n, cosigner in enumerate(cosigners, 1)]
    log_key = NoteKey(named, log.public_bytes)
    trust = {"version": 1, "log": str(log_key), "keys": {key.key_id: key.public_hex}}
    (folder / "trust.json").write_bytes(trust_bytes({**trust, "policy": policy_of(listed, log_key, "all")}))
    return small_json(to_plain(replace(file, proof=proof), "receipt")), Trust.load(folder / "trust.json")


def _signed_again(file: ReceiptFile, size: int, key: SigningKey) -> ReceiptFile:
    """The file with its receipt in a batch of `size`, the record signed with `key`."""
    entry = receipt_commitment(to_plain(file.receipt, "receipt"), b64decode(file.inner.salt))
    leaves = [hash_leaf(sha256(n.to_bytes(8, "big")).digest()) for n in range(size)]
    leaves[file.inner.index] = hash_leaf(entry)
    path = tuple(b64encode(node).decode() for node in Tree(leaves).inclusion_path(file.inner.index))
    file = replace(file, inner=replace(file.inner, size=size, path=path))
    envelope = json.loads(record_to_envelope(file.record(), key))
    signatures = tuple(Signature(**signature) for signature in envelope["signatures"])
    return replace(file, batch=replace(file.batch, signatures=signatures))


def measure_small(*, num_runs: int, size: int = MILLION) -> list[Figure]:
    """Return the figures of a small receipt in a log of a million entries."""
    with tempfile.TemporaryDirectory(prefix="log-verify-") as folder:
        value = json.loads((GOLDEN / "receipt.json").read_text())
        data, trust = grown(value, size=size, batch=BATCH, folder=Path(folder))
        seconds = _median_s(lambda: verify_bytes(data, trust=trust), num_runs)
    return [
        Figure(f"receipt file, {size} entries, 2 cosignatures", len(data), "bytes", MAX_RECEIPT_BYTES, 1),
        Figure("it verified in process", seconds * 1000, "ms", MAX_IN_PROCESS_MS, num_runs),
    ]


def measure(receipt: Path, keys: Path, *, num_runs: int) -> list[Figure]:
    """Return the figures of one file."""
    trust = Trust.load(keys)
    num_records = 1 + len(json.loads(receipt.read_text()).get("lineage", ()))
    in_process = _median_s(lambda: verify_file(receipt, trust=trust), num_runs * 5)
    command = [sys.executable, "-m", "cluster", "verify", str(receipt), "--keys", str(keys), "--json"]
    whole = _median_s(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL), num_runs)
    program = [sys.executable, "-c", _FLOOR_PROGRAM.format(num_signatures=num_records + 1)]
    floor = _median_s(lambda: subprocess.run(program, check=True), num_runs)
    return [
        Figure(f"verify in process, {num_records} records", in_process * 1000, "ms", MAX_IN_PROCESS_MS, num_runs * 5),
        Figure("trailmark verify, whole process", whole, "s", MAX_COMMAND_S, num_runs),
        Figure("floor: Python, cryptography, the signatures", floor, "s", None, num_runs),
        Figure("trailmark verify over the floor", whole / floor, "x", None, num_runs),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table and the JSON line; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="5 runs of each instead of 20")
    parser.add_argument("--check", action="store_true", help="exit 1 when a figure is over its bound")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--receipt", type=Path, default=GOLDEN / "receipt_bundle.json", help="a receipt bundle")
    parser.add_argument("--keys", type=Path, default=GOLDEN / "trust.json", help="the trust file it is checked with")
    options = parser.parse_args(arguments)
    hardware = f"{platform.machine()}, Python {platform.python_version()}"
    print(f"offline verification of {options.receipt.name} against a bare process, on {hardware}; medians")
    num_runs = 5 if options.quick else 20
    figures = measure(options.receipt, options.keys, num_runs=num_runs) + measure_small(num_runs=5 * num_runs)
    for figure in figures:
        bound = (
            "" if figure.at_most is None else f"  (at most {figure.at_most:g}){'' if figure.is_good else '  MISSED'}"
        )
        print(f"{figure.name:48} {figure.value:9.3f} {figure.unit}{bound}")
    line = json.dumps({"hardware": hardware, "figures": [asdict(figure) for figure in figures]})
    if options.out:
        options.out.write_text(line + "\n")
    print(line)
    return 1 if options.check and not all(figure.is_good for figure in figures) else 0


def _median_s(work: Callable[[], object], num_runs: int) -> float:
    work()  # warm file caches and imports
    times = []
    for _ in range(num_runs):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


if __name__ == "__main__":
    sys.exit(main())
