"""Greedy answers of many adapters to a suite's questions, by the engine that serves, all in one batch."""

from collections.abc import Sequence
from pathlib import Path

from pipelines.benchmark.compare import is_exact
from pipelines.benchmark.suites import Item

MAX_NUM_SEQS = 32


def greedy_answers(
    items: Sequence[Item],
    adapters: Sequence[Path],
    *,
    base_path: str,
    base_digest: str,
    max_new_tokens: int,
) -> list[list[str]]:
    """Return each adapter's answers, in the items' order. Raises BenchmarkError where the model cannot take an item."""
    from attribution.influence.encode import encode_prompt
    from pipelines.benchmark.run import BenchmarkError
    from serve_apps.engine.config import AdapterRef, EngineConfig, Request, SamplingParams
    from serve_apps.engine.engine import Engine

    engine = Engine(
        EngineConfig(base_path=base_path, base_digest=base_digest, dtype="float32", max_num_seqs=MAX_NUM_SEQS)
    )
    sampling = SamplingParams(max_tokens=max_new_tokens)
    prompts = [tuple(encode_prompt(engine.tokenizer, [{"role": "user", "content": item.prompt}])) for item in items]
    for number, path in enumerate(adapters):
        ref = AdapterRef(f"coalition-{number}", str(path))
        for place, prompt in enumerate(prompts):
            engine.add(Request(f"{number}:{place}", prompt, sampling, adapter=ref))
    texts: dict[str, str] = {}
    while engine.has_unfinished:
        for output in engine.step():
            if output.finish_reason == "error":
                raise BenchmarkError(f"suite item {output.request_id}: the engine failed: {output.error}")
            texts[output.request_id] = texts.get(output.request_id, "") + output.text
    return [[texts[f"{number}:{place}"].strip() for place in range(len(items))] for number in range(len(adapters))]


def matches(items: Sequence[Item], texts: Sequence[str]) -> list[float]:
    """Return 1 for each answer that is exactly right, else 0."""
    return [float(is_exact(text, item)) for text, item in zip(texts, items, strict=True)]
