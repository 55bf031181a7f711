"""What eight contributors are worth, from 32 coalition retrains, against all 2^8; and whether the intervals hold.

    python -m benchmarks.contributor_credit [--quick] [--check] [--utility NAME] [--out FILE] [--plot FILE.png]

A tiny Llama with LoRA learns facts about people who do not exist (benchmarks/attribution/), brought by eight
contributors of whom the last errs on purpose. Every coalition of them is trained, which gives exact Banzhaf values for
each query, by likelihood (the default of `trailmark settle`) or log-likelihood. Then coalitions are drawn again and
again, as a settlement would draw them, and the values they give are compared: their correlation with the exact ones,
and how many 90 % intervals cover them (a cell is a contributor and a query; a benchmark is the mean over the asked
queries). The floors hold a whole `trailmark settle --budget 32`, which also spends retrains on leave-one-out. Seeds,
queries and drawn coalitions are hashed before the first retrain. --quick takes one seed and a smaller lab.
"""

import argparse
import hashlib
import json
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from attribution.coalitions import Coalitions, PairDesign
from attribution.credit import Search, Table, banzhaf_observed, measure_credit
from attribution.estimates import Estimate, banzhaf_estimate
from attribution.exact_values import all_coalitions, exact_banzhaf, exact_shapley, leave_one_out, msr_banzhaf
from attribution.influence.group_gains import group_gains
from attribution.ridge import fit_ridge
from benchmarks.attribution.facts import Size
from benchmarks.attribution.lab import Lab, LabSettings

Array = NDArray[np.float64]
CACHE = Path("build/contributor_credit")
UTILITIES = ("likelihood", "log_likelihood")
NUM_PLAYERS, NUM_ASKED, CONFIDENCE = 8, 24, 0.9
SETTLE = "trailmark settle --budget 32"
BUDGETS = (16, 24, 32, 48, 64, 128)
FULL, QUICK = Size(num_rows=192, num_queries=72), Size(num_rows=96, num_queries=72)


@dataclass(frozen=True)
class Draw:
    """One settlement that might have been: the queries asked, and the seed of its coalitions."""

    seed: int
    asked: tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """Correlation of cells and of benchmark means with the exact values, over all draws."""

    cells: float
    means: float


@dataclass(frozen=True)
class Cover:
    """Share of 90 % intervals that hold the exact value: of cells, of means over the asked queries, of means over all
    72 queries (the part of the interval that items leave open is then that of a sample of 24 from 72)."""

    cells: float
    means: float
    nested: float


def plan_draws(seed: int, *, num_queries: int, num_draws: int) -> tuple[Draw, ...]:
    """Return the settlements to be simulated."""
    generator = np.random.default_rng([seed, 7])
    return tuple(
        Draw(1000 * seed + number, tuple(sorted(generator.choice(num_queries, NUM_ASKED, replace=False).tolist())))
        for number in range(num_draws)
    )


def digest_of(lab: Lab, draws: Sequence[Draw]) -> str:
    """Return the SHA-256 of the lab, the queries of each draw and the coalitions it will take."""
    signs = {draw.seed: _design(draw.seed, 16).signs for draw in draws}
    value = [lab.digest, [asdict(draw) for draw in draws], [[str(key), signs[key]] for key in signs]]
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def train_all(lab: Lab, *, cache: Path) -> tuple[Array, float]:
    """Return log-likelihoods [2^8, q] (nats per answer token) and CPU seconds a retrain; resumes."""
    folder = cache / lab.digest[:16]
    folder.mkdir(parents=True, exist_ok=True)
    owners = np.array([int(row.contributor.rpartition("-")[2]) for row in lab.world.rows])
    coalitions, run = all_coalitions(NUM_PLAYERS), lab.run()
    size = run.runs_at_once() * 4
    parts, seconds = [], 0.0
    for start in range(0, len(coalitions), size):
        file = folder / f"{start}-{size}.npz"
        if not file.exists():
            began = process_time()
            state = run.run_many(torch.from_numpy(coalitions[start : start + size][:, owners].astype(np.float32)))
            found = -run.query_losses(state, lab.queries).double().numpy()
            partial = file.with_suffix(".partial.npz")
            np.savez(partial, utilities=found, cpu_s=np.array(process_time() - began))
            partial.rename(file)
        with np.load(file) as stored:
            parts.append(stored["utilities"])
            seconds += float(stored["cpu_s"])
    return np.concatenate(parts), seconds / len(coalitions)


