"""Every knob, one frozen model per concern, each with its default; a consumer is handed only its own section.

A YAML file may name any subset of the sections and fields. A name that is not a knob, or a value a knob cannot take,
is a `UserError` that says where, what and how to put it right.
"""

from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from configs.errors import UserError
from configs.yaml_file import load_yaml

LINEAR_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PRESETS_DIRECTORY = Path(__file__).parent
MILLION = 1_000_000


class Section(BaseModel):
    """Base of every section: immutable, and closed to names it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ContributeSettings(Section):
    """Reading a contributor's file."""

    max_rows: int = Field(1_000_000, ge=1, description="rows read from one file; a longer file is refused")
    max_row_bytes: int = Field(1 << 20, ge=1, description="one row's JSON; a longer row is rejected by its number")


class RefineSettings(Section):
    """The rules a contributed row must pass."""

    min_chars: int = Field(1, ge=0, description="characters in the assistant's turns, at least")
    max_chars: int = Field(4000, ge=1, description="characters in the whole conversation, at most")
    max_repetition: float = Field(
        0.3, ge=0, le=1, description="share of a message in repeated lines, word runs, letters"
    )
    min_alphanumeric: float = Field(0.4, ge=0, le=1, description="share of letters and digits among visible characters")
    min_letter_bits: float = Field(-1.0, description="bits per Latin letter pair: language about +1, random letters -2")
    num_workers: int = Field(2, ge=1, description="Ray Data tasks at once")
    block_rows: int = Field(2048, ge=1, description="rows per Ray Data task; does not change the result")


class BaseSettings(Section):
    """The frozen base model."""

    source: str = Field("smollm2", description="`smollm2` (the wheel's GGUF), a folder, a GGUF file or a hub name")


