"""The MLflow server as the view needs it: create once by leaf hash, find again, and say plainly when it is away.

Only `MlflowClient` is used, never the fluent API: `mlflow.log_metric(model_id=M)` makes M an input of its own run
(fluent.py `_log_inputs_for_metrics_if_necessary`), and the fluent trace queue drops what does not fit.
"""

import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.env import set_variables
from configs.errors import UserError

if TYPE_CHECKING:
    from mlflow.entities import Dataset, EvaluationDataset, LoggedModel, Metric, Run
    from mlflow.entities.span import Span
    from mlflow.entities.trace_info import TraceInfo

EXPERIMENT = "trailmark"
TAG_LEAF, TAG_INDEX, TAG_KIND = "trailmark.leaf", "trailmark.index", "trailmark.kind"
TAG_DIGEST, TAG_CONTRIBUTORS, TAG_NOTE = "trailmark.digest", "trailmark.contributors", "mlflow.note.content"
TAG_RECEIPT = "trailmark.receipt"
# MLflow's own limits (utils/validation.py): a dataset digest is at most 36 characters,
# a batch 1000 metrics and 100 params.
DATASET_DIGEST_CHARS = 32
MAX_METRICS_PER_BATCH, MAX_PARAMS_PER_BATCH = 1000, 100
MAX_TAG_CHARS, MAX_PARAM_CHARS = 5000, 6000  # a run's tag may have 8000, a dataset's 5000 (dbmodels/models.py)
MAX_REASON_CHARS = 300
MAX_TRACES_PER_CALL, NUM_CONNECTIONS = 50, 4
_PAGE = 200
# One quick retry per call: waiting for a server that is down is the follower's business.
_VARIABLES = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


class ViewUnavailable(UserError):
    """The MLflow server does not answer, or answers with a failure of its own; nothing is lost, the log keeps it."""


class ViewRefused(UserError):
    """The MLflow server understood a request and said no."""


# MLflow said no, or a record's tables are damaged: the record is set aside, for it must not stop those after it.
UNSHOWABLE = (UserError, ValueError, LookupError, TypeError)


def create_once(create: Callable[[], object]) -> None:
    """Create something by name; that it is there already is no error."""
    from mlflow.exceptions import MlflowException

    try:
        create()
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def input_digest(digest: str) -> str:
    """Return the part of `sha256:<hex>` that fits MLflow's dataset digest; the whole goes into a tag."""
    return digest.removeprefix("sha256:")[:DATASET_DIGEST_CHARS]


@contextmanager
def translated_errors(uri: str) -> Iterator[None]:
    """Turn MLflow's and its transport's errors into ViewRefused or ViewUnavailable (worth trying again)."""
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException

    try:
        yield
    except (MlflowException, RequestException, ConnectionError, TimeoutError) as error:
        reason = str(error).splitlines()[0][:MAX_REASON_CHARS]
        if isinstance(error, MlflowException) and _is_refusal(error):
            raise ViewRefused(f"MLflow at {uri} refused: {reason}") from error
        raise ViewUnavailable(
            f"MLflow at {uri} does not answer ({reason}); start it with `trailmark up`, the log keeps everything"
        ) from error


def _is_refusal(error: Any) -> bool:
    """Whether the same request would be refused again; SQLite's own trouble, a locked file, is BAD_REQUEST too."""
    status = error.get_http_status_code()
    return 400 <= status < 500 and status not in (401, 403, 408, 429) and "sqlite3" not in str(error)


