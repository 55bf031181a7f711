"""What each training worker runs: DeepSpeed steps, checkpoints, proof of reload, gradients of every example.

Runs inside Ray Train; imports DeepSpeed only after the process is prepared for it.
"""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from attribution.influence.factors import pad_batch, target_losses
from configs.env import set_variables
from configs.schema import TrainSettings
from pipelines.train import lora
from pipelines.train.data import (
    Example,
    Step,
    batch_size,
    checkpoint_steps,
    learning_rate,
    plan_steps,
    read_examples,
    shard,
    state_steps,
)
from pipelines.train.gradients import GradientPass, write_gradient_store
from pipelines.train.in_run import InRun, observing
from pipelines.train.plan import Outcome, Plan, StepHook
from pipelines.train.trace import (
    ADAM,
    AttemptStarted,
    GradientsTaken,
    Journal,
    StepTaken,
    TraceWriter,
    gradient_meta,
    in_run_meta,
    run_facts,
)

if TYPE_CHECKING:
    from attribution.influence.codec import GradientCodec
    from pipelines.train.checkpoint import Checkpoint


class Hopeless(Exception):
    """The run cannot succeed however often it is retried. Raised by all ranks together, or by none."""


def run_attempt(plan: Plan, *, hook: StepHook | None) -> Outcome:
    """Train from the latest checkpoint to the end, on this rank."""
    try:
        worker = Worker(plan, hook=hook)
        worker.train()
        return Outcome() if plan.stop_after else Outcome(reload_max_abs_diff=worker.finish())
    except Hopeless as problem:
        return Outcome(problem=str(problem))


