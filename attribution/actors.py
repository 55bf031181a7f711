"""Ray shells: one log writer without torch, and a pool of scorers, so that a gradient never delays an acknowledgement.

The writer and each scorer are processes of their own. Both outlive the program that starts them and come back after a
crash; the log itself is safe under either (see trail.py).
"""

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from attribution.bodies import AdapterLoadedBody, Body
from attribution.group_commit import GroupCommit
from attribution.influence.rows import ShardsElsewhere
from attribution.influence.who import ExplainSettings, explain
from attribution.receipts import ReceiptRow, append_once
from attribution.records import Artefact
from attribution.trail import MAX_GROUP, Draft, Trail
from configs.errors import UserError

if TYPE_CHECKING:
    from attribution.influence.question import Question
    from attribution.influence.topk import Hit
    from configs.schema import AttributionSettings

NAMESPACE = "trailmark"
LOG_WRITER_NAME = "trailmark-log-writer"
SCORER_NAME = "trailmark-scorer-{}"
WRITER_CPUS = 0.1
SCORER_CPUS = 0.5
"""Logical CPUs. Small, because declared CPUs admit work and do not measure it: scorers wait most of the time."""
START_TIMEOUT_S = 300.0
"""A worker process imports Ray and transformers in 3 s alone and in minutes on a machine that is busy."""
NUM_CACHED_ANSWERS = 256
WRITER_THREADS = 32
"""Calls that the log writer takes at once; those that wait on the disk share its commits."""
RELEASE_TIMEOUT_S = 10.0
DETACHED: dict[str, Any] = {
    "namespace": NAMESPACE,
    "lifetime": "detached",
    "get_if_exists": True,
    "max_restarts": -1,
}


class ShardMissing(UserError):
    """A part of a gradient store is on none of the scorers' nodes."""


class LogWriter:
    """Appends records for everyone else; torch-free, so that it starts fast and stays small.

    It takes the log over when it starts: one that runs elsewhere still, cut off or forgotten, is fenced off from then
    on (FencedError). Calls run side by side in threads and share the log's commits.
    """

    def __init__(self, home: str) -> None:
        self._trail = Trail.open(Path(home))
        self._trail.log.take_over()
        self._changed = threading.Condition()
        self._in_flight: set[str] = set()
        self._loading = threading.Lock()
        self._loads: dict[tuple[str, str], str] = {}
        self._num_read = 0

    def ready(self) -> bool:
        """Answer once the log is open."""
        return True

    def release(self) -> None:
        """Give the log up before the end, so that any machine may append to it."""
        self._trail.log.release()

    def append_completions(self, rows: Sequence[ReceiptRow], replica: str) -> str:
        """Record a batch of receipts of one replica and return its leaf hash; durable when this returns.

        Rows the log has are left out, so that appending again after a lost reply is safe, even while the first call
        still runs. Raises ReceiptError or RecordError for rows that the log can never take.
        """
        with self._alone({str(row.receipt.get("id")) for row in rows}):
            return append_once(self._trail, rows, replica=replica)

    @contextlib.contextmanager
    def _alone(self, receipt_ids: set[str]) -> Iterator[None]:
        """Wait until no other call is recording one of these receipts, then keep others from it."""
        with self._changed:
            self._changed.wait_for(lambda: not receipt_ids & self._in_flight)
            self._in_flight |= receipt_ids
        try:
            yield
        finally:
            with self._changed:
                self._in_flight -= receipt_ids
                self._changed.notify_all()

    def adapter_loaded(self, replica: str, adapter: str, base: str) -> str:
        """Record, once for each replica and adapter, that the one serves the other; return the leaf hash."""
        with self._loading:
            self._read_loads()
            if (replica, adapter) in self._loads:
                return self._loads[replica, adapter]
            body = AdapterLoadedBody(replica=replica, adapter=adapter, base=base)
            inputs = (Artefact("adapter", "adapter", adapter), Artefact("base_model", "base", base))
            return self.append("adapter_loaded", body, inputs=inputs)

    def _read_loads(self) -> None:
        for entry in self._trail.entries(start=self._num_read, kind="adapter_loaded"):
            self._num_read = entry.index + 1
            if entry.record is not None and isinstance(entry.record.body, AdapterLoadedBody):
                known = entry.record.body
                self._loads.setdefault((known.replica, known.adapter), entry.leaf_hash)

    def append(self, kind: str, body: Body, **fields: Any) -> str:
        """Record anything; `fields` are those of `Trail.record`. Returns the leaf hash."""
        return self._trail.record(kind, body, **fields).leaf_hash

    def append_each(self, drafts: Sequence[Draft]) -> list[str | Exception]:
        """Record several callers' drafts in one commit; return for each its leaf hash, or the error that is its own."""
        outcomes = self._trail.record_each([[draft] for draft in drafts])
        return [item if isinstance(item, Exception) else item[0].leaf_hash for item in outcomes]

    def loaded_modules(self) -> list[str]:
        """Return the names of the packages this process has imported, for whoever checks that torch is none."""
        import sys

        return sorted({name.partition(".")[0] for name in sys.modules})


