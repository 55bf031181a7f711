"""How long a stranger waits to check a receipt offline: in process, and as the command.

    python -m benchmarks.log_verify [--quick] [--check] [--out FILE] [--receipt FILE --keys FILE]

The floor in the same run is a process that starts Python, imports `cryptography` and checks as many Ed25519 signatures
as the receipt holds records. The receipt is the golden one of the tests unless another is given. The last line is one
JSON object; `--check` exits 1 when a figure is over its bound.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from attribution.log.verify import Trust, verify_file

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
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


def measure(receipt: Path, keys: Path, *, num_runs: int) -> list[Figure]:
    """Return the figures of one receipt."""
    trust = Trust.load(keys)
    num_records = 1 + len(json.loads(receipt.read_text())["lineage"])
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
    figures = measure(options.receipt, options.keys, num_runs=5 if options.quick else 20)
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
