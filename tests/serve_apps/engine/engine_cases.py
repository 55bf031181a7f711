"""What the engine's tests share: running requests to the end, and the oracles of transformers and PEFT."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from serve_apps.engine.config import AdapterRef, EngineConfig, Output, Request, SamplingParams
from serve_apps.engine.engine import Engine

# Rows of a GEMM differ by about 4e-5 with the batch size, so a smaller gap between the two best tokens is a tie.
TIE = 1e-4


def engine_for(base: Path, **settings: Any) -> Engine:
    """Build an engine of small limits."""
    limits = {"num_threads": 1, "max_model_len": 128, "kv_block_size": 4, "max_num_seqs": 8, **settings}
    return Engine(EngineConfig(str(base), **limits))


def ref(path: Path) -> AdapterRef:
    """Name an adapter by its folder."""
    return AdapterRef(f"sha256:{path.name}", str(path))


def request(request_id: str, prompt: Iterable[int], adapter: AdapterRef | None = None, **sampling: Any) -> Request:
    """A request that runs to `max_tokens` unless told otherwise."""
    params = {"max_tokens": 12, "ignore_eos": True, **sampling}
    return Request(request_id, tuple(prompt), SamplingParams(**params), adapter)


def run(engine: Engine, requests: Iterable[Request] = ()) -> dict[str, list[Output]]:
    """Add the requests, step until nothing is left, check the accounts after every step; outputs by request."""
    outputs: dict[str, list[Output]] = {}
    for item in requests:
        engine.add(item)
    while engine.has_unfinished:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        engine.check_integrity()
    return outputs


def tokens(outputs: list[Output]) -> list[int]:
    """Join the new tokens of one request's outputs."""
    return [token for output in outputs for token in output.new_token_ids]


def text(outputs: list[Output]) -> str:
    """Join the text of one request's outputs."""
    return "".join(output.text for output in outputs)


class Oracle:
    """transformers and PEFT, one request at a time, the whole sequence recomputed for every token."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self._models: dict[Path | None, Any] = {}

    def logits(self, token_ids: list[int], adapter: Path | None = None) -> torch.Tensor:
        """Return fp32 logits of every position, [tokens, vocabulary]."""
        if adapter not in self._models:
            model = AutoModelForCausalLM.from_pretrained(self._base, dtype=torch.float32)
            self._models[adapter] = (model if adapter is None else PeftModel.from_pretrained(model, adapter)).eval()
        with torch.inference_mode():
            return self._models[adapter](torch.tensor([token_ids])).logits[0].float()

    def explain(self, prompt: list[int], produced: list[int], adapter: Path | None = None) -> int:
        """Assert that `produced` is greedy after `prompt`, token by token on its own prefix; return the ties met."""
        logits = self.logits(prompt + produced, adapter)[len(prompt) - 1 : -1]
        num_ties = 0
        for step, token in enumerate(produced):
            best = logits[step].max()
            gap = float(best - logits[step, token])
            assert gap < TIE, f"token {step} is {token}, {gap:.6f} below the oracle's {int(logits[step].argmax())}"
            num_ties += int(token != int(logits[step].argmax()))
        return num_ties


def prompts(engine: Engine, count: int) -> list[list[int]]:
    """Return prompts of uneven lengths, chat questions of the tiny base."""
    from tests.tiny_model import QUESTIONS, conversation

    return [
        list(
            engine.tokenizer.apply_chat_template(
                conversation(QUESTIONS[index % len(QUESTIONS)][0], system=index % 2 == 1),
                add_generation_prompt=True,
                return_dict=False,
            )
        )
        for index in range(count)
    ]