class LogClient:
    """Appends through the log writer for all threads of a process: calls that wait at once go in one message."""

    def __init__(self) -> None:
        self._calls: GroupCommit[Draft, str] = GroupCommit(self._send, max_requests=MAX_GROUP)
        self._writer: Any = None

    def append(self, kind: str, body: Body, **fields: Any) -> str:
        """As `LogWriter.append`: return the leaf hash of a record, durable.

        Raises what the writer raised for this record, RayError when it died with the call (the record may be in the
        log), ValueError when none runs.
        """
        return self._calls.submit(Draft(kind, body, **fields))

    def _send(self, drafts: Sequence[Draft]) -> Sequence[str | Exception]:
        self._writer = self._writer or log_writer()
        try:
            outcomes: list[str | Exception] = ray.get(self._writer.append_each.remote(list(drafts)))
        except ray.exceptions.RayError:
            self._writer = None  # one that was started under the name since is found by it
            raise
        return outcomes


class Scorer:
    """Explains receipts; keeps the base model and its last answers in memory. One request at a time.

    The gradient store behind an adapter may be spread over the nodes' homes: each scorer answers for the shards that
    its own home holds, and `top_examples_over` merges what they find.
    """

    def __init__(self, home: str, settings: ExplainSettings, num_threads: int) -> None:
        import torch

        from attribution.influence.query import AdapterModels
        from attribution.influence.question import OpenStores

        torch.set_num_threads(num_threads)
        self._trail = Trail.open(Path(home))
        self._settings = settings
        self._models = AdapterModels()
        self._stores = OpenStores(self._trail)
        self._answers: OrderedDict[tuple[str, int], dict[str, Any]] = OrderedDict()
        self._num_notices = 0

    def ready(self) -> bool:
        """Answer once the scorer is up; the base model is read when the first receipt is explained."""
        return True

    def explain(self, receipt_id: str, num_examples: int | None = None) -> dict[str, Any]:
        """Return `Attribution.to_dict()` of a receipt and record it. Raises UserError."""
        self._forget_what_was_erased()
        asked = receipt_id, num_examples or self._settings.top_examples
        if asked not in self._answers:
            found = explain(
                self._trail, receipt_id, self._settings, models=self._models, record=True, num_examples=asked[1]
            )
            self._answers[asked] = found.to_dict()
        self._answers.move_to_end(asked)
        while len(self._answers) > NUM_CACHED_ANSWERS:
            self._answers.popitem(last=False)
        return self._answers[asked]

    def ranked(self, receipt_id: str, hits: "Sequence[Hit]") -> dict[str, Any]:
        """Return `Attribution.to_dict()` of a receipt by rows that were ranked over the shards of all scorers."""
        from attribution.influence.who import explain_ranked

        return explain_ranked(self._trail, receipt_id, hits, self._settings, models=self._models).to_dict()

    def num_examples(self) -> int:
        """Return how many rows an answer lists by default."""
        return self._settings.top_examples

    def question(self, receipt_id: str) -> "Question":
        """Return a receipt as a question to its adapter's gradient store. Raises UserError."""
        from attribution.influence.question import question_of

        self._forget_what_was_erased()
        return question_of(self._trail, receipt_id, self._models, self._stores, normalise=self._settings.normalise)

    def shards(self, trace: str) -> tuple[list[str], list[str]]:
        """Return the names of all shards of a trace's gradient store, and of those that this home holds."""
        shards = self._stores.get(trace).shards
        return [shard.name for shard in shards], [shard.name for shard in shards if shard.is_here]

    def best(self, question: "Question", shards: Sequence[str], k: int) -> "tuple[tuple[Hit, ...], ...]":
        """Return the k best examples among some of this home's shards, for each query."""
        from attribution.influence.topk import top_examples

        return top_examples(self._stores.get(question.trace), question.asked, k=k, shards=shards)

    def _forget_what_was_erased(self) -> None:
        """Drop answers and open stores after an erasure: both hold what may be gone."""
        from attribution.influence.question import OpenStores

        num_notices = len(self._trail.notices())
        if num_notices != self._num_notices:
            self._num_notices = num_notices
            self._answers.clear()
            self._stores = OpenStores(self._trail)


def start(home: Path | str, settings: "AttributionSettings") -> None:
    """Start the log writer and the scorers on the connected cluster unless they run; return when they answer."""
    scorer = ray.remote(Scorer)
    actors = [start_log_writer(home)]
    for index in range(settings.num_scorers):
        named = scorer.options(name=SCORER_NAME.format(index), num_cpus=SCORER_CPUS, max_task_retries=0, **DETACHED)
        actors.append(named.remote(str(home), ExplainSettings.of(settings), settings.threads_per_scorer))
    ray.get([actor.ready.remote() for actor in actors], timeout=START_TIMEOUT_S)