class Worker:
    """One rank of one attempt."""

    def __init__(self, plan: Plan, *, hook: StepHook | None) -> None:
        context = ray.train.get_context()
        self.plan, self.settings, self.hook = plan, plan.settings, hook
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        self.journal = Journal(plan.run_folder)
        self.examples = read_examples(plan.examples_file)
        self.steps = plan_steps(self.examples, self.settings)
        settings, num_steps = self.settings, len(self.steps)
        self.checkpoint_steps = checkpoint_steps(num_steps, settings.num_checkpoints)
        self.state_steps = state_steps(
            num_steps, num_checkpoints=settings.num_checkpoints, num_states=settings.num_states
        )
        _prepare_process(self.settings, context.get_local_world_size(), context.get_local_rank(), self.device)
        self.attempt = self._next_attempt()
        self.engine = _build_engine(self._build_model(), self.settings)
        self.in_run = self._build_in_run()

    def train(self) -> None:
        """Run all steps that the latest checkpoint does not have yet."""
        done = self._resume()
        if self.rank == 0:
            self.journal.append(AttemptStarted(self.attempt, self.world_size, done, _now_us()))
        for step in self.steps[done : self.plan.stop_after]:
            if self.hook is not None:
                self.hook(self.attempt, self.rank, step.number)
            self._take(step)
            if step.number in self.state_steps:
                self._save_checkpoint(step.number)

    def finish(self) -> float:
        """Export, prove the reload, write the trace; return the largest logit difference."""
        probes = self.examples[: self.settings.num_probe_rows]
        trained = lora.probe_logits(self.engine.module, probes)
        adapter_folder = self.plan.adapter_folder
        final = self._load_checkpoint(self.checkpoint_steps[-1])
        if self.rank == 0:
            lora.export_adapter(self.engine.module, final.weights, adapter_folder)
        self.engine.destroy()
        self.in_run = None  # it holds the engine, too
        del self.engine
        dist.barrier()
        model = lora.reload_adapter(self._load_base(), adapter_folder)
        difference = self._agree_on((lora.probe_logits(model, probes) - trained).abs().max().item())
        if not difference <= self.settings.reload_tolerance:
            raise Hopeless(
                f"the exported adapter does not reload: a logit differs by {difference:.3g}, more than "
                f"train.reload_tolerance={self.settings.reload_tolerance:g}; nothing was recorded"
            )
        self._write_trace(model)
        return difference

    def _take(self, step: Step) -> None:
        """One update, written down."""
        started = time.monotonic()
        lr = learning_rate(step.number, num_steps=len(self.steps), settings=self.settings)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(_step_seed(self.settings.seed, step.number, self.rank))
        size = batch_size(self.examples, step, world_size=self.world_size)
        rows = [self.examples[row] for row in shard(step, rank=self.rank, world_size=self.world_size)]
        loss, norm = self._update(step, rows, num_target_tokens=size.num_target_tokens)
        seconds, refreshed = 0.0, False
        if self.in_run is not None:
            clip = min(1.0, self.settings.max_grad_norm / (norm + 1e-6))
            seconds, refreshed = self.in_run.take_scores(step, lr=lr, clip=clip, num_rows=len(rows))
        if self.rank == 0:
            self.journal.append(
                StepTaken(
                    step=step.number,
                    lr=lr,
                    loss=loss,
                    rows=step.rows,
                    num_tokens=size.num_tokens,
                    padding_share=size.padding_share,
                    seconds=time.monotonic() - started,
                    time_us=_now_us(),
                    grad_norm=norm,
                    in_run_seconds=seconds,
                    refreshed=refreshed,
                )
            )

    def _update(self, step: Step, rows: Sequence[Example], *, num_target_tokens: int) -> tuple[float, float]:
        """Return (loss, gradient norm before the clip) of an update with this rank's `rows`.

        The loss is the global batch's token mean, so that neither padding nor the number of workers changes it.
        """
        with observing(self.in_run, step):
            token_nll = _token_nll(self.engine, rows or [self.examples[step.rows[0]]], device=self.device)
            token_nll = token_nll if rows else token_nll * 0.0
            # DeepSpeed averages gradients over ranks; scaling by the world size turns that into the sum over the batch.
            self.engine.backward(token_nll.sum() * (self.world_size / num_target_tokens))
        self.engine.step()
        # Summed in float64, so that the figure written down does not depend on how rows are dealt to workers.
        loss = _sum_over_ranks(token_nll.detach().double().sum()) / num_target_tokens
        norm = float(self.engine.get_global_grad_norm())
        # DeepSpeed leaves the weights alone when the norm is not finite, which nobody could replay.
        if not (np.isfinite(loss) and np.isfinite(norm)):
            found = f"gradient norm is {norm}" if np.isfinite(loss) else f"loss is {loss}"
            raise Hopeless(
                f"{found} at step {step.number}; lower train.learning_rate={self.settings.learning_rate:g} "
                f"or check rows {[self.examples[row].example_id for row in step.rows][:3]}"
            )
        return loss, norm

    def _build_model(self) -> nn.Module:
        """Load base and adapter; a failure anywhere (missing file, unknown module) ends the run on all ranks."""
        problem, model = "", None
        try:
            base = self._load_base()
            model = lora.build_model(base, base_name=self.plan.base_name, settings=self.settings)
        except (ValueError, OSError) as error:
            problem = f"rank {self.rank} cannot build the model from {self.plan.base_name}: {error}"
        self._stop_together(problem)
        assert model is not None
        return model

    def _load_base(self) -> nn.Module:
        settings = self.settings
        return lora.load_base(
            self.plan.base_path, dtype=settings.dtype, device=self.device, attention=settings.attention
        )

    def _build_in_run(self) -> InRun | None:
        if self.plan.queries is None:
            return None
        return InRun(self.engine, self.plan.queries, self.plan.in_run_file, rank=self.rank, world_size=self.world_size)

    def _stop_together(self, problem: str) -> None:
        """Raise Hopeless on all ranks when any of them has a problem; '' is none."""
        problems: list[Any] = [None] * self.world_size
        dist.all_gather_object(problems, problem)
        if any(problems):
            raise Hopeless(next(text for text in problems if text))

    def _next_attempt(self) -> int:
        """Number attempts from 1; all ranks read the journal before rank 0 adds to it."""
        attempt = len(self.journal.attempts()) + 1
        dist.barrier()
        return attempt

    def _resume(self) -> int:
        """Return how many updates are done, after putting their state into the engine."""
        from pipelines.train.checkpoint import load, restore

        saved = [step for step in self.state_steps if self.plan.checkpoint_folder(step).exists()]
        dist.barrier()
        if not saved:
            self._save_start()
            return 0
        restore(self.engine, load(self.plan.checkpoint_folder(saved[-1])))
        return saved[-1]

    def _save_start(self) -> None:
        """Keep the weights that training begins with; their moments are zero."""
        from pipelines.train.checkpoint import gather_weights, save_weights

        weights = gather_weights(self.engine)
        if self.rank == 0:
            save_weights(weights, self.plan.checkpoint_folder(0))

    def _save_checkpoint(self, step: int) -> None:
        from pipelines.train.checkpoint import gather, save

        checkpoint = gather(self.engine, step=step)
        if self.in_run is not None:
            self.in_run.flush()
        if self.rank == 0:
            save(checkpoint, self.plan.checkpoint_folder(step))
        ray.train.report({"step": step})

    def _load_checkpoint(self, step: int) -> "Checkpoint":
        from pipelines.train.checkpoint import load

        return load(self.plan.checkpoint_folder(step))

    def _write_trace(self, model: nn.Module) -> None:
        """Write the trace: its gradients by all ranks together, the rest by rank 0."""
        run = GradientPass(
            model,
            self.examples,
            self.checkpoint_steps,
            self._load_checkpoint,
            self.settings,
            self.rank,
            self.world_size,
        )
        codec = run.fit()
        if self.rank == 0:
            self._fill(TraceWriter(self.plan.trace_folder), model, codec)
        write_gradient_store(
            run, codec, self.plan.trace_folder, tell=self._tell_gradients, stop_together=self._stop_together
        )

    def _tell_gradients(self, num_done: int) -> None:
        if self.rank == 0:
            total = len(self.examples) * len(self.checkpoint_steps)
            self.journal.append(GradientsTaken(min(total, num_done * self.world_size), total))

    def _fill(self, writer: TraceWriter, model: nn.Module, codec: "GradientCodec") -> None:
        """Write all of the trace but the gradients."""
        for step in (0, *self.state_steps):
            writer.write_checkpoint(step, self.plan.checkpoint_folder(step))
        rates = [learning_rate(s, num_steps=len(self.steps), settings=self.settings) for s in self.checkpoint_steps]
        steps = self.journal.steps()
        writer.write_meta(gradient_meta(codec, self.settings, steps=self.checkpoint_steps, lr=rates))
        writer.write_examples(self.examples)
        writer.write_steps(steps, self.examples)
        num_parameters = sum(parameter.numel() for parameter in lora.trainable(model).values())
        facts = run_facts(
            self.settings,
            device=self.device,
            world_size=self.world_size,
            num_parameters=num_parameters,
            state_steps=self.state_steps,
            attempts=self.journal.attempts(),
        )
        writer.write_facts(facts)
        if self.plan.queries is not None:
            writer.write_in_run(self.plan.in_run_file, in_run_meta(self.plan.queries, steps))

    def _agree_on(self, value: float) -> float:
        """Return the largest of the ranks' values, so that all decide alike; a NaN anywhere stays one."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return float(np.max(values))


def _token_nll(model: Any, rows: Sequence[Example], *, device: torch.device) -> Tensor:
    """Return the negative log-likelihood (nats, float32 [tokens]) of each target token of the rows."""
    input_ids, labels, mask = pad_batch([row.encoded for row in rows], device=device)
    return target_losses(model, input_ids, labels, mask=mask)


def _sum_over_ranks(value: Tensor) -> float:
    total = value.clone()
    dist.all_reduce(total)
    return total.item()


def _build_engine(model: nn.Module, settings: TrainSettings) -> Any:
    """Wrap the model in DeepSpeed. The adapter is float32 in every dtype, so the engine needs no loss scaling."""
    import deepspeed
    import deepspeed.ops

    # For inference only; building it takes minutes, and a kill meanwhile leaves a lock that hangs all later workers.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    parameters = list(lora.trainable(model).values())
    optimizer = torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=(ADAM.beta1, ADAM.beta2),
        eps=ADAM.eps,
        weight_decay=settings.weight_decay,
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(settings))
    return engine


def deepspeed_config(settings: TrainSettings) -> dict[str, Any]:
    """Return DeepSpeed's settings. Bucket sizes in elements: its default of 5e8 would reserve 2 GB per worker."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.max_grad_norm,
        "steps_per_print": 1_000_000_000,
        "zero_optimization": {
            "stage": settings.zero_stage,
            "reduce_bucket_size": 5_000_000,
            "allgather_bucket_size": 5_000_000,
        },
    }


def _prepare_process(settings: TrainSettings, local_size: int, local_rank: int, device: torch.device) -> None:
    """Set what DeepSpeed reads from the environment, and the threads (their number decides how sums are rounded)."""
    accelerator = "cpu" if device.type == "cpu" else "cuda"
    set_variables({"DS_ACCELERATOR": accelerator, "LOCAL_SIZE": str(local_size), "LOCAL_RANK": str(local_rank)})
    torch.set_num_threads(settings.threads_per_worker)
    if settings.deterministic:
        set_variables({"CUBLAS_WORKSPACE_CONFIG": ":4096:8"})  # cuBLAS reads it at its first call
        torch.use_deterministic_algorithms(True)


def _step_seed(seed: int, step: int, rank: int) -> int:
    """One seed per (run, step, rank): dropout needs no saved generator state to resume."""
    return (seed * 1_000_003 + step) * 1_009 + rank


def _now_us() -> int:
    return time.time_ns() // 1000
