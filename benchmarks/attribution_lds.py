"""Which attribution foretells retraining? LDS of our tiers, of baselines and of peers, with intervals and costs.

    python -m benchmarks.attribution_lds [--quick] [--check] [--out FILE] [--plot FILE.png] [--seeds N] [--record]

A tiny Llama with LoRA learns facts about people who do not exist (benchmarks/attribution/). It is retrained on random
subsets of its rows: half kept, 5 % dropped, 1 % dropped, in the recorded data order and in another. A method's score is
the rank correlation between what it foretells for a subset and what the retrain did to a query (LDS), the mean over
queries; intervals resample queries and subsets. Subset lists are hashed before anything is scored. Peers run in their
own environment (`make peers`) on the same files; --quick compares with their recorded scores.
"""

import argparse
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from attribution.influence.lds import Lds, Resamples, lds, mean_over_banks, rank_agreement
from benchmarks.attribution.banks import DROPS, Bank, Plan, announce, make_bank, plan_banks
from benchmarks.attribution.lab import Lab, LabSettings
from benchmarks.attribution.methods import BASELINES, Found, own_pass_cpu_s
from benchmarks.attribution.ours import AUDIT, EXPLAIN, OURS
from benchmarks.attribution.record import PEERS, read_record, run_peers, write_record
from benchmarks.gpu_check import Figure

CACHE = Path("build/attribution_lds")
"""Retrains, exported labs and peers' scores by digest; `make clean` removes it."""
MAGIC = "bergson MAGIC"


@dataclass(frozen=True)
class SeedResult:
    """All of one seed: every method's score on every bank, noise per drop, and costs."""

    seed: int
    scores: dict[str, dict[str, Lds]]
    noise: dict[str, Lds]
    found: dict[str, Found]
    digests: dict[str, str]
    retrain_cpu_s: float
    own_pass_cpu_s: float


def measure(lab: Lab, plans: Sequence[Plan], peers: dict[str, Found], *, cache: Path, draws: int = 1000) -> SeedResult:
    """Score every method on every bank of a lab."""
    found = {name: method(lab) for name, method in {**BASELINES, **OURS}.items()} | peers
    banks = [make_bank(lab, plan, cache=cache) for plan in plans]
    resamples = Resamples.of(
        num_queries=len(lab.queries), num_subsets=len(plans[0].kept), num_draws=draws, seed=lab.seed
    )
    return SeedResult(
        seed=lab.seed,
        scores={
            name: {bank.plan.name: lds(one.scores, bank.plan.kept, bank.gains, resamples=resamples) for bank in banks}
            for name, one in found.items()
        },
        noise=_noise(banks, resamples),
        found=found,
        digests={"experiment": lab.digest, **{plan.name: plan.digest for plan in plans}},
        retrain_cpu_s=max(bank.retrain_cpu_s for bank in banks),
        own_pass_cpu_s=own_pass_cpu_s(lab),
    )


def _noise(banks: Sequence[Bank], resamples: Resamples) -> dict[str, Lds]:
    """Return per drop how far two data orders agree; its root is the ceiling of a method that ignores the order."""
    by_name = {bank.plan.name: bank for bank in banks}
    other = {name.removesuffix(", other order"): bank for name, bank in by_name.items() if bank.plan.order}
    return {name: rank_agreement(by_name[name].gains, bank.gains, resamples=resamples) for name, bank in other.items()}


def over_seeds(results: Sequence[SeedResult]) -> dict[str, dict[str, Lds]]:
    """Return method -> bank -> the mean over seeds."""
    first = results[0].scores
    return {
        name: {bank: mean_over_banks([one.scores[name][bank] for one in results]) for bank in first[name]}
        for name in first
    }


def figures(results: Sequence[SeedResult]) -> list[Figure]:
    """Return what is held to a floor."""
    scores, found = over_seeds(results), results[0].found
    online = [name for name, one in found.items() if one.kind == "online" and one.version != "ours"]
    table: list[Figure] = []
    if EXPLAIN in found and online:
        for bank in ("keep-50%", "drop-5%"):
            best = max(online, key=lambda name: scores[name][bank].value)
            table.append(_gap(bank, scores, EXPLAIN, best))
        table += _cost_figures(results[0], scores, online)
    if AUDIT in found and MAGIC in found:
        for bank in ("keep-50%", "drop-5%"):
            table.append(_gap(bank, scores, AUDIT, MAGIC))
    return table


