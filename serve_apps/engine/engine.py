"""The engine: add requests, step, take outputs. Free of Ray; one thread at a time (`AsyncEngine` owns that thread)."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch

from configs import env
from kernels.native import Native
from kernels.native import load as load_native
from serve_apps.engine.adapter import inspect_adapter, read_adapter
from serve_apps.engine.adapter_loads import AdapterLoads
from serve_apps.engine.adapter_pool import AdapterPool
from serve_apps.engine.architecture import LINEAR_MODULES, ModelSpec, read_spec
from serve_apps.engine.config import AdapterRef, EngineConfig, FinishReason, Output, Request, TokenLogprob
from serve_apps.engine.errors import CorruptModel, EngineError, InvalidRequest, PromptTooLong
from serve_apps.engine.grammar import Grammars, GrammarState
from serve_apps.engine.host_tier import HostTier
from serve_apps.engine.kv_cache import BlockAllocator
from serve_apps.engine.runner import Runner, StepResult, resolve_device, resolve_dtype
from serve_apps.engine.scheduler import Scheduled, Scheduler, SchedulerLimits
from serve_apps.engine.sequence import Choice, Sequence

# How long a step waits for an adapter when there is nothing else to do: what an abort or a new request may be delayed.
MAX_IDLE_WAIT_S = 0.01


class Engine:
    """Serves one base model and any number of its LoRA adapters in mixed batches."""

    def __init__(self, config: EngineConfig) -> None:
        """Load base model and tokenizer. Raises UnsupportedModel, CorruptModel, InvalidRequest.

        `config.num_threads` sets torch's thread count for the whole process.
        """
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self.config = config
        self.spec = read_spec(Path(config.base_path))
        self.tokenizer: Any = _tokenizer(config.base_path)
        device = resolve_device(config.device)
        native = load_native(env.cache_home()) if _wants_native(config, device) else None
        self.pool = _adapter_pool(config, self.spec, device, native)
        self._runner = Runner(config, self.spec, lora_pool=self.pool.lora, device=device, native=native)
        self._allocator = BlockAllocator(self._runner.num_blocks)
        self._loads = AdapterLoads(self.pool, max_step_bytes=config.max_step_adapter_bytes)
        self._scheduler = Scheduler(self._allocator, self._loads, _limits(config))
        self._eos_token_ids = self.spec.eos_token_ids | (
            set() if self.tokenizer.eos_token_id is None else {self.tokenizer.eos_token_id}
        )
        self._grammars = Grammars(self.tokenizer, vocab_size=self.spec.vocab_size, end_token_ids=self._eos_token_ids)
        self._sequences: dict[str, Sequence] = {}
        self._num_arrivals = self._num_steps = self._num_prefill_tokens = self._num_output_tokens = 0

    @property
    def max_model_len(self) -> int:
        """The most tokens that prompt and output may have together."""
        return min(self._runner.max_model_len, self._runner.num_blocks * self.config.kv_block_size)

    @property
    def has_unfinished(self) -> bool:
        """Whether a step would find work."""
        return bool(self._sequences)

    def add(self, request: Request) -> None:
        """Queue a request; its adapter is read in the background while others run.

        Raises PromptTooLong, InvalidRequest (empty prompt, token out of range, id in use, grammar), MissingExtra,
        UnknownAdapter, CorruptAdapter, UnsupportedAdapter, AdapterTooLarge, as far as the adapter's config and the head
        of its weights tell; nothing is queued then. What only the whole file tells ends the request with finish_reason
        "error".
        """
        self._check(request)
        grammar = self.prepare(request)
        if request.adapter is not None and not self.pool.is_known(request.adapter.digest):
            self.pool.check_size(request.adapter.digest, inspect_adapter(request.adapter, self.spec))
        room = self.max_model_len - len(request.prompt_token_ids)
        sequence = Sequence(
            request,
            arrival=self._num_arrivals,
            max_new_tokens=min(request.sampling.max_tokens, room),
            tokenizer=self.tokenizer,
            eos_token_ids=self._eos_token_ids,
            grammar=grammar,
            long_from=self.spec.long_from,
        )
        self._num_arrivals += 1
        self._sequences[request.request_id] = sequence
        self._scheduler.add(sequence)

    def prepare(self, request: Request) -> GrammarState | None:
        """Compile the request's grammar, or take it from those kept; safe to call from another thread beforehand."""
        return None if request.sampling.grammar is None else self._grammars.start(request.sampling.grammar)

    def step(self) -> list[Output]:
        """Schedule, run, commit: one forward pass over the next tokens of the running requests.

        With nothing to run but adapters on their way, waits for one of them, `MAX_IDLE_WAIT_S` at most.
        """
        outputs: list[Output] = []

        def on_failure(sequence: Sequence, error: EngineError) -> None:
            outputs.append(self._forget(sequence, error))

        plan = self._scheduler.schedule(on_failure)
        if not plan and not outputs and self._loads.is_loading:
            self._loads.wait(MAX_IDLE_WAIT_S)
            plan = self._scheduler.schedule(on_failure)
        if plan:
            results = self._runner.run(plan)
            self._num_steps += 1
            for item, result in zip(plan, results, strict=True):
                outputs += self._commit(item, result)
        return outputs

    def abort(self, request_id: str) -> Output | None:
        """Drop a request at once and free what it holds; returns its last output, None when it is not known."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return None
        output = _output(sequence, (), sequence.text.finish(), finish_reason="abort")
        self._finish(sequence)
        return output

    def load(self, ref: AdapterRef) -> None:
        """Make an adapter resident. Raises as `add`, and AdapterCacheFull when every resident adapter is in use."""
        self.pool.load(ref)

    def prefetch(self, ref: AdapterRef) -> None:
        """Read and check an adapter, so that it waits in host memory. Raises as `add`; blocks while it reads.

        Safe to call from another thread than the one that steps.
        """
        self.pool.prefetch(ref)

    def unload(self, digest: str) -> bool:
        """Free an adapter; False when it is not resident. Raises AdapterInUse while a request runs on it."""
        self._loads.forget(digest)
        return self.pool.unload(digest)

    def stats(self) -> dict[str, object]:
        """Return counters and gauges; cheap enough to poll."""
        return {
            "num_running": len(self._scheduler.running),
            "num_waiting": len(self._scheduler.waiting),
            "num_steps": self._num_steps,
            "num_prefill_tokens": self._num_prefill_tokens,
            "num_output_tokens": self._num_output_tokens,
            "num_preemptions": self._scheduler.num_preemptions,
            "kv_blocks": self._allocator.num_blocks,
            "kv_blocks_free": self._allocator.num_available,
            "kv_blocks_cached": self._allocator.num_cached,
            "prefix_query_tokens": self._scheduler.num_prompt_tokens,
            "prefix_hit_tokens": self._scheduler.num_prefix_hit_tokens,
            "prefix_evicted_blocks": self._allocator.num_evictions,
            "max_model_len": self.max_model_len,
            **self.pool.stats(),
        }

    def check_integrity(self) -> None:
        """Assert that every block, lease and queue entry is accounted for."""
        self._scheduler.check_integrity()
        queued = {sequence.request.request_id for sequence in (*self._scheduler.waiting, *self._scheduler.running)}
        assert queued == set(self._sequences), "a request is in no queue, or a queue holds a forgotten one"

    def _check(self, request: Request) -> None:
        """Raise for a request that can never run."""
        prompt = request.prompt_token_ids
        if request.request_id in self._sequences:
            raise InvalidRequest(
                f"request_id={request.request_id!r} is in use by an unfinished request; choose another"
            )
        if not prompt:
            raise InvalidRequest("prompt_token_ids is empty; give at least one token")
        if len(prompt) >= self.max_model_len:
            raise PromptTooLong(
                f"the prompt has {len(prompt)} tokens and max_model_len is {self.max_model_len}, which must leave room "
                "for one new token; shorten the prompt or raise max_model_len"
            )
        if not 0 <= min(prompt) <= max(prompt) < self.spec.vocab_size:
            raise InvalidRequest(f"prompt_token_ids holds an id outside 0..{self.spec.vocab_size - 1}")
        params = request.sampling
        named = {"logit_bias": [token_id for token_id, _ in params.logit_bias], "stop_token_ids": params.stop_token_ids}
        for name, token_ids in named.items():
            if token_ids and max(token_ids) >= self.spec.vocab_size:
                raise InvalidRequest(f"{name} holds the id {max(token_ids)}, outside 0..{self.spec.vocab_size - 1}")

    def _commit(self, item: Scheduled, result: StepResult) -> list[Output]:
        """Take one sequence's result into its state; return its output, if it got a token or failed."""
        sequence = item.sequence
        if isinstance(result, Exception):
            self._runner.kv.zero(self._allocator.private(sequence.blocks))
            return [self._forget(sequence, result)]
        if item.num_tokens > 1 or sequence.num_output_tokens == 0:
            self._num_prefill_tokens += item.num_tokens
        self._scheduler.commit(sequence, num_tokens=item.num_tokens, gave_token=result is not None)
        if result is None:
            return []
        self._num_output_tokens += 1
        was_long = sequence.is_long
        text, finish_reason = sequence.append(result.token_id)
        output = _output(sequence, (result,), text, finish_reason=finish_reason)
        if finish_reason is not None:
            self._finish(sequence)
        elif sequence.is_long != was_long:
            self._scheduler.restart(sequence)
        return [output]

    def _forget(self, sequence: Sequence, error: Exception) -> Output:
        """End a sequence that failed, saying why."""
        message = str(error) if isinstance(error, EngineError) else f"{type(error).__name__}: {error}"
        output = _output(sequence, (), sequence.text.finish(), finish_reason="error", error=message)
        self._finish(sequence)
        return output

    def _finish(self, sequence: Sequence) -> None:
        del self._sequences[sequence.request.request_id]
        self._scheduler.remove(sequence)


