"""What an audit costs and is worth: a recorded tiny run replayed, differentiated, and trained again without rows.

    python -m benchmarks.audit_cost [--quick] [--check] [--out FILE]

A Llama of 2 layers (hidden 64), pretrained here on chains of tokens; LoRA of rank 8 on q, v, up and down learns 8 new
chains, 96 rows of 24 tokens, in 48 AdamW updates of 16 rows with a clip. Queries are held-out rows. Cost is CPU seconds
of this process on one thread. Worth is judged by real removals from the same first weights in the same order: every
single row (96 retrains), and random twentieths (drop-5 %). The list of removals is hashed before a score is computed.
"""

import hashlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from attribution.influence.gradients import Encoded
from attribution.influence.replay import LoraRun, RunRecipe, RunStep
from attribution.influence.unrolled import QUERIES_AT_ONCE, Unrolled, keep_states, unrolled_scores
from benchmarks.adapter_traffic import parser, report
from benchmarks.cuda.report import Figure

VOCABULARY, LENGTH, CHAINS, ROWS_PER_CHAIN, BATCH, LEARNING_RATE = 64, 24, 8, 12, 16, 5e-3
MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Scale:
    """How much is run. `num_drops`: retrains without a twentieth of the rows."""

    num_steps: int = 48
    num_queries: int = 16
    num_drops: int = 100
    pretraining_steps: int = 150


QUICK = Scale(num_drops=40)


def base_model(scale: Scale, *, seed: int) -> LlamaForCausalLM:
    """Return a tiny Llama that has seen chains, though none of those that are to be learned."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(scale.pretraining_steps):
        batch = torch.tensor([chain_row(1_000_000 + seed * 10_000 + step * 16 + row, row % 4) for row in range(16)])
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    return model.requires_grad_(False).eval()


def chain_row(seed: int, chain: int) -> list[int]:
    """Return a row of LENGTH tokens: after each token one of two follows, which two depends on the chain."""
    generator = np.random.default_rng(seed)
    follow = np.random.default_rng(7_000 + chain).integers(0, VOCABULARY, size=(VOCABULARY, 2))
    row = [int(generator.integers(VOCABULARY))]
    while len(row) < LENGTH:
        row.append(int(follow[row[-1], generator.integers(2)]))
    return row


def recorded_run(scale: Scale, *, seed: int) -> tuple[LoraRun, list[Encoded]]:
    """Return the run that is audited, and its queries."""
    model = base_model(scale, seed=seed)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    adapted: PeftModel = get_peft_model(model, config)  # type: ignore[arg-type]
    chains = [100 + chain for chain in range(CHAINS)]
    rows = [chain_row(seed * 1_000 + index, chains[index % CHAINS]) for index in range(CHAINS * ROWS_PER_CHAIN)]
    queries = [chain_row(seed * 1_000 + 500_000 + index, chains[index % CHAINS]) for index in range(scale.num_queries)]
    generator = np.random.default_rng(seed)
    order = np.concatenate([generator.permutation(len(rows)) for _ in range(-(-scale.num_steps * BATCH // len(rows)))])
    steps = tuple(
        RunStep(
            tuple(int(row) for row in order[step * BATCH : (step + 1) * BATCH]),
            LEARNING_RATE * (1 - step / scale.num_steps),
        )
        for step in range(scale.num_steps)
    )
    return LoraRun(adapted, [(row, row) for row in rows], RunRecipe(steps)), [(row, row) for row in queries]


def removals(run: LoraRun, scale: Scale, *, seed: int) -> tuple[torch.Tensor, str]:
    """Return the weights [b, n] of every retrain, single removals first, and the digest of the list."""
    generator = np.random.default_rng(seed)
    num_dropped = max(1, run.num_examples // 20)
    drops = torch.ones(scale.num_drops, run.num_examples)
    for row in drops:
        row[generator.choice(run.num_examples, num_dropped, replace=False)] = 0.0
    weights = torch.cat([1 - torch.eye(run.num_examples), drops])
    return weights, hashlib.sha256(weights.numpy().astype(np.uint8).tobytes()).hexdigest()


def seconds_of(work: Callable[[], object]) -> float:
    """Return the CPU seconds of a call."""
    started = time.process_time()
    work()
    return time.process_time() - started


def peak_bytes(work: Callable[[], object]) -> int:
    """Return by how much a call raised this process's memory at its highest (Linux: the high-water mark is reset)."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    work()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def agreement(found: Unrolled, real: NDArray[np.float64], weights: torch.Tensor) -> tuple[float, float]:
    """Return (mean over queries of Spearman, relative error) of predicted rises against real ones [b, q].

    Relative error: |predicted - real| over |real|, both as vectors over all retrains and queries.
    """
    predicted = (1 - weights.double().numpy()) @ found.scores.T
    ranks = [np.corrcoef(_ranks(predicted[:, q]), _ranks(real[:, q]))[0, 1] for q in range(real.shape[1])]
    return float(np.mean(ranks)), float(np.linalg.norm(predicted - real) / np.linalg.norm(real))


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values.argsort().argsort().astype(np.float64)


