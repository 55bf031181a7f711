"""Random arrivals, aborts, loads, unloads, preemptions, prefix hits and chunked prefills; every token against PEFT.

    python -m benchmarks.soak [--requests N] [--quick] [--check] [--out FILE]

A tiny random Llama, 24 adapters of mixed ranks and modules under 18 names, 22 prompts. Half the requests are greedy,
half are drawn from a seed with temperature, top_k, top_p, min_p, penalties and biases, some of those with two choices;
some stop at a string across tokens or at a token. Tokens, texts and ends are held against `soak_oracle`; what a near
border excuses is counted. A name may come back with other weights after an unload. The engine's rooms are small on
purpose: few KV blocks, adapters for a quarter of those that exist, chunks of 24 tokens.
"""

import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers import AutoTokenizer, LlamaConfig

from benchmarks.adapter_traffic import draw, parser, report, write_adapters
from benchmarks.gpu_check import VOCABULARY_SIZE, Figure, save_model
from benchmarks.soak_oracle import MAX_TOKENS, NUM_CHOICES, TIE, Key, Reference, references, sampling_of
from serve_apps.engine.config import AdapterRef, EngineConfig, Output, Request, SamplingParams
from serve_apps.engine.engine import Engine
from serve_apps.engine.errors import AdapterInUse

NUM_ADAPTERS, NUM_NAMES, NUM_PROMPTS = 24, 18, 22
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


@dataclass
class Running:
    """A request under way: what it must become, and what it is so far."""

    key: Key
    sampling: SamplingParams
    adapter: AdapterRef | None
    token_ids: list[int] = field(default_factory=list)
    text: str = ""


@dataclass
class Tally:
    """What happened."""

    events: Counter[str] = field(default_factory=Counter)
    num_tokens: int = 0
    num_ties: int = 0
    mismatches: list[str] = field(default_factory=list)

    def judge(self, name: str, running: Running, reference: Reference, finish_reason: str | None) -> None:
        """Compare up to the first difference; behind it the two have different pasts."""
        for step, token in enumerate(running.token_ids):
            if token != reference.token_ids[step]:
                if token in reference.others[step]:
                    self.num_ties += 1
                else:
                    self.mismatches.append(f"{name}: token {step} is {token}, not {reference.token_ids[step]}")
                return
            self.num_tokens += 1
        count = len(running.token_ids)
        expected = reference.end(running.sampling)
        if finish_reason == "abort":
            expected = ("abort", min(count, expected[1] - 1), reference.texts[count])
        if (finish_reason, count, running.text) != expected:
            self.mismatches.append(f"{name}: ends as {(finish_reason, count, running.text)}, not {expected}")


