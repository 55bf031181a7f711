"""Train an adapter from a refined dataset: the driver of a Ray Train run, and the record of what came out."""

import math
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq

from configs.env import set_variables, variable
from configs.schema import TrainSettings
from pipelines.publish import require_name
from pipelines.refine.read import require_refinable
from pipelines.train.data import EncodedRows, Example, Step, encode_rows, plan_steps, write_examples
from pipelines.train.plan import Outcome, Plan, StepHook, train_worker
from pipelines.train.queries import QuerySet, read_query_sets, register, stale_warning, warnings
from pipelines.train.refined import TrainError, resolve_refined
from pipelines.train.trace import Event, Journal, JournalFollower, StepTaken

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

    from attribution.influence.run_facts import InRunMeta, RunFacts
    from attribution.records import Artefact
    from attribution.trail import Entry, Trail

POLL_SECONDS = 0.25
RUNS_FOLDER = Path("run") / "train"


@dataclass(frozen=True)
class Planned:
    """What a run is about to do; sent to `progress` once, before the events of the journal.

    `warnings`: what makes in-run scores mean less than they seem to. `refresh_steps`: 0 without a query set.
    """

    num_steps: int
    num_examples: int
    skipped: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...] = ()
    refresh_steps: int = 0


Progress = Callable[[Planned | Event], None]


@dataclass(frozen=True)
class TrainReport:
    """What a run made. `losses`: mean nats per target token, one per step; `num_attempts` is 1 when nothing failed.

    `in_run`: how in-run scores were taken; None without a query set.
    """

    entry: "Entry"
    digest: str
    trace_digest: str
    losses: tuple[float, ...]
    reload_max_abs_diff: float
    num_examples: int
    num_attempts: int
    tokens_per_s: float
    padding_share: float
    skipped: tuple[tuple[str, str], ...]
    facts: "RunFacts"
    in_run: "InRunMeta | None"

    @property
    def num_steps(self) -> int:
        return len(self.losses)


def train(
    trail: "Trail",
    dataset: str,
    *,
    name: str,
    base: str,
    settings: TrainSettings,
    progress: Progress | None = None,
    hook: StepHook | None = None,
    workflow: "Artefact | None" = None,
) -> TrainReport:
    """Train, export, prove and record one adapter.

    `dataset` is a refinement's name (the newest of that name) or its output's digest; `base` is what `resolve_base`
    takes. `hook` runs in every worker before each step (tests fail on purpose with it). `workflow`: the definition
    of the workflow that asks, an input of the record.

    Raises:
        PublishError: a name that could not be published later.
        QueryError: a query set that is empty, unknown or cannot be encoded.
        DatasetError: the dataset holds rows that a revoked key signed.
        TrainError: nothing to train on, or the run failed; nothing is recorded then.
    """
    from pipelines.base_model import resolve_base

    require_name(name)  # it also names the run's folder
    refined = resolve_refined(trail, dataset)
    require_refinable(trail, refined.digest)
    base_model = resolve_base(trail, base)
    rows = _encode(trail, refined.digest, base_model.path, settings)
    sets = _query_sets(trail, base_model.path, settings)
    # By digest, so that the record's configuration says what was scored against wherever the file goes.
    settings = settings.model_copy(update={"query_sets": tuple(found.artefact.digest for found in sets)})
    steps = plan_steps(rows.examples, settings)
    registered = register(sets, settings, tokens_per_step=_tokens_per_step(rows.examples, steps))
    plan = Plan(new_run_folder(trail, name), str(base_model.path), base_model.name, settings, registered)
    prepare(plan, rows.examples, num_steps=len(steps))
    tell = progress or _ignore
    told, refresh_steps = warnings(sets, rows.examples), 0
    if registered is not None:
        refresh_steps = registered.refresh_steps
        told += stale_warning(refresh_steps, num_steps=len(steps))
    tell(Planned(len(steps), len(rows.examples), rows.skipped, tuple(told), refresh_steps))
    outcome = run_workers(plan, hook=hook, progress=tell)
    queried = [found.artefact for found in sets if found.artefact != refined.artefact]
    inputs = (base_model.artefact, refined.artefact, *queried, *([workflow] if workflow else []))
    report = _record(trail, plan, outcome, name=name, inputs=inputs, skipped=rows.skipped)
    shutil.rmtree(plan.run_folder)
    return report


