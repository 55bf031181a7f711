"""Command line, table and last JSON line of the programs that need a GPU."""

import argparse
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Figure:
    """One measured value. `floor` None: shown, not judged; `is_ceiling`: the value must not exceed it."""

    name: str
    value: float
    unit: str
    floor: float | None = None
    is_ceiling: bool = False

    @property
    def is_good(self) -> bool:
        """Whether the figure keeps its bound."""
        if self.floor is None:
            return True
        return self.value <= self.floor if self.is_ceiling else self.value >= self.floor

    @property
    def line(self) -> str:
        """The figure as a row of the table."""
        bound = "" if self.floor is None else f"  ({'at most' if self.is_ceiling else 'at least'} {self.floor:g})"
        return f"{self.name:64} {self.value:12.6g} {self.unit}{bound}{'' if self.is_good else '  MISSED'}"


@dataclass(frozen=True)
class Options:
    """device: cuda or cpu. `is_toy`: toy shapes, no timings. `plot`: where to write an SVG, where there is one."""

    device: torch.device
    is_quick: bool
    is_toy: bool
    plot: Path | None = None


Program = Callable[[Options], Iterator[Figure]]


def parse(doc: str, arguments: Sequence[str] | None) -> tuple[Options, argparse.Namespace]:
    """Read the command line that all of them share."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer points, shorter runs")
    parser.add_argument("--check", action="store_true", help="exit 1 when a figure is under its floor")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--plot", type=Path, help="write an SVG here, where the program draws one")
    parser.add_argument("--toy", action="store_true", help="toy shapes; always so without a GPU")
    found = parser.parse_args(arguments)
    has_cuda = torch.cuda.is_available()
    device = torch.device("cuda" if has_cuda else "cpu")
    return Options(device, found.quick, found.toy or not has_cuda, found.plot), found


def hardware(device: torch.device) -> str:
    """Name the device that ran."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, Triton's interpreter"


def run(doc: str, program: Program, arguments: Sequence[str] | None, *, peer: str) -> int:
    """Print what is compared, the table and the JSON line; return the exit status."""
    options, found = parse(doc, arguments)
    what = "TOY SHAPES: nothing is timed, results are held against oracles" if options.is_toy else "random weights"
    print(f"{doc.splitlines()[0]}\nagainst {peer}; on {hardware(options.device)}; {what}")
    figures = []
    for figure in program(options):
        figures.append(figure)
        print(figure.line, flush=True)
    report = {
        "hardware": hardware(options.device),
        "peer": peer,
        "is_toy": options.is_toy,
        "figures": [asdict(figure) for figure in figures],
    }
    line = json.dumps(report)
    if found.out:
        found.out.write_text(line + "\n")
    print(line)
    return 1 if found.check and not all(figure.is_good for figure in figures) else 0
