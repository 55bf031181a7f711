"""What a trace says about the run as a whole: all that decides its bits, and which queries it was scored against."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

RUN_FILE = "run.json"
IN_RUN_META_FILE = "in_run/meta.json"
IN_RUN_SCORES_FILE = "in_run/steps.npy"
METHODS = ("sgd", "adam")
"""Order of the second axis of in_run/steps.npy."""


@dataclass(frozen=True)
class AdamConstants:
    """What torch.optim.AdamW was given."""

    beta1: float
    beta2: float
    eps: float


@dataclass(frozen=True)
class Attempt:
    """A worker group began with `step` updates done."""

    attempt: int
    world_size: int
    step: int
    time_us: int


@dataclass(frozen=True)
class RunFacts:
    """The recipe of a run but for its rows and rates, which stand by step.

    `state_steps`: after how many updates the whole state was kept; 0, the weights at the start, is not among them.
    `versions`: of the libraries whose arithmetic the bits depend on. `device`: "cpu", or the GPU's name.
    """

    adam: AdamConstants
    weight_decay: float
    max_grad_norm: float
    lora_dropout: float
    rank: int
    alpha: int
    target_modules: tuple[str, ...]
    seed: int
    dtype: str
    attention: str
    deterministic: bool
    device: str
    world_size: int
    threads_per_worker: int
    zero_stage: int
    num_parameters: int
    state_steps: tuple[int, ...]
    attempts: tuple[Attempt, ...]
    versions: Mapping[str, str]

    @property
    def bytes_per_state(self) -> int:
        """Weights and both moments in float32."""
        return 12 * self.num_parameters

    def to_json(self) -> dict[str, Any]:
        return {"v": 2, **asdict(self)}

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> "RunFacts":
        plain = {name: value for name, value in fields.items() if name != "v"}
        plain["adam"] = AdamConstants(**plain["adam"])
        plain["attempts"] = tuple(Attempt(**attempt) for attempt in plain["attempts"])
        for name in ("target_modules", "state_steps"):
            plain[name] = tuple(plain[name])
        return RunFacts(**plain)


@dataclass(frozen=True)
class ScoredQuery:
    """One column of the in-run scores: a query set, or one query of it when `query` names one."""

    query_set: str
    digest: str
    query: str
    num_items: int
    num_target_tokens: int


@dataclass(frozen=True)
class InRunMeta:
    """How in-run scores were taken. `overhead`: their share of the training steps' time (rank 0, measured)."""

    queries: tuple[ScoredQuery, ...]
    refresh_steps: int
    num_refreshes: int
    overhead: float

    def to_json(self) -> dict[str, Any]:
        return {"v": 1, "methods": list(METHODS), **asdict(self)}

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> "InRunMeta":
        plain = {name: value for name, value in fields.items() if name not in ("v", "methods")}
        return InRunMeta(**{**plain, "queries": tuple(ScoredQuery(**query) for query in plain["queries"])})