class TrainSettings(Section):
    """One LoRA training run."""

    rank: int = Field(8, ge=1)
    alpha: int = Field(16, ge=1)
    target_modules: tuple[str, ...] = LINEAR_MODULES
    learning_rate: float = Field(1e-3, gt=0)
    epochs: int = Field(1, ge=1)
    max_steps: int | None = Field(None, ge=1, description="stop here even when the epochs are not done")
    batch_size: int = Field(8, ge=1, description="rows per optimizer step over all workers")
    max_length: int = Field(128, ge=8, description="tokens per row; longer rows are cut")
    warmup_ratio: float = Field(0.1, ge=0, le=1, description="share of the steps over which the rate rises linearly")
    lr_schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="after the warm-up, to zero")
    max_grad_norm: float = Field(1.0, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    seed: int = Field(0, ge=0)
    dtype: Literal["bfloat16", "float32"] = "float32"
    num_workers: int = Field(2, ge=1, description="Ray Train workers")
    zero_stage: Literal[1, 2, 3] = 2
    use_gpu: bool = Field(False, description="a GPU for each worker; else CPU workers over gloo")
    gpu_share: float = Field(1.0, gt=0, le=1, description="of a GPU per worker; under 1 leaves room for a replica")
    num_checkpoints: int = Field(3, ge=1, description="checkpoints with a gradient of every example, evenly spaced")
    num_states: int | None = Field(
        None,
        ge=1,
        description="states kept for replay, 12 bytes a trained parameter each; null: sqrt(steps)",
    )
    query_sets: tuple[str, ...] = Field(
        (), description="suite files or refined datasets whose loss every example is scored against while it trains"
    )
    in_run_refresh_steps: int | None = Field(
        None, ge=1, description="steps between a query set's gradients; null: as often as 7 % of the tokens allow"
    )
    in_run_per_query: bool = Field(False, description="scores for each query of a set, not for the set as a whole")
    attention: Literal["sdpa", "eager"] = Field("sdpa", description="`eager`: written out, differentiable twice")
    deterministic: bool = Field(False, description="refuse operations whose result may differ from run to run")
    max_failures: int = Field(2, ge=0, description="worker failures survived before the run fails (Ray's default is 0)")
    gradient_projection_dim: int = Field(
        32, ge=1, description="most directions kept of each module's long side, for the rows of the gradient store"
    )
    gradient_row_dim: int = Field(
        4096, ge=1, description="int8 numbers of an example's row, a sum over the checkpoints (`adam`: a row at each)"
    )
    gradient_preconditioner: Literal["ekfac", "adam", "identity"] = Field(
        "ekfac", description="what scores examples' gradients against an answer's"
    )
    gradient_damping: float = Field(
        0.1, gt=0, description="`ekfac`: added to eigenvalues, relative to a module's mean one and the median of these"
    )
    gradient_fit_examples: int = Field(40, ge=1, description="rows drawn at each checkpoint to fit these on")
    threads_per_worker: int = Field(1, ge=1)
    num_probe_rows: int = Field(4, ge=1, description="rows whose logits must survive save and reload")
    reload_tolerance: float = Field(
        1e-4, ge=0, description="largest difference of a reloaded logit, in the run's dtype"
    )


class BenchmarkSettings(Section):
    """Base against adapter on held-out questions."""

    max_new_tokens: int = Field(32, ge=1)
    num_bootstrap: int = Field(2000, ge=1)
    confidence: float = Field(0.95, gt=0, lt=1)
    seed: int = Field(0, ge=0)
    dtype: Literal["bfloat16", "float32"] = "float32"
    batch_size: int = Field(16, ge=1, description="answers generated at once, of base and adapter together")


class SettleSettings(Section):
    """What the players behind an adapter are worth, by training coalitions of them again."""

    budget: int = Field(64, ge=1, description="retrains at most; the base alone costs none")
    precision: float = Field(
        0.05, ge=0, description="half an interval's width, as a part of what all players gain together, to stop at"
    )
    confidence: float = Field(0.9, gt=0, lt=1)
    seed: int = Field(0, ge=0, description="of the draw of coalitions; the training keeps the adapter's own")
    utility: Literal["likelihood", "log_likelihood", "exact_match"] = "likelihood"
    max_new_tokens: int = Field(32, ge=1, description="of an answer that is matched exactly")
    gradient_prior: bool = Field(False, description="start from what gradients predict of contributors and datasets")
    num_workers: int = Field(2, ge=1, description="processes that train at once")
    runs_at_once: int = Field(8, ge=1, description="coalitions a process takes at a time; kept when they are done")


class ServeSettings(Section):
    """Gateway, replica and engine."""

    host: str = "127.0.0.1"
    port: int = Field(8700, ge=1, le=65535)
    base: str = "smollm2"
    dtype: Literal["bfloat16", "float32"] = "float32"
    num_gpus: float = Field(0, ge=0, le=1, description="of a GPU per replica; 0 serves on the CPU")
    max_num_seqs: int = Field(16, ge=1)
    max_model_len: int = Field(1024, ge=16)
    kv_block_size: int = Field(16, ge=1)
    adapter_cache_mib: int = Field(512, ge=1, description="adapters on the device")
    adapter_host_mib: int = Field(1024, ge=1, description="adapters kept in host memory behind them")
    max_step_adapter_mib: int | None = Field(
        None, ge=1, description="distinct adapters of one step; null bounds nothing"
    )
    enable_prefix_cache: bool = True
    tenant_weights: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="shares of service when tenants queue; a tenant not named weighs 1"
    )
    receipt_flush_s: float = Field(1.0, gt=0)
    num_threads: int = Field(2, ge=1, description="torch threads per replica")
    num_replicas: int = Field(1, ge=1)
    default_max_tokens: int = Field(128, ge=1)
    model_signatures: Literal["off", "present", "required"] = Field(
        "present", description="before an adapter is loaded: a signature it has must hold; `required`: it must have one"
    )
    require_api_key: bool = Field(True, description="false lets anyone who reaches the port call the API")
    max_running_requests: int = Field(256, ge=1, description="more at once are answered 429")
    attribution_timeout_s: float = Field(120.0, gt=0)


