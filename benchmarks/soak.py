"""Random arrivals, aborts, loads, unloads, preemptions, prefix hits and chunked prefills; every token against PEFT.

    python -m benchmarks.soak [--requests N] [--quick] [--check] [--out FILE]

A tiny random Llama, 24 adapters of mixed ranks and modules, 22 prompts. Greedy references of every (adapter, prompt)
are computed once by PEFT, one at a time, the whole sequence anew for each token. A token that differs is explained only
where the reference's two best logits lie within 1e-4: rows of a product differ by up to 4e-5 with the batch's size. The
engine's rooms are small on purpose: few KV blocks, adapters for a quarter of those that exist, chunks of 24 tokens.
"""

import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.adapter_traffic import draw, parser, report, write_adapters
from benchmarks.gpu_check import VOCABULARY_SIZE, Figure, save_model
from serve_apps.engine.config import AdapterRef, EngineConfig, Output, Request, SamplingParams
from serve_apps.engine.engine import Engine
from serve_apps.engine.errors import AdapterInUse

NUM_ADAPTERS, NUM_PROMPTS, MAX_TOKENS = 24, 22, 12
TIE = 1e-4
MODULES = (("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj"))
CONFIG: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Reference:
    """What PEFT alone continues with, and at each token the gap between its two best logits."""

    token_ids: tuple[int, ...]
    gaps: tuple[float, ...]


@dataclass
class Tally:
    """What happened."""

    events: Counter[str] = field(default_factory=Counter)
    num_tokens: int = 0
    num_ties: int = 0
    mismatches: list[str] = field(default_factory=list)

    def judge(self, name: str, produced: list[int], reference: Reference) -> None:
        """Compare up to the first difference; behind it the two have different pasts."""
        for step, token in enumerate(produced):
            if token != reference.token_ids[step]:
                if reference.gaps[step] < TIE:
                    self.num_ties += 1
                else:
                    gap = reference.gaps[step]
                    self.mismatches.append(f"{name}: token {step} is {token}, not {reference.token_ids[step]}; {gap=}")
                return
            self.num_tokens += 1