def start_log_writer(home: Path | str, resources: Mapping[str, float] | None = None) -> Any:
    """Start the log writer on the connected cluster unless it runs, and return its handle at once.

    Ray starts it again when its process or node dies, on any node with `resources`: name there what only the nodes
    that see the home folder have.
    """
    # A task that was cut off is not tried again by Ray: the caller knows whether appending twice would hurt.
    options = {"num_cpus": WRITER_CPUS, "max_task_retries": 0, "max_concurrency": WRITER_THREADS, **DETACHED}
    named = ray.remote(LogWriter).options(name=LOG_WRITER_NAME, resources=dict(resources or {}), **options)
    return named.remote(str(home))


def stop() -> None:
    """End the log writer and the scorers of the connected cluster; what they acknowledged is durable.

    Returns when their names are free: a `start` right after must not be handed an actor that is dying.

    Raises:
        ValueError: no log writer runs.
        TimeoutError: the names were not freed in `START_TIMEOUT_S` seconds.
    """
    with contextlib.suppress(ray.exceptions.RayError):  # a writer that hangs or was fenced off is ended all the same
        ray.get(log_writer().release.remote(), timeout=RELEASE_TIMEOUT_S)
    for actor in [log_writer(), *scorers()]:
        ray.kill(actor, no_restart=True)
    deadline = time.monotonic() + START_TIMEOUT_S
    while _is_named(LOG_WRITER_NAME) or scorers():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the log writer and the scorers were not gone after {START_TIMEOUT_S:.0f} s")
        time.sleep(0.05)


def log_writer() -> Any:
    """Return the handle of the log writer. ValueError when none runs."""
    return ray.get_actor(LOG_WRITER_NAME, namespace=NAMESPACE)


def _is_named(name: str) -> bool:
    try:
        ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return False
    return True


def scorers() -> list[Any]:
    """Return the handles of the scorers that run, in order of their number."""
    found: list[Any] = []
    while True:
        try:
            found.append(ray.get_actor(SCORER_NAME.format(len(found)), namespace=NAMESPACE))
        except ValueError:
            return found


def explain_remotely(receipt_id: str, num_examples: int | None = None) -> dict[str, Any]:
    """Return a receipt's attribution from the connected cluster's first scorer. Raises UserError as `explain` does."""
    found = scorers()
    if not found:
        raise ray.exceptions.RayActorError(error_msg="no scorer runs in this cluster")
    try:
        answer: dict[str, Any] = _ask(found[0].explain.remote(receipt_id, num_examples))
    except ShardsElsewhere:
        answer = ranked_over(found, receipt_id, num_examples)
    return answer


def ranked_over(scorers: Sequence[Any], receipt_id: str, num_examples: int | None) -> dict[str, Any]:
    """Return the attribution of a receipt whose gradient store no scorer holds whole: rows ranked over all shards.

    Raises UserError as `top_examples_over` does.
    """
    hits = top_examples_over(scorers, receipt_id, k=num_examples or _ask(scorers[0].num_examples.remote()))
    answer: dict[str, Any] = _ask(scorers[0].ranked.remote(receipt_id, hits))
    return answer


def top_examples_over(scorers: Sequence[Any], receipt_id: str, *, k: int) -> "tuple[Hit, ...]":
    """Return the k training examples that score highest for a receipt, exact over the shards that the scorers hold.

    The first scorer makes the question; every shard is answered for by one scorer that holds it. The answer does not
    depend on who holds what. Raises UserError as `question_of` does, or naming a shard that no scorer holds.
    """
    from attribution.influence.topk import merge

    question = _ask(scorers[0].question.remote(receipt_id))
    owned = _dealt(_ask([scorer.shards.remote(question.trace) for scorer in scorers]))
    asked = ray.put(question)
    busy = [(scorer, shards) for scorer, shards in zip(scorers, owned, strict=True) if shards]
    found = _ask([scorer.best.remote(asked, shards, k) for scorer, shards in busy])
    return merge((part[0] for part in found), k=k)


def _dealt(held: Sequence[tuple[list[str], list[str]]]) -> list[list[str]]:
    """Give each shard to the scorer with the fewest among those that hold it."""
    owned: list[list[str]] = [[] for _ in held]
    for shard in held[0][0]:
        holders = [index for index, (_, here) in enumerate(held) if shard in here]
        if not holders:
            raise ShardMissing(
                f"shard {shard} of the gradient store: no scorer's home holds it; copy it to one of the nodes"
            )
        owned[min(holders, key=lambda index: len(owned[index]))].append(shard)
    return owned


def _ask(references: Any) -> Any:
    try:
        return ray.get(references)
    except ray.exceptions.RayTaskError as error:
        # Ray's text is the remote traceback; the cause is the message meant for people.
        raise (error.cause if isinstance(error.cause, Exception) else error) from None