def new_run_folder(trail: "Trail", name: str) -> Path:
    """Make an empty folder for one run below the home."""
    folder = trail.home / RUNS_FOLDER / f"{name}-{uuid.uuid4().hex[:12]}"
    folder.mkdir(parents=True)
    return folder


def prepare(plan: Plan, examples: Sequence[Example], *, num_steps: int) -> None:
    """Write what the workers of every attempt read."""
    write_examples(plan.examples_file, examples)
    if plan.queries is not None:
        from pipelines.train.in_run import create_scores

        create_scores(
            plan.in_run_file,
            num_steps=num_steps,
            batch_size=plan.settings.batch_size,
            num_queries=len(plan.queries.columns),
        )


def _encode(trail: "Trail", digest: str, base_path: Path, settings: TrainSettings) -> EncodedRows:
    from transformers import AutoTokenizer

    from pipelines.refine.read import load_refined

    table = load_refined(trail, digest)
    tokenizer = AutoTokenizer.from_pretrained(base_path, local_files_only=True)
    rows = encode_rows(table, tokenizer, max_length=settings.max_length)
    if not rows.examples:
        reason = rows.skipped[0][1] if rows.skipped else "it has no rows"
        raise TrainError(f"dataset {digest}: no row can be trained on ({len(rows.skipped)} skipped): {reason}")
    return rows


def _query_sets(trail: "Trail", base_path: Path, settings: TrainSettings) -> list[QuerySet]:
    if not settings.query_sets:
        return []
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_path, local_files_only=True)
    return read_query_sets(trail, settings.query_sets, tokenizer, max_length=settings.max_length)


def _tokens_per_step(examples: Sequence[Example], steps: Sequence[Step]) -> float:
    return sum(examples[row].num_tokens for step in steps for row in step.rows) / len(steps)


def run_workers(plan: Plan, *, hook: StepHook | None = None, progress: Progress) -> Outcome:
    """Run the worker group to its end. Raises TrainError with what the workers said."""
    from ray.train.v2.api.exceptions import TrainingFailedError

    trainer = _trainer(plan, hook=hook)
    with _following(Journal(plan.run_folder), progress):
        try:
            result = trainer.fit()
        except TrainingFailedError as error:
            num_attempts = len(Journal(plan.run_folder).attempts())
            raise TrainError(
                f"training failed after {num_attempts} attempts (train.max_failures={plan.settings.max_failures}): "
                f"{_last_line(error)}; the run is kept in {plan.run_folder}"
            ) from error
    assert result.return_value is not None, "rank 0 returned nothing"
    outcome = Outcome(**result.return_value)
    if outcome.problem:
        raise TrainError(f"training stopped: {outcome.problem}")
    return outcome


def _trainer(plan: Plan, *, hook: StepHook | None) -> "TorchTrainer":
    import ray
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    # Workers import torch, transformers and DeepSpeed: a minute is too short on a busy machine. The controller looks in
    # every two seconds by default, which a short run would mostly spend waiting.
    set_variables({"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"})
    _connect()
    settings = plan.settings
    return TorchTrainer(
        train_worker,
        train_loop_config={"plan": plan, "hook": hook},
        torch_config=TorchConfig(backend="nccl" if settings.use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=settings.num_workers,
            use_gpu=settings.use_gpu,
            resources_per_worker={"CPU": 1, "GPU": settings.gpu_share} if settings.use_gpu else None,
        ),
        run_config=ray.train.RunConfig(
            # The folder's name is unique: Ray resumes an old run when a name comes back.
            name=plan.run_folder.name,
            storage_path=str(plan.run_folder / "ray"),
            failure_config=ray.train.FailureConfig(max_failures=settings.max_failures),
        ),
    )