class AttributionSettings(Section):
    """Who made this answer."""

    num_scorers: int = Field(1, ge=1, description="scorer actors")
    num_bootstrap: int = Field(500, ge=1)
    top_examples: int = Field(5, ge=1)
    confidence: float = Field(0.9, gt=0, lt=1)
    num_token_groups: int = Field(8, ge=1, description="groups of a completion's tokens that the interval reweights")
    normalise: Literal["none", "cosine"] = Field("cosine", description="`cosine`: a long gradient earns no more")
    base_threshold_nats: float = Field(0.05, ge=0, description="gain per token below which the base made the answer")
    seed: int = Field(0, ge=0)
    threads_per_scorer: int = Field(1, ge=1)


class CreditSettings(Section):
    """How a request's fee is shared out in a statement; shares in millionths, which sum to 1,000,000."""

    platform_share: int = Field(
        100_000, ge=0, le=MILLION, description="the operator's own; rounded up on every request"
    )
    base_share: int = Field(100_000, ge=0, le=MILLION, description="whoever made the base model")
    adapter_share: int = Field(200_000, ge=0, le=MILLION, description="whoever trained the adapter that answered")
    data_share: int = Field(600_000, ge=0, le=MILLION, description="the contributors, by the adapter's settled values")
    unit: str = Field("units", min_length=1, max_length=24, description="what one integer of the fee table is worth")
    confidence: float = Field(0.9, ge=0.5, lt=1, description="of settled intervals; a lower one pays nobody")
    familywise: bool = Field(True, description="hold all players of a settlement to it together (Holm), not each alone")
    near_duplicates: Literal["skeleton", "lexical", "semantic"] = Field(
        "lexical", description="rows that earn once: equal but for spelling; or also alike in letters; or also in words"
    )
    lexical_similarity: float = Field(0.9, gt=0, le=1, description="Jaccard of runs of five letters, whole and answer")
    semantic_similarity: float = Field(0.6, gt=0, le=1, description="cosine of TF-IDF over runs of 3 to 5 letters")

    @model_validator(mode="after")
    def _shares_are_whole(self) -> Self:
        """A fee is shared out to the last unit."""
        total = self.platform_share + self.base_share + self.adapter_share + self.data_share
        if total != MILLION:
            raise ValueError(
                f"platform_share, base_share, adapter_share and data_share sum to {total:,}; make it {MILLION:,}"
            )
        return self


class MlflowSettings(Section):
    """The MLflow server that shows the trail."""

    port: int = Field(8701, ge=1, le=65535)
    store_uri: str = Field("", description="SQLAlchemy address of MLflow's database; empty: SQLite in the home folder")

    @field_validator("store_uri")
    @classmethod
    def _names_its_driver(cls, value: str) -> str:
        """MLflow's SQLAlchemy takes a bare `postgresql:` to mean psycopg 3, which is not installed."""
        if value.startswith(("postgresql:", "postgres:")):
            raise ValueError("name the driver: postgresql+psycopg2://USER@HOST/DATABASE (pip install psycopg2-binary)")
        return value


class WitnessSettings(Section):
    """The local witnesses of the log, and how often the log is published for them."""

    ports: tuple[Annotated[int, Field(ge=1, le=65535)], ...] = Field(
        (8702, 8703), description="one local witness on 127.0.0.1 for each; [] starts none"
    )
    ml_dsa: bool = Field(False, description="local witnesses made from now on cosign with ML-DSA-44 too (3.3 kB each)")
    quorum: int = Field(0, ge=0, description="local cosignatures a checkpoint needs before the tiles show it")
    publish_interval_s: float = Field(0.5, gt=0, description="seconds between looks at the log")


