"""How fast lineage questions are answered over a large log, and how fast their index is made anew.

    python -m benchmarks.lineage_scale [--quick] [--check] [--out FILE] [--records N] [--home FOLDER] [--monitor]

Writes a home of N records (1,000,000; --quick: 100,000; its shape is told in `lineage_home.py`), makes the index from
the log, then asks for the impact of rows, contributors, rules, prompts, base models and adapters as `trailmark lineage
impact` does: by name, with counts of all that descends and a page of 50. Each question opens the index anew and checks
it against the signed checkpoint. With --home the folder is kept and used again. With --monitor nothing is asked of the
lineage; the monitor replays the log instead: first its public half (what `--url` sees), then the records too, then both
again with nothing new. The last line is one JSON object.
"""

import argparse
import json
import platform
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from attribution.lineage_index import LineageIndex
from attribution.lineage_queries import LineageQueries
from attribution.log.trust import Trust
from attribution.monitor import watch
from attribution.monitor_sources import TrailSource
from attribution.monitor_state import Memory
from attribution.trail import Trail
from benchmarks.lineage_home import RULES, HomeWriter, digest_of

MIN_RECORDS_PER_S = 20_000
MAX_IMPACT_MS = 200.0
QUESTIONS_FILE = "questions.json"
PAGE = 50


@dataclass(frozen=True)
class Figure:
    """One measurement; `floor` is what it must not miss (None: told for comparison), `at_most` the side of it."""

    name: str
    value: float
    unit: str
    floor: float | None = None
    at_most: bool = True

    @property
    def is_good(self) -> bool:
        """Whether the floor is kept."""
        return self.floor is None or (self.value <= self.floor if self.at_most else self.value >= self.floor)


def write_home(home: Path, *, num_records: int, num_questions: int) -> None:
    """Write the home and, beside it, the questions to ask."""
    made = HomeWriter(home, num_records=num_records).write()
    draw = random.Random(1)
    known = [leaf for leaf in made.row_ids if leaf not in made.redacted]
    questions = {
        "row": [draw.choice(made.row_ids[draw.choice(known)]) for _ in range(num_questions)],
        "contributor": [*made.names[:20], *(draw.choice(made.names) for _ in range(num_questions - 20))],
        "rule": [f"rule:{rule}" for rule in RULES] + [digest_of(rule, number) for rule in RULES for number in range(3)],
        "prompt": [f"prompt-{draw.randrange(len(made.prompts))}" for _ in range(20)],
        "base model": [f"base-{number}" for number in range(3)],
        "adapter": [f"adapter-{draw.randrange(len(made.adapters))}" for _ in range(num_questions)],
    }
    (home / QUESTIONS_FILE).write_text(json.dumps(questions))


def measure(home: Path) -> list[Figure]:
    """Return the figures of a home."""
    index = LineageIndex.open(home)
    began = time.perf_counter()
    num_records = index.rebuild()
    rebuilt_s = time.perf_counter() - began
    figures = [
        Figure("records", num_records, "records"),
        Figure("index made from the log", num_records / rebuilt_s, "records/s", MIN_RECORDS_PER_S, at_most=False),
    ]
    queries = LineageQueries(index, open_trail=lambda: Trail.open(home, create=False))
    questions = json.loads((home / QUESTIONS_FILE).read_text())
    began = time.perf_counter()
    queries.impact(questions["row"][0])
    num_rows = index.ask(lambda database: database.execute("SELECT count(*) FROM row").fetchone()[0])
    figures.append(Figure("tables of rows taken in at the first question about one", time.perf_counter() - began, "s"))
    figures += [
        Figure("rows", num_rows, "rows"),
        Figure("index on disk", index.path.stat().st_size / 2**20, "MiB"),
    ]
    for kind, texts in questions.items():
        figures += _impact_figures(queries, kind, texts)
    return figures


def measure_monitor(home: Path) -> list[Figure]:
    """Return how fast the monitor replays a home, in processor seconds: wall time would measure its neighbours too."""
    trust = Trust.load(home / "trust.json")
    figures = []
    with tempfile.TemporaryDirectory(prefix="monitor-") as folder:
        for name, is_public in (("public half", True), ("records too", False)):
            for run in ("from nothing", "again, nothing new"):
                trail, memory = Trail.open(home, create=False), Memory(Path(folder) / name)
                began = time.process_time()
                report = watch(TrailSource(trail), memory, trust.history(), trail=None if is_public else trail)
                seconds = time.process_time() - began
                counted = dict(Counter(item.check for item in report.violations))
                figures += [
                    Figure(f"monitor, {name}, {run}", seconds, "CPU s"),
                    Figure(f"monitor, {name}, {run}: violations {counted or ''}".rstrip(), len(report.violations), ""),
                ]
                if run == "from nothing":
                    figures.append(Figure(f"monitor, {name}: rate", report.size / seconds, "records/CPU s"))
    return figures


def _impact_figures(queries: LineageQueries, kind: str, texts: Sequence[str]) -> list[Figure]:
    times_ms, sizes = [], []
    for text in texts:
        began = time.perf_counter()
        answer = queries.impact(text, limit=PAGE)
        times_ms.append((time.perf_counter() - began) * 1000)
        sizes.append(answer.total)
    times_ms.sort()
    name = f"impact of {len(texts)} {kind}s"
    return [
        Figure(f"{name}: median", times_ms[len(times_ms) // 2], "ms", MAX_IMPACT_MS),
        Figure(f"{name}: p99", times_ms[int(0.99 * (len(times_ms) - 1))], "ms", MAX_IMPACT_MS),
        Figure(f"{name}: slowest", times_ms[-1], "ms"),
        Figure(f"{name}: most descendants", max(sizes), "records"),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table and the JSON line; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="100,000 records instead of 1,000,000")
    parser.add_argument("--check", action="store_true", help="exit 1 when a figure misses its floor")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--records", type=int, help="number of records")
    parser.add_argument("--monitor", action="store_true", help="time the monitor instead of the questions")
    parser.add_argument("--home", type=Path, help="keep the home here, or use the one that is there")
    options = parser.parse_args(arguments)
    num_records = options.records or (100_000 if options.quick else 1_000_000)
    home = options.home or Path(tempfile.mkdtemp(prefix="lineage-scale-")) / "home"
    hardware = f"{platform.machine()}, Python {platform.python_version()}"
    print(f"lineage questions over a log of {num_records:,} records against fixed floors, on {hardware}", flush=True)
    try:
        if not (home / QUESTIONS_FILE).exists():
            began = time.perf_counter()
            write_home(home, num_records=num_records, num_questions=min(300, max(30, num_records // 100)))
            print(f"home written in {time.perf_counter() - began:.0f} s", flush=True)
        figures = measure_monitor(home) if options.monitor else measure(home)
    finally:
        if options.home is None:
            shutil.rmtree(home.parent)
    for figure in figures:
        floor = "" if figure.floor is None else f"  ({'at most' if figure.at_most else 'at least'} {figure.floor:,.0f})"
        print(f"{figure.name:58} {figure.value:12,.1f} {figure.unit}{floor}{'' if figure.is_good else '  MISSED'}")
    line = json.dumps({"hardware": hardware, "figures": [asdict(figure) for figure in figures]})
    if options.out:
        options.out.write_text(line + "\n")
    print(line)
    return 1 if options.check and not all(figure.is_good for figure in figures) else 0


if __name__ == "__main__":
    sys.exit(main())