def make_prompts() -> list[tuple[int, ...]]:
    """Return prompts of 3 to 60 tokens, of which half begin alike, so that prefixes are found across prompts."""
    chooser = random.Random(5)
    system = [chooser.randrange(1, VOCABULARY_SIZE) for _ in range(24)]
    own = [[chooser.randrange(1, VOCABULARY_SIZE) for _ in range(3 + 3 * index // 2)] for index in range(NUM_PROMPTS)]
    return [(*(system if index % 2 else []), *tokens) for index, tokens in enumerate(own)]


class Soak:
    """Drives one engine with random events and judges what comes out."""

    def __init__(
        self,
        engine: Engine,
        refs: list[AdapterRef],
        prompts: list[tuple[int, ...]],
        known: Mapping[Key, Reference],
        *,
        num_requests: int,
        seed: int,
        num_names: int | None = None,
    ) -> None:
        """Adapters from `num_names` on share the names of the first ones and take turns with them."""
        self.engine, self.refs, self.prompts, self.known = engine, refs, prompts, known
        self.chooser = random.Random(seed)
        self.num_requests = num_requests
        self.num_names = num_names or len(refs)
        self.named = [list(range(name, len(refs), self.num_names)) for name in range(self.num_names)]
        self.asked_names = draw("zipf", self.num_names + 1, num_requests, seed=seed)
        self.running: dict[str, Running] = {}
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
        for _ in range(self.chooser.choice((0, 0, 1, 2, 5))):
            if len(self.running) >= 60 or self.num_added >= self.num_requests:
                return
            name = self.asked_names[self.num_added] - 1
            adapter = -1 if name < 0 else self.named[name][0]
            prompt = self.chooser.randrange(len(self.prompts))
            num_choices = min(self.chooser.choice((0, 0, 1, NUM_CHOICES)), self.num_requests - self.num_added)
            keys = [(adapter, prompt, choice) for choice in range(num_choices)] or [(adapter, prompt, -1)]
            self.tally.events["requests drawn from a seed"] += num_choices
            self.tally.events["pairs of choices"] += num_choices > 1
            for key in keys:
                self.add(key)

    def add(self, key: Key) -> None:
        """Add one request, with limits of its own."""
        adapter = None
        if key[0] >= 0:
            adapter = AdapterRef(f"sha256:{key[0] % self.num_names}", self.refs[key[0]].path)
        sampling = self.limited(key)
        name = f"r{self.num_added} {key}"
        tenant = self.chooser.choice("aab")
        self.engine.add(Request(name, self.prompts[key[1]], sampling, adapter, tenant))
        self.running[name] = Running(key, sampling, adapter)
        self.num_added += 1

    def limited(self, key: Key) -> SamplingParams:
        """Return a reference's sampling with a length, and at times a stop string or token that the reference holds."""
        sampling = replace(sampling_of(key), max_tokens=self.chooser.randint(1, MAX_TOKENS))
        point, reference = self.chooser.random(), self.known[key]
        if point < 0.15:
            text = reference.texts[-1]
            start = self.chooser.randrange(len(text))
            return replace(sampling, stop=(text[start : start + self.chooser.randint(2, 9)], "never said"))
        if point < 0.25:
            return replace(sampling, stop_token_ids=(self.chooser.choice(reference.token_ids),))
        return sampling

    def disturb(self) -> None:
        """Abort, load or unload at random."""
        point = self.chooser.random()
        name = self.chooser.randrange(self.num_names)
        ref = AdapterRef(f"sha256:{name}", self.refs[self.named[name][0]].path)
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
            else:
                self.exchange(name)

    def exchange(self, name: int) -> None:
        """Let an unloaded name that nobody waits for come back with other weights."""
        is_wanted = any(item.adapter and item.adapter.digest == f"sha256:{name}" for item in self.running.values())
        if len(self.named[name]) > 1 and not is_wanted:
            self.named[name].append(self.named[name].pop(0))
            self.tally.events["names given to other weights"] += 1

    def take(self, output: Output) -> None:
        """Collect a request's tokens and text and judge them at its end."""
        running = self.running[output.request_id]
        running.token_ids += output.new_token_ids
        running.text += output.text
        asked = None if running.adapter is None else running.adapter.digest
        if output.error or (output.new_token_ids and output.adapter_digest != asked):
            self.tally.mismatches.append(f"{output.request_id}: {output.error or output.adapter_digest}")
        if output.finished:
            del self.running[output.request_id]
            self.tally.events["ends at a stop string or token"] += output.finish_reason == "stop"
            self.tally.judge(output.request_id, running, self.known[running.key], output.finish_reason)


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
    return base, refs


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
    print(f"{num_requests} requests, zipf 1.0 over {NUM_NAMES} names and the base, against {peer}, one at a time")
    with tempfile.TemporaryDirectory() as name:
        base, refs = build(Path(name))
        prompts = make_prompts()
        known = references(base, [Path(ref.path) for ref in refs], prompts, AutoTokenizer.from_pretrained(base))
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
        tally = Soak(
            engine, refs, prompts, known, num_requests=num_requests, seed=options.seed, num_names=NUM_NAMES
        ).run()
        seconds = time.perf_counter() - start
        stats = engine.stats()
    for line in tally.mismatches[:20]:
        print("MISMATCH", line)
    return report(figures(tally, stats, known, num_requests=num_requests, seconds=seconds), options, peer=peer)


def figures(
    tally: Tally, stats: dict[str, object], known: Mapping[Key, Reference], *, num_requests: int, seconds: float
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
        **{name: float(count) for name, count in sorted(tally.events.items())},
    }
    num_near = sum(bool(others) for reference in known.values() for others in reference.others)
    return [
        Figure("unexplained mismatches", len(tally.mismatches), "requests", 0.0, is_ceiling=True),
        Figure(f"excused: the reference lies within {TIE} of a border", tally.num_ties, "requests"),
        Figure("tokens equal to PEFT's", tally.num_tokens, "tokens"),
        Figure("references: greedy", sum(key[2] < 0 for key in known), "(adapter, prompt)", 500.0),
        Figure("references: drawn", sum(key[2] >= 0 for key in known), "(adapter, prompt, choice)", 500.0),
        Figure("tokens of the references near a border", num_near, f"of {len(known) * MAX_TOKENS}"),
        *(Figure(name, value, "in all", 1.0) for name, value in happened.items()),
        Figure("requests per second", num_requests / seconds, "requests/s"),
    ]


if __name__ == "__main__":
    sys.exit(main())