def figures(scale: Scale, *, seed: int) -> tuple[list[Figure], str]:
    """Run everything and return the table and the digest of the removals."""
    run, queries = recorded_run(scale, seed=seed)
    weights, digest = removals(run, scale, seed=seed)
    print(f"removals sha256:{digest}", flush=True)
    sets = [[query] for query in queries]
    states = keep_states(run)
    run_s = min(seconds_of(run.run) for _ in range(3))
    batch = weights[run.num_examples :][: 2 * run.runs_at_once()]
    many_s = seconds_of(lambda: run.run_many(batch)) / len(batch)
    half = (torch.rand(len(batch), run.num_examples, generator=torch.Generator().manual_seed(seed)) < 0.5).float()
    half_s = seconds_of(lambda: run.run_many(half)) / len(half)
    one_s = min(seconds_of(lambda: unrolled_scores(run, sets[:1], states=states)) for _ in range(2))
    all_s = seconds_of(lambda: unrolled_scores(run, sets, states=states)) / len(sets)
    peak = peak_bytes(lambda: unrolled_scores(run, sets, states=states))
    found = unrolled_scores(run, sets, states=states)
    plain = run.query_losses(run.run(), queries)
    real = (run.query_losses(run.run_many(weights), queries) - plain).double().numpy()
    singles = slice(0, run.num_examples)
    single = agreement(found, real[singles], weights[singles])
    drop = agreement(found, real[run.num_examples :], weights[run.num_examples :])
    return [
        Figure("one run", run_s, "CPU s"),
        Figure("a run among many, all rows but a twentieth", many_s, "CPU s"),
        Figure("a run among many, half of the rows", half_s, "CPU s"),
        Figure("solo / half of the rows among many", run_s / half_s, "ratio", 1.5),
        Figure("sweep for one query", one_s, "CPU s"),
        Figure(f"sweep for {len(sets)} queries, each", all_s, "CPU s"),
        Figure("one query / one run", one_s / run_s, "runs", 8.0, is_ceiling=True),
        Figure(f"each of {len(sets)} queries / one run", all_s / run_s, "runs", 5.0, is_ceiling=True),
        Figure(f"memory of a sweep for {min(len(sets), QUERIES_AT_ONCE)} queries", peak / MEBIBYTE, "MiB"),
        Figure("states held of one segment", found.num_states_held, "states"),
        Figure("weights", run.num_weights, "weights"),
        Figure("Spearman, every single removal", single[0], "", 0.8),
        Figure("relative error, every single removal", single[1], ""),
        Figure("LDS, drop-5 %", drop[0], "", 0.6),
        Figure("relative error, drop-5 %", drop[1], ""),
        Figure("|sum of effects| / sum of |effects|", float(found.cancellation.mean()), "ratio"),
        Figure("loss before and after, mean of queries", float(plain.mean()), "nats"),
    ], digest


def main(arguments: list[str] | None = None) -> int:
    """Print what an audit costs; return the exit status."""
    options = parser((__doc__ or "").splitlines()[0]).parse_args(arguments)
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    found, digest = figures(QUICK if options.quick else Scale(), seed=0)
    return report(found, options, removals=digest, torch=torch.__version__)


if __name__ == "__main__":
    sys.exit(main())