class ClusterSettings(Section):
    """The cluster that `trailmark up` starts."""

    host: str = Field("127.0.0.1", description="this node's address; 127.0.0.1 keeps it to itself")
    ray_port: int = Field(6390, ge=1, le=65535)
    dashboard_port: int = Field(8265, ge=1, le=65535, description="Ray's dashboard and Jobs API, on 127.0.0.1")
    num_cpus: int = Field(8, ge=1, description="logical: above the real number, so that training runs beside serving")
    num_gpus: int = Field(0, ge=0)
    object_store_mib: int = Field(200, ge=76, description="Ray refuses less than 75 MiB")


class Settings(Section):
    """All sections; each has defaults, so an empty file is a valid one."""

    contribute: ContributeSettings = ContributeSettings()
    refine: RefineSettings = RefineSettings()
    base: BaseSettings = BaseSettings()
    train: TrainSettings = TrainSettings()
    benchmark: BenchmarkSettings = BenchmarkSettings()
    settle: SettleSettings = SettleSettings()
    serve: ServeSettings = ServeSettings()
    attribution: AttributionSettings = AttributionSettings()
    credit: CreditSettings = CreditSettings()
    mlflow: MlflowSettings = MlflowSettings()
    witness: WitnessSettings = WitnessSettings()
    cluster: ClusterSettings = ClusterSettings()


def load_settings(path: Path | str | None = None) -> Settings:
    """Return the settings of a YAML file, of a preset by its name (`local`, `h200`, ...), or the defaults for None.

    Raises:
        UserError: no such file, not YAML, an unknown name or a value out of range.
    """
    if path is None:
        return Settings()
    file = resolve_preset(path)
    loaded = load_yaml(file)
    if loaded is None:
        return Settings()
    if not isinstance(loaded, dict):
        raise UserError(f"{file}: holds a {type(loaded).__name__}; a configuration is a mapping of {_listed(Settings)}")
    return parse_settings(loaded, source=str(file))


def parse_settings(values: dict[str, Any], *, source: str = "settings") -> Settings:
    """Return the settings of a nested mapping; `source` names it in errors."""
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        lines = [_explain(detail) for detail in error.errors()]
        raise UserError("\n".join(f"{source}: {line}" for line in lines)) from error


def preset_names() -> list[str]:
    """Return the names `load_settings` knows without a path."""
    return sorted(file.stem for file in PRESETS_DIRECTORY.glob("*.yaml"))


def resolve_preset(path: Path | str) -> Path:
    """Return the file of a path or a preset name."""
    file = Path(path)
    preset = PRESETS_DIRECTORY / f"{path}.yaml"
    if file.is_file():
        return file
    if file.name == str(path) and preset.is_file():
        return preset
    raise UserError(f"configuration {str(path)!r}: no such file, nor a preset; presets: {', '.join(preset_names())}")


def _explain(detail: ErrorDetails) -> str:
    """One pydantic error as: where, what, remedy."""
    names = [str(part) for part in detail["loc"]]
    where = ".".join(names)
    if detail["type"] != "extra_forbidden":
        return f"{where} = {detail['input']!r}: {detail['msg'][0].lower()}{detail['msg'][1:]}"
    model = _model_at(names[:-1])
    elsewhere = _sections_with(names[-1])
    if elsewhere:
        return f"{where}: no such setting here; it belongs under {elsewhere}"
    near = get_close_matches(names[-1], list(model.model_fields), n=1, cutoff=0.5)
    if near:
        return f"{where}: no such setting; did you mean {'.'.join([*names[:-1], near[0]])!r}?"
    return f"{where}: no such setting; known here: {_listed(model)}"


def _model_at(names: list[str]) -> type[BaseModel]:
    """The model at a path of field names below `Settings`."""
    model: type[BaseModel] = Settings
    for name in names:
        annotation = model.model_fields[name].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        model = annotation
    return model


def _sections_with(field: str) -> str:
    """The sections that know `field`, for a knob written one level too high."""
    found = [name for name in Settings.model_fields if field in _model_at([name]).model_fields]
    return " or ".join(found)


def _listed(model: type[BaseModel]) -> str:
    return ", ".join(model.model_fields)
