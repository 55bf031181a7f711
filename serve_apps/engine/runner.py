"""Owns the model and the KV cache; runs one step and finds out whose fault it is when that fails."""

from pathlib import Path

import torch

from kernels.large_pages import LargePages
from kernels.lora import LoraPool
from kernels.native import Native
from serve_apps.engine.architecture import ModelSpec
from serve_apps.engine.batch import build_batch
from serve_apps.engine.config import EngineConfig
from serve_apps.engine.cpu_forward import can_run
from serve_apps.engine.errors import InvalidRequest
from serve_apps.engine.graphs import Capture, CudaCapture, DecodeGraphs
from serve_apps.engine.kv_cache import KvCache, block_bytes
from serve_apps.engine.model import Model
from serve_apps.engine.sampler import sample
from serve_apps.engine.scheduler import Scheduled
from serve_apps.engine.sequence import Choice
from serve_apps.engine.weights import load_weights

# The default cache holds max_num_seqs full sequences, but on the CPU at most this (pages are taken on first use).
MAX_DEFAULT_CPU_KV_BYTES = 4 << 30
# ... and on CUDA never more than this share of what is free once the weights are loaded: adapters need room too.
MAX_DEFAULT_CUDA_SHARE = 0.5

StepResult = Choice | Exception | None


class Runner:
    """Weights, cache and the step. Errors of a step come back as values, one per sequence concerned."""

    def __init__(
        self,
        config: EngineConfig,
        spec: ModelSpec,
        *,
        lora_pool: LoraPool,
        device: torch.device,
        native: Native | None = None,
    ) -> None:
        """Load the weights; `lora_pool` lies on `device`, `native` computes on the CPU. Raises CorruptModel."""
        self.dtype = resolve_dtype(config.dtype, device, native)
        if device.type != "cpu" or not can_run(spec, self.dtype):
            native = None
        self.device = device
        self._lora_pool = lora_pool
        self.max_model_len = min(config.max_model_len, spec.max_positions)
        weights = load_weights(Path(config.base_path), spec, dtype=self.dtype, device=self.device, native=native)
        self.model = Model(spec, weights, max_positions=self.max_model_len, native=native)
        self.num_blocks = config.num_kv_blocks or self._default_num_blocks(config, spec)
        self._block_size = config.kv_block_size
        self.kv = KvCache(
            spec,
            num_blocks=self.num_blocks,
            block_size=config.kv_block_size,
            dtype=self.dtype,
            device=self.device,
            pages=None if native is None else LargePages(native),
        )
        self.graphs: DecodeGraphs | None = None
        if device.type == "cuda" and config.cuda_graphs:
            self.graphs = self.build_graphs(CudaCapture(device), max_batch=config.max_num_seqs)

    def build_graphs(self, capture: Capture, *, max_batch: int) -> DecodeGraphs:
        """Return graphs of the decode step; each is captured when its batch size first occurs."""
        return DecodeGraphs(
            lambda batch: self.model.forward(batch, self.kv),
            capture,
            lora_pool=self._lora_pool,
            max_batch=max_batch,
            max_blocks=-(-self.max_model_len // self._block_size),
            block_size=self._block_size,
            device=self.device,
        )

    def run(self, plan: list[Scheduled]) -> list[StepResult]:
        """Run one step; per item the chosen token, None where prefill goes on, or the exception that concerns it.

        When the batch as a whole raises (out of memory included), each sequence runs by itself: those that raise again
        are at fault, the others keep their result. Writing the same keys and values twice does no harm.
        """
        try:
            return self._run_together(plan)
        except Exception as error:
            if len(plan) == 1:
                return [error]
        return [result for item in plan for result in self.run([item])]

    def _run_together(self, plan: list[Scheduled]) -> list[StepResult]:
        choosing = [item.sequence for item in plan if item.gives_token]
        with torch.inference_mode():
            batch = build_batch(
                plan,
                lora_pool=self._lora_pool,
                block_size=self._block_size,
                device=self.device,
                is_paged=self.model.cuda_forward is not None,
                long_positions=self.max_model_len,
            )
            logits = None if self.graphs is None else self.graphs.run(batch)
            if logits is None:
                logits = self.model.forward(batch, self.kv)
            choices: list[Choice | Exception] = sample(logits, choosing) if choosing else []
        chosen = iter(choices)
        return [next(chosen) if item.gives_token else None for item in plan]

    def _default_num_blocks(self, config: EngineConfig, spec: ModelSpec) -> int:
        one_block = block_bytes(spec, block_size=config.kv_block_size, dtype=self.dtype)
        wanted = config.max_num_seqs * -(-self.max_model_len // config.kv_block_size)
        allowed = MAX_DEFAULT_CPU_KV_BYTES
        if self.device.type == "cuda":
            allowed = int(torch.cuda.mem_get_info(self.device)[0] * MAX_DEFAULT_CUDA_SHARE)
        return max(1, min(wanted, allowed // one_block))


def resolve_device(name: str) -> torch.device:
    """Return the device called `name`. Raises InvalidRequest when it is not cpu or cuda, or not here.

    Triton launches on the current device, so there is one GPU per process, chosen from outside.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidRequest(f"device={name!r} is not one; use cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise InvalidRequest(f"device={name!r} is not served; use cpu or cuda")
    if device.index:
        raise InvalidRequest(f"device={name!r} is not served; use cuda and choose the GPU by CUDA_VISIBLE_DEVICES")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InvalidRequest(f"device={name!r}: torch finds no CUDA device here; use device='cpu'")
    return device


def resolve_dtype(name: str, device: torch.device, native: Native | None) -> torch.dtype:
    """Return the dtype called `name`; "auto" is bfloat16 on CUDA and where the CPU multiplies it in one instruction.

    Without that instruction torch's bfloat16 products take 8 times as long as float32 (docs/log.md, 2026-11-22).
    """
    if name != "auto":
        return getattr(torch, name)
    is_fast = device.type == "cuda" or (native is not None and native.has_bf16_dot)
    return torch.bfloat16 if is_fast else torch.float32