def _limits(config: EngineConfig) -> SchedulerLimits:
    return SchedulerLimits(
        block_size=config.kv_block_size,
        max_num_seqs=config.max_num_seqs,
        max_step_tokens=config.max_step_tokens,
        enable_prefix_cache=config.enable_prefix_cache,
        base_digest=config.base_digest or config.base_path,
        tenant_weights=dict(config.tenant_weights),
    )


def _tokenizer(base_path: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(base_path, local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise CorruptModel(f"base_path={base_path} has no readable tokenizer: {str(error).splitlines()[0]}") from error


def _wants_native(config: EngineConfig, device: torch.device) -> bool:
    return device.type == "cpu" and config.native_kernels and env.native_kernels()


def _adapter_pool(config: EngineConfig, spec: ModelSpec, device: torch.device, native: Native | None) -> AdapterPool:
    """Build the two tiers of adapters; host buffers are page-locked where a GPU copies from them."""
    name = config.adapter_dtype
    if name == "auto":
        name = "float32" if device.type == "cpu" else config.dtype
    dtype = resolve_dtype(name, device, native)
    read = partial(read_adapter, spec=spec, dtype=dtype, pin=device.type == "cuda")
    return AdapterPool(
        HostTier(
            read,
            budget_bytes=config.adapter_host_bytes,
            on_thread_start=None if native is None else native.compute_alone,
        ),
        num_layers=spec.num_layers,
        budget_bytes=config.adapter_cache_bytes,
        max_adapters=config.max_resident_adapters,
        dtype=dtype,
        device=device,
        native=native,
        alignment=math.gcd(*(size for linear in LINEAR_MODULES for size in spec.linear_shape(linear))),
    )


def _output(
    sequence: Sequence,
    choices: tuple[Choice, ...],
    text: str,
    *,
    finish_reason: FinishReason | None,
    error: str | None = None,
) -> Output:
    request = sequence.request
    logprobs: tuple[TokenLogprob, ...] = tuple(choice.logprob for choice in choices if choice.logprob is not None)
    return Output(
        request_id=request.request_id,
        new_token_ids=tuple(choice.token_id for choice in choices),
        text=text,
        finished=finish_reason is not None,
        finish_reason=finish_reason,
        num_prompt_tokens=sequence.num_prompt_tokens,
        num_output_tokens=sequence.num_output_tokens,
        adapter_digest=sequence.adapter_digest,
        error=error,
        logprobs=None if request.sampling.logprobs is None else logprobs,
    )