def _gap(bank: str, scores: dict[str, dict[str, Lds]], ours: str, peer: str) -> Figure:
    """Return our score less the peer's; it may be negative only within the interval of the paired difference."""
    gap = scores[ours][bank].minus(scores[peer][bank])
    return Figure(f"{bank}: {ours} less {peer}", gap.value, _interval(gap), gap.value - gap.high)


def _cost_figures(result: SeedResult, scores: dict[str, dict[str, Lds]], online: Sequence[str]) -> Iterator[Figure]:
    """Costs against the peer that is best on keep-50 %."""
    best = max(online, key=lambda name: scores[name]["keep-50%"].value)
    ours, peer = result.found[EXPLAIN], result.found[best]
    query, size = ours.query_cpu_s / peer.query_cpu_s, ours.bytes_per_example / peer.bytes_per_example
    yield Figure(f"CPU s per query / {best}", query, "ratio", 0.5, is_ceiling=True)
    yield Figure(f"bytes per example / {best}", size, "ratio", 0.25, is_ceiling=True)
    epochs = ours.build_epochs / ours.settings["checkpoints"]
    yield Figure("store build per checkpoint", epochs, "training epochs", 1.25, is_ceiling=True)


def print_tables(results: Sequence[SeedResult]) -> None:
    """Print the table of scores and the one of costs."""
    scores, found = over_seeds(results), results[0].found
    banks = list(next(iter(scores.values())))
    width = max(map(len, scores)) + 2
    print(f"\n{'LDS, mean over queries [95 %]':{width}}" + "".join(f"{bank:>24}" for bank in banks))
    for name in sorted(scores, key=lambda name: (found[name].kind, -scores[name][banks[0]].value)):
        cells = "".join(f"{one.value:>10.3f} {_interval(one):>13}" for one in scores[name].values())
        print(f"{name:{width}}{cells}  {found[name].kind}")
    for bank in results[0].noise:
        noise = mean_over_banks([one.noise[bank] for one in results])
        print(f"{bank}: two data orders agree {noise.value:.3f} {_interval(noise)}; ceiling {noise.value**0.5:.3f}")
    print(f"\n{'cost':{width}}{'build CPU s':>14}{'per query CPU s':>18}{'bytes per example':>20}")
    for name, one in found.items():
        if one.kind != "baseline":
            print(f"{name:{width}}{one.build_cpu_s:>14.2f}{one.query_cpu_s:>18.5f}{one.bytes_per_example:>20,.0f}")
    own, retrain = results[0].own_pass_cpu_s, results[0].retrain_cpu_s
    print(f"one retrain {retrain:.2f} CPU s; a query's own forward and backward {own:.4f} CPU s")