def _connect() -> None:
    """Join the cluster that RAY_ADDRESS names unless this process is in one already."""
    import ray

    if ray.is_initialized():
        return
    address = variable("RAY_ADDRESS")
    if not address:
        raise TrainError("no Ray cluster: this process is in none and RAY_ADDRESS is not set; run `trailmark up` first")
    ray.init(address=address, log_to_driver=False)


@contextmanager
def _following(journal: Journal, progress: Progress) -> Iterator[None]:
    """Hand the journal's events to `progress` from a thread while the body runs, and the last ones after it."""
    follower = JournalFollower(journal.path)
    stopped = threading.Event()

    def follow() -> None:
        while not stopped.wait(POLL_SECONDS):
            _deliver(follower, progress)

    thread = threading.Thread(target=follow, name="train-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
        _deliver(follower, progress)


def _deliver(follower: JournalFollower, progress: Progress) -> None:
    for event in follower.new_events():
        progress(event)


def _record(
    trail: "Trail",
    plan: Plan,
    outcome: Outcome,
    *,
    name: str,
    inputs: "Sequence[Artefact]",
    skipped: tuple[tuple[str, str], ...],
) -> TrainReport:
    """Put trace and adapter into the store and append the record; `inputs` begin with base and dataset."""
    from attribution.bodies import AdapterBody
    from attribution.influence.store import Trace
    from attribution.records import Artefact, Party

    settings, (base, refined, *_) = plan.settings, inputs
    journal = Journal(plan.run_folder)
    steps, attempts = journal.steps(), journal.attempts()
    num_examples = pq.read_metadata(plan.examples_file).num_rows
    meta = {"base": base.digest, "dataset": refined.digest}
    trace = trail.store.put_directory(plan.trace_folder, kind="trace", meta=meta)
    digest = trail.store.put_directory(plan.adapter_folder, kind="adapter", meta={**meta, "trace": trace})
    body = AdapterBody(
        name=name,
        base=base.digest,
        dataset=refined.digest,
        rank=settings.rank,
        alpha=settings.alpha,
        target_modules=tuple(settings.target_modules),
        num_steps=len(steps),
        num_examples=num_examples,
        final_loss_micro=round(steps[-1].loss * 1e6),
        reload_max_abs_diff_micro=math.ceil(outcome.reload_max_abs_diff * 1e6),
        trace=trace,
    )
    entry = trail.record(
        "adapter",
        body,
        inputs=inputs,
        outputs=(Artefact("adapter", name, digest), Artefact("trace", name, trace)),
        contributors=(Party(trail.keys.get("operator").key_id, "trainer"),),
        config=trail.run_config(settings),
        seed=settings.seed,
        attempt=len(attempts),
    )
    num_tokens = sum(step.num_tokens for step in steps)
    kept = Trace(trail.store.path_of(trace))
    return TrainReport(
        entry=entry,
        digest=digest,
        trace_digest=trace,
        losses=tuple(step.loss for step in steps),
        reload_max_abs_diff=outcome.reload_max_abs_diff,
        num_examples=num_examples,
        num_attempts=len(attempts),
        tokens_per_s=num_tokens / sum(step.seconds for step in steps),
        padding_share=_padding_share(steps),
        skipped=skipped,
        facts=kept.facts,
        in_run=kept.in_run,
    )


def _padding_share(steps: list[StepTaken]) -> float:
    real = sum(step.num_tokens for step in steps)
    return 1 - real / sum(step.num_tokens / (1 - step.padding_share) for step in steps)


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__


def _ignore(_: Planned | Event) -> None:
    """For a caller that wants no progress."""