class MlflowServer:
    """A connection to one server and our experiment on it."""

    def __init__(self, uri: str) -> None:
        set_variables(_VARIABLES)
        from mlflow import MlflowClient
        from mlflow.tracing.client import TracingClient

        self.uri = uri
        self.client = MlflowClient(uri, uri)
        self.traces = TracingClient(uri)
        self.experiment_id = ""
        self.has_pages = False

    def connect(self, log_key: str) -> str:
        """Find or make the experiment and return the identity of this server's copy of it (new when it was emptied)."""
        experiment = self.client.get_experiment_by_name(EXPERIMENT)
        self.has_pages = self._serves_pages()
        if experiment is None:
            identity = secrets.token_hex(16)
            tags = {"trailmark.view": identity, "trailmark.log": log_key, "mlflow.experimentKind": "genai_development"}
            self.experiment_id = self.client.create_experiment(EXPERIMENT, tags=tags)
            return identity
        self.experiment_id = experiment.experiment_id
        known_key = experiment.tags.get("trailmark.log", "")
        if known_key.partition("+")[0] != log_key.partition("+")[0]:  # the log's name stays when its key is rotated
            raise ViewRefused(
                f"experiment {EXPERIMENT!r} at {self.uri} shows the log {known_key!r}, not this home's {log_key!r}; "
                "give this home a MLflow server of its own (setting mlflow.port)"
            )
        return str(experiment.tags.get("trailmark.view", ""))

    def _serves_pages(self) -> bool:
        """Whether the server was started with `--app-name trailmark`."""
        import httpx

        try:
            return httpx.get(f"{self.uri}/trailmark/", timeout=30).status_code == 200
        except httpx.HTTPError:
            return False

    def find_run(self, leaf: str) -> "Run | None":
        """Return the run of a record."""
        found = self.client.search_runs([self.experiment_id], f"tags.`{TAG_LEAF}` = '{leaf}'", max_results=1)
        return found[0] if found else None

    def find_model(self, leaf: str) -> "LoggedModel | None":
        """Return the LoggedModel of a record."""
        found = self.client.search_logged_models(
            [self.experiment_id], filter_string=f"tags.`{TAG_LEAF}` = '{leaf}'", max_results=1
        )
        return found[0] if found else None

    def find_version(self, name: str, leaf: str) -> str | None:
        """Return the number of the registered version that a publication made."""
        versions = self.client.search_model_versions(f"name = '{name}'")
        return next((str(version.version) for version in versions if version.tags.get(TAG_LEAF) == leaf), None)

    def find_rows(self, leaf: str) -> "EvaluationDataset | None":
        """Return the dataset that lists a refinement's rows. No backticks: with them MLflow 3.17.2 finds none."""
        found = self.client.search_datasets([self.experiment_id], f"tags.{TAG_LEAF} = '{leaf}'", max_results=1)
        return found[0] if found else None

    def runs(self) -> "Iterator[Run]":
        """Yield every run that stands for a record."""
        yield from self._pages(
            lambda token: self.client.search_runs([self.experiment_id], "", max_results=_PAGE, page_token=token)
        )

    def models(self) -> "Iterator[LoggedModel]":
        """Yield every LoggedModel of our experiment."""
        yield from self._pages(
            lambda token: self.client.search_logged_models([self.experiment_id], max_results=_PAGE, page_token=token)
        )

    def row_datasets(self) -> "Iterator[EvaluationDataset]":
        """Yield every dataset of rows of our experiment."""
        yield from self._pages(
            lambda token: self.client.search_datasets([self.experiment_id], max_results=_PAGE, page_token=token)
        )

    def trace_infos(self) -> "Iterator[TraceInfo]":
        """Yield the header of every trace of our experiment."""
        yield from self._pages(
            lambda token: self.traces.store.search_traces(
                locations=[self.experiment_id], max_results=_PAGE, page_token=token
            )
        )

    def log_metrics(self, run_id: str, metrics: "Sequence[Metric]") -> None:
        """Log metrics, with their own steps and times, in batches; logging them again changes nothing."""
        for start in range(0, len(metrics), MAX_METRICS_PER_BATCH):
            self.client.log_batch(run_id, metrics=metrics[start : start + MAX_METRICS_PER_BATCH])

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Log parameters, cut to MLflow's length."""
        from mlflow.entities import Param

        entries = [Param(key, str(value)[:MAX_PARAM_CHARS]) for key, value in params.items() if value not in (None, "")]
        for start in range(0, len(entries), MAX_PARAMS_PER_BATCH):
            self.client.log_batch(run_id, params=entries[start : start + MAX_PARAMS_PER_BATCH])

    def log_inputs(
        self, run_id: str, datasets: "Sequence[tuple[Dataset, Mapping[str, str]]]", models: Sequence[str]
    ) -> None:
        """Link datasets (with tags) and models (by id) as what went into the run."""
        from mlflow.entities import DatasetInput, InputTag, LoggedModelInput

        inputs = [DatasetInput(data, [InputTag(key, value) for key, value in tags.items()]) for data, tags in datasets]
        self.client.log_inputs(run_id, datasets=inputs, models=[LoggedModelInput(model_id) for model_id in models])

    def log_output(self, run_id: str, model_id: str, *, step: int) -> None:
        """Link the model as what came out of the run; unlike inputs, MLflow refuses to be told twice."""
        from mlflow.entities import LoggedModelOutput

        outputs = self.client.get_run(run_id).outputs
        if outputs is None or all(output.model_id != model_id for output in outputs.model_outputs):
            self.client.log_outputs(run_id, [LoggedModelOutput(model_id, step)])

    def log_model_text(self, model_id: str, text: str, file_name: str) -> None:
        """Store a text file among the model's artifacts."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / file_name
            path.write_text(text, encoding="utf-8")
            self.client.log_model_artifact(model_id, str(path))

    def log_traces(self, traces: "Sequence[tuple[TraceInfo, Sequence[Span]]]") -> None:
        """Write whole traces under their own ids, synchronously; writing one again merges into the same rows.

        The spans of many go in one request; each trace's header is a request of its own, several on their way at once.
        """
        for start in range(0, len(traces), MAX_TRACES_PER_CALL):
            part = traces[start : start + MAX_TRACES_PER_CALL]
            self.traces.log_spans(self.experiment_id, [span for _, spans in part for span in spans])
            with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
                list(pool.map(self.traces.start_trace, [info for info, _ in part]))

    def wait(self, *, timeout_s: float) -> None:
        """Wait until /health answers; ViewUnavailable after `timeout_s`."""
        import httpx

        deadline = time.monotonic() + timeout_s
        pause = 0.1
        while True:
            try:
                if httpx.get(f"{self.uri}/health", timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            if time.monotonic() > deadline:
                raise ViewUnavailable(f"MLflow at {self.uri} did not answer within {timeout_s:.0f} s")
            time.sleep(pause)
            pause = min(2.0, pause * 1.5)

    @staticmethod
    def _pages(search: Callable[[str | None], Any]) -> Iterator[Any]:
        token = None
        while True:
            page = search(token)
            entries, token = page if isinstance(page, tuple) else (page, page.token)
            yield from entries
            if not token:
                return