def plot(results: Sequence[SeedResult], file: Path) -> None:
    """Draw every method's score with its interval, a panel per bank."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    scores, found = over_seeds(results), results[0].found
    banks = list(next(iter(scores.values())))
    names = sorted(scores, key=lambda name: scores[name][banks[0]].value)
    colours = {"baseline": "#9aa0a6", "online": "#4c78a8", "in-run": "#54a24b", "audit": "#b279a2"}
    figure, axes = pyplot.subplots(
        1, len(banks), figsize=(2.4 * len(banks) + 2.5, 0.24 * len(names) + 1.2), sharey=True
    )
    for axis, bank in zip(axes, banks, strict=True):
        for place, name in enumerate(names):
            one = scores[name][bank]
            ours = found[name].version == "ours" and found[name].kind != "baseline"
            bar = axis.barh(place, one.value, color=colours[found[name].kind], alpha=1.0 if ours else 0.55)
            axis.plot([one.low, one.high], [place, place], color="black", linewidth=1)
            bar[0].set_edgecolor("black" if ours else "none")
        if bank.removesuffix(", other order") in results[0].noise:
            noise = mean_over_banks([one.noise[bank.removesuffix(", other order")] for one in results])
            axis.axvline(noise.value**0.5, color="black", linestyle=":", linewidth=1)
        axis.set_title(bank, fontsize=9)
        axis.set_xlim(-0.05, 1.0)
        axis.set_xticks((0, 0.25, 0.5, 0.75))
        axis.set_ylim(-0.7, len(names) - 0.3)
    axes[0].set_yticks(range(len(names)), names, fontsize=8)
    figure.suptitle(
        "LDS (95 % over queries and subsets)\nframed: ours; dotted: ceiling of methods blind to data order", fontsize=10
    )
    figure.tight_layout(w_pad=0.2)
    figure.savefig(file, dpi=110)


def _interval(one: Lds) -> str:
    return f"[{one.low:.2f}, {one.high:.2f}]"


def _parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--quick", action="store_true", help="seed 0, two banks of 40 retrains, recorded peers")
    options.add_argument("--check", action="store_true", help="exit 1 when a figure is under its floor")
    options.add_argument("--out", type=Path, help="write the JSON here as well")
    options.add_argument("--plot", type=Path, help="draw a PNG")
    options.add_argument("--seeds", type=int, default=3, help="how many (full form)")
    options.add_argument("--subsets", type=int, default=100, help="retrains per bank (full form)")
    options.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS, help="which peers (full form)")
    options.add_argument("--record", action="store_true", help="run the peers on the quick form and keep their scores")
    options.add_argument("--cache", type=Path, default=CACHE, help="retrains and peers' scores by digest")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the banks and the methods; return the exit status."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    quick = options.quick or options.record
    results = []
    for seed in range(1 if quick else options.seeds):
        lab = Lab(LabSettings(), seed=seed, folder=options.cache)
        count = 40 if quick else options.subsets
        plans = plan_banks(lab, DROPS[:2] if quick else DROPS, num_subsets=count, num_orders=1 if quick else 2)
        print(*announce(lab, plans), sep="\n", flush=True)
        if options.record:
            write_record(lab, plans, run_peers(lab, cache=options.cache))
        peers = read_record(lab, plans) if quick else run_peers(lab, cache=options.cache, peers=options.peers)
        results.append(measure(lab, plans, peers, cache=options.cache))
    return _report(results, options)


def _report(results: Sequence[SeedResult], options: argparse.Namespace) -> int:
    print_tables(results)
    held = figures(results)
    print()
    for figure in held:
        print(figure.line)
    if options.plot:
        plot(results, options.plot)
    text = json.dumps(_to_json(results, held))
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 1 if options.check and not all(figure.is_good for figure in held) else 0


def _to_json(results: Sequence[SeedResult], held: Sequence[Figure]) -> dict[str, Any]:
    found = results[0].found
    return {
        "benchmark": "attribution_lds",
        "command": " ".join(["python -m benchmarks.attribution_lds", *sys.argv[1:]]),
        "hardware": f"{platform.machine()}, 1 thread, torch {torch.__version__}",
        "seeds": [one.seed for one in results],
        "digests": {str(one.seed): one.digests for one in results},
        "figures": [{**asdict(figure), "is_good": figure.is_good} for figure in held],
        "lds": {
            name: {bank: [round(value, 4) for value in (one.value, one.low, one.high)] for bank, one in banks.items()}
            for name, banks in over_seeds(results).items()
        },
        "noise": {str(one.seed): {bank: round(value.value, 4) for bank, value in one.noise.items()} for one in results},
        "methods": {
            name: {
                "kind": one.kind,
                "build_cpu_s": round(one.build_cpu_s, 3),
                "build_epochs": round(one.build_epochs, 2),
                "query_cpu_s": round(one.query_cpu_s, 6),
                "bytes_per_example": round(one.bytes_per_example),
                "settings": one.settings,
                "version": one.version,
            }
            for name, one in found.items()
        },
        "retrain_cpu_s": round(results[0].retrain_cpu_s, 3),
        "own_pass_cpu_s": round(results[0].own_pass_cpu_s, 5),
    }


if __name__ == "__main__":
    sys.exit(main())
