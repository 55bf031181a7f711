"""A completion's 20 best of 100,000 training examples, against one forward and backward of that completion.

    python -m benchmarks.online_attribution [--quick] [--check] [--out FILE] [--rows N] [--base DIR] [--device cuda]

The base is SmolLM2-135M's shape: the model itself from a Hugging Face folder (`--base`), else random weights of its
shape, which cost the same; a rank-16 adapter on all linears is trained for some steps on invented facts, so that its
gradients are real. The store is the product's: EK-FAC rows summed over the run's three checkpoints. Of its rows some
are real; the others, up to 100,000, are synthetic ones of the true shape and type: normal numbers with the real rows'
standard deviation in each column, quantised alike. Scoring reads them all either way, so the time is that of real ones.

A question is what `trailmark` asks by default (`question_of`): the completion's gradient at the middle and at the last
checkpoint, their mean cleared of the store's residual, against all rows. It is timed from token ids to 20 example ids
with scores; what it is held against, on the same threads and in turns with it, is one forward with loss and
`backward()` of the same completion through the same adapter. Asked twice, and of the store opened anew, the answer must
be the same bytes. The last line is one JSON object.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from torch import Tensor

from attribution.influence.build import View, build_store
from attribution.influence.ekfac import CodecSettings
from attribution.influence.factors import Encoded, LoraFactors, set_factor_weights
from attribution.influence.gradient_store import GradientStore
from attribution.influence.query import checkpoint_rows, served_again
from attribution.influence.question import asked_of_all, asked_views
from attribution.influence.topk import top_examples
from benchmarks.cuda.report import Figure
from configs.schema import TrainSettings
from pipelines.train.data import checkpoint_steps

NUM_BEST = 20
MAX_RATIO = 3.0
NUM_STEPS, TAUGHT_AT_ONCE = 9, 8
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Plan:
    """How much is done. `num_real`: examples whose gradients are real; `num_questions`: completions asked."""

    shape: dict[str, Any]
    num_rows: int
    num_real: int
    num_fitted: int
    num_questions: int
    dim: int
    basis_dim: int
    rank: int = 16
    prompt_tokens: int = 24
    output_tokens: int = 16


FULL = Plan(SMOLLM2, 100_000, 128, 32, 40, dim=4096, basis_dim=32)
QUICK = Plan(SMOLLM2, 100_000, 32, 16, 12, dim=4096, basis_dim=32)
TOY = Plan(TINY, 300, 24, 8, 3, dim=512, basis_dim=32, rank=4)


class Bench:
    """The adapted model, its examples and its store."""

    def __init__(self, plan: Plan, folder: Path, *, base: Path | None, device: str) -> None:
        self.plan, self.device = plan, device
        self.model = _model(plan, base).to(device)
        self.examples = {f"real-{number:06}": self._example(number) for number in range(plan.num_real)}
        self.factors = LoraFactors(self.model)
        self.checkpoints = dict(self._teach(TrainSettings().num_checkpoints))
        started = time.process_time()
        self.store = self._build(folder / "store")
        self.build_cpu_s = time.process_time() - started
        self._fill()
        self.codec = self.store.codec(self.store.views[0]).to(device)

    def _example(self, seed: int) -> Encoded:
        """Token ids drawn by a seed: a prompt that carries no loss, an answer that does."""
        generator = np.random.default_rng(seed)
        ids = generator.integers(3, self.plan.shape["vocab_size"], self.plan.prompt_tokens + self.plan.output_tokens)
        return ids.tolist(), [-100] * self.plan.prompt_tokens + ids[self.plan.prompt_tokens :].tolist()

    def _teach(self, num_checkpoints: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Train for some steps, so that B is no longer zero and A has gradients; yield the weights at some of them."""
        parameters = [value for value in self.model.parameters() if value.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        rows, kept = list(self.examples.values()), checkpoint_steps(NUM_STEPS, num_checkpoints)
        for step in range(1, NUM_STEPS + 1):
            for index in range(TAUGHT_AT_ONCE):
                self._loss(*rows[(step * TAUGHT_AT_ONCE + index) % len(rows)]).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step in kept:
                yield str(step), {name: value.detach().clone() for name, value in self.factors.parameters().items()}

    def _build(self, path: Path) -> GradientStore:
        settings = CodecSettings("ekfac", dim=self.plan.dim, basis_dim=self.plan.basis_dim)
        views = [View(step, partial(set_factor_weights, self.factors, one)) for step, one in self.checkpoints.items()]
        return build_store(path, self.factors, self.examples, views, settings, sample_size=self.plan.num_fitted)

    def _fill(self) -> None:
        """Add synthetic rows up to the plan's number."""
        (view,), shards = self.store.views, self.store.shards
        units = np.concatenate([shard.rows(view).values() / shard.lengths(view)[:, None] for shard in shards])
        generator, spread = np.random.default_rng(0), units.std(axis=0)
        missing = self.plan.num_rows - self.plan.num_real
        weights = np.full((missing, 1), shards[0].weights.mean())
        with self.store.adding([f"synthetic-{number:06}" for number in range(missing)], weights=weights) as addition:
            for start in range(0, missing, 2048):
                rows = range(start, min(start + 2048, missing))
                values = generator.standard_normal((len(rows), self.store.dim(view)), dtype=np.float32)
                addition.put(view, rows, values * spread, lengths=np.ones(len(rows), np.float32))

    def _loss(self, ids: Sequence[int], labels: Sequence[int]) -> Any:
        tensors = (torch.tensor([part], device=self.device) for part in (ids, labels))
        return self.model(**dict(zip(("input_ids", "labels"), tensors, strict=True)), use_cache=False).loss

    def forward_backward(self, example: Encoded) -> None:
        """What a question is held against."""
        self._loss(*example).backward()
        self.model.zero_grad()
        self._wait()

    def rows(self, example: Encoded) -> NDArray[np.float32]:
        """The completion's rows [checkpoints asked, 1, d]: a forward, a backward and the codec at each."""
        with served_again(self.factors):
            asked = [self.checkpoints[step] for step in asked_views(self.store.steps)]
            return np.stack([checkpoint_rows(self.factors, self.codec, example, weights) for weights in asked])

    def ask(self, rows: NDArray[np.float32], store: GradientStore | None = None) -> str:
        """The best examples as JSON."""
        store = store or self.store
        found = top_examples(store, asked_of_all(store, rows, "cosine"), k=NUM_BEST, device=self.device)
        return json.dumps([[hit.example_id, hit.score] for hit in found[0]])

    def question(self, number: int) -> Encoded:
        """A completion that is no training row."""
        return self._example(1_000_000 + number)

    def _wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()


def measure(bench: Bench) -> list[Figure]:
    """Ask every question in turns with its forward and backward."""
    whole: list[float] = []
    alone: list[float] = []
    rest_cpu: list[float] = []
    is_same = True
    for number in range(-2, bench.plan.num_questions):  # two warm up
        example = bench.question(number)
        alone_s = _seconds(lambda example=example: bench.forward_backward(example))
        started = time.perf_counter()
        rows = bench.rows(example)
        rest_started = time.process_time()
        answer = bench.ask(rows)
        rest_s, whole_s = time.process_time() - rest_started, time.perf_counter() - started
        if number >= 0:
            for values, value in ((whole, whole_s), (alone, alone_s), (rest_cpu, rest_s)):
                values.append(value)
            is_same &= answer == bench.ask(bench.rows(example))
    again = GradientStore(bench.store.path)
    is_same &= answer == bench.ask(bench.rows(example), again)
    ratios = [one / other for one, other in zip(whole, alone, strict=True)]
    return [
        Figure("examples in the store", bench.store.num_examples, "examples"),
        Figure("of these with real gradients", bench.plan.num_real, "examples"),
        Figure("checkpoints in a row", len(bench.store.steps), "checkpoints"),
        Figure("forward and backward passes of a question", len(asked_views(bench.store.steps)), "passes"),
        Figure("bytes per example", bench.store.bytes_per_example, "bytes"),
        Figure("bytes of the codec", bench.store.codec_bytes, "bytes"),
        Figure("energy kept of the fitted sample", bench.codec.energy_kept, "of 1"),
        Figure("build, per real example, fit and all", bench.build_cpu_s / bench.plan.num_real, "CPU s"),
        Figure("forward + backward, p50", statistics.median(alone), "s"),
        Figure("question, p50", statistics.median(whole), "s"),
        Figure("question, p95", float(np.quantile(whole, 0.95)), "s"),
        Figure("scan and top 20 alone, p50", statistics.median(rest_cpu), "CPU s"),
        Figure("question / forward + backward, p50", statistics.median(ratios), "ratio", MAX_RATIO, is_ceiling=True),
        Figure("asked twice, and of the store opened anew: same bytes", float(is_same), "of 1", 1.0),
    ]


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _model(plan: Plan, base: Path | None) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if base is not None:
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    else:
        plain = LlamaForCausalLM(LlamaConfig(**plan.shape, attn_implementation="eager"))
    config = LoraConfig(r=plan.rank, lora_alpha=2 * plan.rank, target_modules=LINEARS)
    return get_peft_model(plain, config).eval()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table and the JSON line; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="32 real gradients instead of 128, 12 questions")
    parser.add_argument("--check", action="store_true", help="exit 1 when a figure misses its floor")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--toy", action="store_true", help="a tiny model and 300 rows; no floor on times")
    parser.add_argument("--base", type=Path, help="a Hugging Face folder of SmolLM2-135M")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args(arguments)
    plan = TOY if options.toy else QUICK if options.quick else FULL
    hardware = f"{platform.machine()}, {torch.get_num_threads()} threads of {os.cpu_count()}, torch {torch.__version__}"
    if options.device != "cpu":
        hardware = torch.cuda.get_device_name()
    weights = str(options.base) if options.base else "random weights of its shape"
    print(f"{(__doc__ or '').splitlines()[0]}\non {hardware}; {weights}; {plan.num_rows} rows")
    with tempfile.TemporaryDirectory(prefix="online-attribution-") as folder:
        figures = measure(Bench(plan, Path(folder), base=options.base, device=options.device))
    if options.toy:
        figures = [figure for figure in figures if "p50" not in figure.name and "p95" not in figure.name]
    for figure in figures:
        print(figure.line)
    line = json.dumps({"hardware": hardware, "weights": weights, "figures": [asdict(figure) for figure in figures]})
    if options.out:
        options.out.write_text(line + "\n")
    print(line)
    return 1 if options.check and not all(figure.is_good for figure in figures) else 0


if __name__ == "__main__":
    sys.exit(main())