def in_run_sums(lab: Lab, *, utility: str) -> Array:
    """Return [8, q]: first-order gains of each contributor's rows, summed over looks at the run."""
    owners = torch.tensor([int(row.contributor.rpartition("-")[2]) for row in lab.world.rows])
    masks = (owners[None, :] == torch.arange(NUM_PLAYERS)[:, None]).float()
    gains = group_gains(lab.run(), masks, lab.queries, of_likelihood=utility == "likelihood")
    return gains.double().numpy()


def _design(seed: int, num_pairs: int) -> PairDesign:
    design = PairDesign(NUM_PLAYERS, seed)
    design.draw(num_pairs)
    return design


def settle_pairs(utilities: Array, seed: int, budget: int, prior: Array | None = None) -> Estimate:
    """Return what `budget` coalitions in complementary pairs give."""
    design, table = _design(seed, budget // 2), Table(_lookup(utilities), NUM_PLAYERS)
    signs = design.matrix()
    table.measure(np.concatenate([signs > 0, signs < 0]))
    return banzhaf_estimate(banzhaf_observed(design, table), prior=prior, confidence=CONFIDENCE, seed=seed)


def random_coalitions(seed: int, count: int) -> Coalitions:
    """Return distinct coalitions drawn uniformly, as the plain methods take them."""
    numbers = np.random.default_rng([seed, 3]).choice(2**NUM_PLAYERS, count, replace=False)
    return all_coalitions(NUM_PLAYERS)[numbers]


def ridge_on_random(utilities: Array, seed: int, budget: int) -> Array:
    """Return [8, q]: ridge with an intercept on random coalitions."""
    coalitions = random_coalitions(seed, budget)
    found = _lookup(utilities)(coalitions)
    design = coalitions - 0.5
    return fit_ridge(design - design.mean(axis=0), found - found.mean(axis=0)).coefficients


def msr_on_random(utilities: Array, seed: int, budget: int) -> Array:
    """Return [8, q]: maximum sample reuse on the same random coalitions."""
    coalitions = random_coalitions(seed, budget)
    return msr_banzhaf(coalitions, _lookup(utilities)(coalitions))


def _lookup(utilities: Array) -> Callable[[Coalitions], Array]:
    return lambda coalitions: utilities[(coalitions * 2 ** np.arange(NUM_PLAYERS)).sum(axis=1)]


def score(found: Sequence[Array], exact: Sequence[Array]) -> Score:
    """Return correlations pooled over cells, and over contributors' means within each draw."""
    cells = [np.corrcoef(one.ravel(), truth.ravel())[0, 1] for one, truth in zip(found, exact, strict=True)]
    means = [np.corrcoef(one.mean(1), truth.mean(1))[0, 1] for one, truth in zip(found, exact, strict=True)]
    return Score(float(np.mean(cells)), float(np.mean(means)))


def cover(found: Sequence[Estimate], exact: Sequence[Array], everywhere: Array) -> Cover:
    """Return how many intervals hold what they speak of; `everywhere` [8, q]: exact values of all queries."""
    cells = [(one.cell_low <= truth) & (truth <= one.cell_high) for one, truth in zip(found, exact, strict=True)]
    means = [
        abs(one.values - truth.mean(axis=1)) <= one.coalition_width for one, truth in zip(found, exact, strict=True)
    ]
    left = 1 - NUM_ASKED / everywhere.shape[1]
    nested = [
        abs(one.values - everywhere.mean(axis=1)) <= np.sqrt(one.coalition_width**2 + left * one.item_width**2)
        for one in found
    ]
    return Cover(*(float(np.mean(part)) for part in (cells, means, nested)))


@dataclass(frozen=True)
class SeedResult:
    """One seed's lab: scores per method and budget, cover per budget, and what a retrain costs."""

    seed: int
    digest: str
    scores: dict[str, dict[int, Score]]
    covers: dict[str, dict[int, Cover]]
    exact_means: list[float]
    negative_share: float
    shapley_r: float
    retrain_cpu_s: float


def measure(lab: Lab, draws: Sequence[Draw], *, cache: Path, utility: str) -> SeedResult:
    """Train all coalitions of a lab and score every method on every draw."""
    logs, cpu_s = train_all(lab, cache=cache)
    utilities = np.exp(logs) if utility == "likelihood" else logs
    gradients = in_run_sums(lab, utility=utility)
    everywhere, shapley = exact_banzhaf(utilities), exact_shapley(utilities)
    asked = [utilities[:, draw.asked] for draw in draws]
    exact = [exact_banzhaf(one) for one in asked]
    scores: dict[str, dict[int, Score]] = {}
    covers: dict[str, dict[int, Cover]] = {}
    for budget in BUDGETS:
        plain, primed = (
            [
                settle_pairs(one, draw.seed, budget, gradients[:, draw.asked] if has_prior else None)
                for one, draw in zip(asked, draws, strict=True)
            ]
            for has_prior in (False, True)
        )
        named = {
            "pairs, ridge": [one.cells for one in plain],
            "pairs, ridge, gradient prior": [one.cells for one in primed],
            "random, ridge": [ridge_on_random(one, draw.seed, budget) for one, draw in zip(asked, draws, strict=True)],
            "random, MSR": [msr_on_random(one, draw.seed, budget) for one, draw in zip(asked, draws, strict=True)],
        }
        for name, found in named.items():
            scores.setdefault(name, {})[budget] = score(found, exact)
        for name, estimates in (("pairs, ridge", plain), ("pairs, ridge, gradient prior", primed)):
            covers.setdefault(name, {})[budget] = cover(estimates, exact, everywhere)
    whole = [
        measure_credit(_lookup(one), NUM_PLAYERS, search=Search(32, precision=0, seed=draw.seed)).banzhaf
        for one, draw in zip(asked, draws, strict=True)
    ]
    scores[SETTLE] = {32: score([one.cells for one in whole], exact)}
    covers[SETTLE] = {32: cover(whole, exact, everywhere)}
    scores["leave-one-out, exact"] = {9: score([leave_one_out(one) for one in asked], exact)}
    scores["in-run gradient sums"] = {0: score([gradients[:, draw.asked] for draw in draws], exact)}
    return SeedResult(
        seed=lab.seed,
        digest=digest_of(lab, draws),
        scores=scores,
        covers=covers,
        exact_means=everywhere.mean(axis=1).round(5).tolist(),
        negative_share=float((everywhere < 0).mean()),
        shapley_r=float(np.corrcoef(shapley.ravel(), everywhere.ravel())[0, 1]),
        retrain_cpu_s=cpu_s,
    )


def over_seeds(results: Sequence[SeedResult]) -> tuple[dict[str, dict[int, Score]], dict[str, dict[int, Cover]]]:
    """Return the means over seeds."""
    first = results[0]
    scores = {
        name: {budget: _mean([one.scores[name][budget] for one in results]) for budget in budgets}
        for name, budgets in first.scores.items()
    }
    covers = {
        name: {budget: _mean([one.covers[name][budget] for one in results]) for budget in budgets}
        for name, budgets in first.covers.items()
    }
    return scores, covers


def _mean(values: Sequence[Any]) -> Any:
    """The mean of each field."""
    names = vars(values[0])
    return type(values[0])(**{name: float(np.mean([getattr(one, name) for one in values])) for name in names})


def floors(results: Sequence[SeedResult]) -> list[dict[str, Any]]:
    """Return what is held to a floor, each with whether it holds."""
    scores, covers = over_seeds(results)
    ours, held = scores[SETTLE][32], covers[SETTLE][32]
    found: list[dict[str, Any]] = [
        {"name": "r with exact Banzhaf, cells, 32 retrains", "value": ours.cells, "low": 0.95, "high": 1.0},
        {"name": "90 % intervals of cells cover", "value": held.cells, "low": 0.85, "high": 0.95},
        {"name": "90 % intervals over the asked queries cover", "value": held.means, "low": 0.85, "high": 0.95},
        {"name": "90 % intervals over all queries cover", "value": held.nested, "low": 0.85, "high": 0.95},
    ]
    return [{**one, "passed": one["low"] <= one["value"] <= one["high"]} for one in found]


def print_tables(results: Sequence[SeedResult]) -> None:
    """Print correlations and cover."""
    scores, covers = over_seeds(results)
    print(f"\n{'r with exact Banzhaf: cells / benchmark':40}" + "".join(f"{budget:>15}" for budget in BUDGETS))
    for name, budgets in scores.items():
        if set(budgets) <= {0, 9}:
            (one,) = budgets.values()
            print(f"{name:40}{one.cells:>8.3f} / {one.means:.3f}  ({next(iter(budgets)) or 'no'} retrains)")
            continue
        cells = (f"{one.cells:.3f} / {one.means:.3f}" if (one := budgets.get(budget)) else "" for budget in BUDGETS)
        print(f"{name:40}" + "".join(f"{cell:>15}" for cell in cells))
    print(f"\n{'cover of 90 %: cells / asked / all':40}" + "".join(f"{budget:>17}" for budget in BUDGETS))
    for name, held in covers.items():
        shown = (f"{one.cells:.2f}/{one.means:.2f}/{one.nested:.2f}" if (one := held.get(b)) else "" for b in BUDGETS)
        print(f"{name:40}" + "".join(f"{cell:>17}" for cell in shown))
    for one in results:
        print(
            f"seed {one.seed}: {one.retrain_cpu_s:.2f} CPU s a retrain; exact values of the benchmark "
            f"{one.exact_means}; {one.negative_share:.0%} of cells negative; Shapley and Banzhaf r {one.shapley_r:.3f}"
        )


def plot(results: Sequence[SeedResult], file: Path) -> None:
    """Draw correlation and cover by budget."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    scores, covers = over_seeds(results)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    for name, budgets in scores.items():
        if set(budgets) <= set(BUDGETS):
            marker = "o" if len(budgets) > 1 else "*"
            left.plot(list(budgets), [one.cells for one in budgets.values()], marker=marker, markersize=8, label=name)
        else:
            left.axhline(next(iter(budgets.values())).cells, linestyle=":", color="grey", linewidth=1)
            left.annotate(name, (BUDGETS[-1], next(iter(budgets.values())).cells), ha="right", va="bottom", fontsize=7)
    left.axhline(0.95, color="black", linewidth=0.8)
    left.set(xlabel="coalitions trained", ylabel="r with exact Banzhaf, contributor x query", xscale="log")
    left.set_xticks(BUDGETS, [str(budget) for budget in BUDGETS])
    left.minorticks_off()
    left.legend(fontsize=8)
    right.axhspan(0.85, 0.95, color="#54a24b", alpha=0.2)
    for part in ("cells", "means", "nested"):
        held = covers["pairs, ridge"]
        right.plot(list(held), [getattr(one, part) for one in held.values()], marker="o", label=part)
    right.set(xlabel="coalitions trained", ylabel="90 % intervals that cover", xscale="log", ylim=(0.5, 1.02))
    right.set_xticks(BUDGETS, [str(budget) for budget in BUDGETS])
    right.minorticks_off()
    right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def _parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--quick", action="store_true", help="seed 0 of a smaller lab")
    options.add_argument("--check", action="store_true", help="exit 1 when a figure is outside its bounds")
    options.add_argument("--out", type=Path, help="write the JSON here as well")
    options.add_argument("--plot", type=Path, help="draw a PNG")
    options.add_argument("--seeds", type=int, default=3, help="how many labs (full form)")
    options.add_argument("--draws", type=int, default=100, help="settlements simulated for each lab")
    options.add_argument("--utility", choices=UTILITIES, default=UTILITIES[0], help="what a coalition is measured by")
    options.add_argument("--cache", type=Path, default=CACHE, help="retrains by digest")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Train, settle, compare; return the exit status."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    size = QUICK if options.quick else FULL
    results = []
    for seed in range(1 if options.quick else options.seeds):
        lab = Lab(LabSettings(size=size), seed=seed, folder=options.cache)
        draws = plan_draws(seed, num_queries=size.num_queries, num_draws=options.draws)
        print(f"seed {seed}: experiment, queries and coalitions sha256 {digest_of(lab, draws)}", flush=True)
        results.append(measure(lab, draws, cache=options.cache, utility=options.utility))
    print_tables(results)
    held = floors(results)
    print()
    for one in held:
        print(
            f"{'ok  ' if one['passed'] else 'MISS'} {one['name']}: {one['value']:.3f} ({one['low']} to {one['high']})"
        )
    if options.plot:
        plot(results, options.plot)
    text = json.dumps(_to_json(results, held, form="quick" if options.quick else "full", utility=options.utility))
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 1 if options.check and not all(one["passed"] for one in held) else 0


def _to_json(
    results: Sequence[SeedResult], held: Sequence[dict[str, Any]], *, form: str, utility: str
) -> dict[str, Any]:
    scores, covers = over_seeds(results)
    return {
        "benchmark": "contributor_credit",
        "form": form,
        "utility": utility,
        "hardware": f"{platform.machine()}, 1 thread, torch {torch.__version__}",
        "figures": list(held),
        "r": {name: {str(budget): asdict(one) for budget, one in part.items()} for name, part in scores.items()},
        "cover": {name: {str(budget): asdict(one) for budget, one in part.items()} for name, part in covers.items()},
        "seeds": [
            {
                "seed": one.seed,
                "sha256": one.digest,
                "exact_benchmark": one.exact_means,
                "negative_share": round(one.negative_share, 4),
                "shapley_r": round(one.shapley_r, 4),
                "retrain_cpu_s": round(one.retrain_cpu_s, 3),
            }
            for one in results
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