def make_prompts() -> list[tuple[int, ...]]:
    """Return prompts of 3 to 60 tokens, of which half begin alike, so that prefixes are found across prompts."""
    chooser = random.Random(5)
    system = [chooser.randrange(1, VOCABULARY_SIZE) for _ in range(24)]
    own = [[chooser.randrange(1, VOCABULARY_SIZE) for _ in range(3 + 3 * index // 2)] for index in range(NUM_PROMPTS)]
    return [(*(system if index % 2 else []), *tokens) for index, tokens in enumerate(own)]


@torch.inference_mode()
def references(base: Path, refs: list[AdapterRef], prompts: list[tuple[int, ...]]) -> dict[tuple[int, int], Reference]:
    """Return the reference of every (adapter, prompt); adapter -1 is the base model."""
    found: dict[tuple[int, int], Reference] = {}
    for adapter in range(-1, len(refs)):
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if adapter >= 0:
            model = PeftModel.from_pretrained(model, refs[adapter].path)
        model.eval()
        for index, prompt in enumerate(prompts):
            token_ids, gaps = list(prompt), []
            for _ in range(MAX_TOKENS):
                best = model(torch.tensor([token_ids])).logits[0, -1].float().topk(2)
                token_ids.append(int(best.indices[0]))
                gaps.append(float(best.values[0] - best.values[1]))
            found[adapter, index] = Reference(tuple(token_ids[len(prompt) :]), tuple(gaps))
    return found


class Soak:
    """Drives one engine with random events and judges what comes out."""

    def __init__(
        self,
        engine: Engine,
        refs: list[AdapterRef],
        prompts: list[tuple[int, ...]],
        known: dict[tuple[int, int], Reference],
        *,
        num_requests: int,
        seed: int,
    ) -> None:
        self.engine, self.refs, self.prompts, self.known = engine, refs, prompts, known
        self.chooser = random.Random(seed)
        self.num_requests = num_requests
        self.adapters = draw("zipf", len(refs) + 1, num_requests, seed=seed)
        self.running: dict[str, tuple[tuple[int, int], list[int]]] = {}
        self.tally = Tally()
        self.num_added = 0

    def run(self) -> Tally:
        """Run until every request has ended."""
        num_rounds = 0
        while self.num_added < self.num_requests or self.engine.has_unfinished:
            self.arrive()
            self.disturb()
            for output in self.engine.step():
                self.take(output)
            num_rounds += 1
            if num_rounds % 50 == 0:
                self.engine.check_integrity()
        self.engine.check_integrity()
        return self.tally

    def arrive(self) -> None:
        """Add a burst of requests now and then, while few enough are under way."""
        burst = self.chooser.choice((0, 0, 1, 2, 5))
        for _ in range(min(burst, self.num_requests - self.num_added, 60 - len(self.running))):
            key = (self.adapters[self.num_added] - 1, self.chooser.randrange(len(self.prompts)))
            name = f"r{self.num_added}"
            sampling = SamplingParams(max_tokens=self.chooser.randint(1, MAX_TOKENS), ignore_eos=True)
            adapter = None if key[0] < 0 else self.refs[key[0]]
            tenant = self.chooser.choice("aab")
            self.engine.add(Request(name, self.prompts[key[1]], sampling, adapter, tenant))
            self.running[name] = (key, [])
            self.num_added += 1

    def disturb(self) -> None:
        """Abort, load or unload at random."""
        point = self.chooser.random()
        ref = self.chooser.choice(self.refs)
        if point < 0.03 and self.running:
            output = self.engine.abort(self.chooser.choice(list(self.running)))
            assert output is not None
            self.tally.events["aborts"] += 1
            self.take(output)
        elif point < 0.05:
            self.engine.prefetch(ref)
            self.tally.events["prefetches"] += 1
        elif point < 0.08:
            try:
                self.tally.events["unloads"] += self.engine.unload(ref.digest)
            except AdapterInUse:
                self.tally.events["unloads refused"] += 1

    def take(self, output: Output) -> None:
        """Collect a request's tokens and judge them at its end."""
        key, produced = self.running[output.request_id]
        produced += output.new_token_ids
        asked = None if key[0] < 0 else self.refs[key[0]].digest
        if output.error or (output.new_token_ids and output.adapter_digest != asked):
            self.tally.mismatches.append(f"{output.request_id}: {output.error or output.adapter_digest}")
        if output.finished:
            del self.running[output.request_id]
            self.tally.judge(f"{output.request_id} {key}", produced, self.known[key])


def build(folder: Path) -> tuple[Path, list[AdapterRef]]:
    """Write the model and its adapters, strong enough to change every answer."""
    base, config = folder / "base", LlamaConfig(**CONFIG)
    save_model(config, base, dtype=torch.float32)
    refs: list[AdapterRef] = []
    for index, modules in enumerate(MODULES):
        ranks = (1, 2, 8, 3, 16, 5)
        refs += write_adapters(
            folder / f"m{index}", config, NUM_ADAPTERS // len(MODULES), ranks=ranks, modules=modules, scale=0.4
        )
    return base, [AdapterRef(f"sha256:{number}", ref.path) for number, ref in enumerate(refs)]


def main(arguments: list[str] | None = None) -> int:
    """Run the soak; return the exit status."""
    options_parser = parser((__doc__ or "").splitlines()[0])
    options_parser.add_argument("--requests", type=int, default=None, help="default 100000, with --quick 4000")
    options_parser.add_argument("--seed", type=int, default=0, help="of arrivals and disturbances")
    options = options_parser.parse_args(arguments)
    num_requests = options.requests or (4000 if options.quick else 100_000)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    peer = f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    print(f"{num_requests} requests, zipf 1.0 over {NUM_ADAPTERS} adapters and the base, against {peer}, one at a time")
    with tempfile.TemporaryDirectory() as name:
        base, refs = build(Path(name))
        prompts = make_prompts()
        known = references(base, refs, prompts)
        engine = Engine(
            EngineConfig(
                str(base),
                num_threads=1,
                max_num_seqs=12,
                max_model_len=96,
                kv_block_size=4,
                num_kv_blocks=64,
                max_step_tokens=24,
                adapter_cache_bytes=200_000,
                adapter_host_bytes=300_000,
                max_step_adapter_bytes=150_000,
                tenant_weights=(("b", 2.0),),
            )
        )
        start = time.perf_counter()
        tally = Soak(engine, refs, prompts, known, num_requests=num_requests, seed=options.seed).run()
        seconds = time.perf_counter() - start
        stats = engine.stats()
    for line in tally.mismatches[:20]:
        print("MISMATCH", line)
    return report(figures(tally, stats, len(known), num_requests=num_requests, seconds=seconds), options, peer=peer)


def figures(
    tally: Tally, stats: dict[str, object], num_references: int, *, num_requests: int, seconds: float
) -> list[Figure]:
    """Return what is judged, and of everything that should have happened how often it did."""

    def stat(name: str) -> float:
        return float(str(stats[name]))

    happened = {
        "preemptions": stat("num_preemptions"),
        "prompt tokens found in the prefix cache": stat("prefix_hit_tokens"),
        "KV blocks evicted": stat("prefix_evicted_blocks"),
        "adapters evicted from the device": stat("adapter_evictions"),
        "bytes moved by compaction": stat("adapter_moved_bytes"),
        "adapters read from disk": stat("adapter_reads"),
        **{name: float(tally.events[name]) for name in ("aborts", "prefetches", "unloads", "unloads refused")},
    }
    return [
        Figure("unexplained mismatches", len(tally.mismatches), "requests", 0.0, is_ceiling=True),
        Figure("near-ties (two best logits within 1e-4)", tally.num_ties, "requests"),
        Figure("tokens equal to PEFT's", tally.num_tokens, "tokens"),
        Figure("references", num_references, "(adapter, prompt)", 500.0),
        *(Figure(name, value, "in all", 1.0) for name, value in happened.items()),
        Figure("requests per second", num_requests / seconds, "requests/s"),
    ]


if __name__ == "__main__":
    sys.exit(main())
