"""The body of each kind of record: what happened, in integers, text, booleans and lists of such.

Names ending in `_micro` are values times 1e6, rounded; times are microseconds since 1970; a digest is `sha256:` and
64 hex digits. These formats leave the system: a field is never changed, only new kinds and new body versions are added.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

DIGEST_FORMAT = "digest"
HEX_FORMAT = "hex32"

Digest = Annotated[str, DIGEST_FORMAT]
"""`sha256:` and 64 hex digits: names a blob or directory of the store."""
Hex32 = Annotated[str, HEX_FORMAT]
"""32 bytes as 64 hex digits: a key, key id, leaf hash or tree root."""


@dataclass(frozen=True)
class ContributorBody:
    """A person or team joins; signed with the key it introduces."""

    name: str
    key_id: Hex32
    public_key: Hex32


@dataclass(frozen=True)
class KeyBody:
    """A key of the operator or of a witness is added or retired."""

    name: str
    key_id: Hex32
    public_key: Hex32
    action: Literal["add", "retire"]


@dataclass(frozen=True)
class DatasetBody:
    """A contribution of rows; `rows` is the blob of rows.parquet."""

    name: str
    licence: str
    format: str
    num_rows: int
    num_rejected: int
    rows: Digest
    source_file_name: str


@dataclass(frozen=True)
class RuleUse:
    """One refine rule as it ran; `params` is its settings as JSON text."""

    name: str
    digest: Digest
    params: str


@dataclass(frozen=True)
class Dropped:
    """How many rows one rule dropped for one reason."""

    rule: str
    reason: str
    count: int


@dataclass(frozen=True)
class ContributorRows:
    """One contributor's rows before and after refining."""

    key_id: Hex32
    num_in: int
    num_kept: int


@dataclass(frozen=True)
class RefinementBody:
    """Contributions became a refined dataset; `decisions` and `rows` are blobs."""

    name: str
    rules: tuple[RuleUse, ...]
    num_in: int
    num_kept: int
    dropped: tuple[Dropped, ...]
    per_contributor: tuple[ContributorRows, ...]
    decisions: Digest
    rows: Digest


@dataclass(frozen=True)
class PromptBody:
    """A prompt template, or a new version of one."""

    name: str
    template: Digest


@dataclass(frozen=True)
class BaseModelBody:
    """A frozen base model enters the store; `note` says how it was converted."""

    name: str
    source: str
    architecture: str
    licence: str
    dtype: str
    note: str
    num_parameters: int


@dataclass(frozen=True)
class AdapterBody:
    """A LoRA adapter was trained; `trace` is the directory that says which example was seen when."""

    name: str
    base: Digest
    dataset: Digest
    rank: int
    alpha: int
    target_modules: tuple[str, ...]
    num_steps: int
    num_examples: int
    final_loss_micro: int
    reload_max_abs_diff_micro: int
    trace: Digest


@dataclass(frozen=True)
class Metric:
    """Base against adapter on one metric, with the interval of the difference."""

    metric: str
    base_micro: int
    adapter_micro: int
    delta_micro: int
    low_micro: int
    high_micro: int
    num_items: int


@dataclass(frozen=True)
class BenchmarkBody:
    """An adapter was measured against its base on a suite; `details` is the blob of answers per item."""

    name: str
    suite: Digest
    base: Digest
    adapter: Digest
    num_items: int
    metrics: tuple[Metric, ...]
    details: Digest


@dataclass(frozen=True)
class PublicationBody:
    """`name@version` now means `digest`, for good."""

    name: str
    version: int
    artefact_kind: str
    digest: Digest


@dataclass(frozen=True)
class ApprovalBody:
    """Someone said yes or no to an artefact."""

    subject: Digest
    decision: Literal["approved", "refused"]
    reason: str


@dataclass(frozen=True)
class RetrievalBody:
    """A retrieval index was built."""

    name: str
    index: Digest


@dataclass(frozen=True)
class WorkflowRunBody:
    """A workflow ended; one line per step."""

    name: str
    status: str
    steps: tuple[str, ...]


@dataclass(frozen=True)
class WorkflowPatchBody:
    """A workflow definition was changed; `diff` is a blob."""

    workflow: str
    diff: Digest
    reason: str


@dataclass(frozen=True)
class AdapterLoadedBody:
    """A serving replica loaded an adapter whose digest it had checked."""

    replica: str
    adapter: Digest
    base: Digest


@dataclass(frozen=True)
class CompletionsBody:
    """A batch of completions: `root` of the inner tree over their salted receipts, `table` the private rows."""

    replica: str
    root: Hex32
    count: int
    first_time_us: int
    last_time_us: int
    table: Digest


@dataclass(frozen=True)
class Share:
    """One contributor's share of an answer, with its interval."""

    key_id: Hex32
    share_micro: int
    low_micro: int
    high_micro: int


@dataclass(frozen=True)
class InfluenceBody:
    """Scores of the training examples for one receipt; `table` is the blob of all scores, `top` the largest shares."""

    receipt_id: str
    receipt_leaf: Hex32
    method: str
    table: Digest
    top: tuple[Share, ...]


@dataclass(frozen=True)
class StatementBody:
    """Credit over a period; `table` is the blob of payouts."""

    period_start_us: int
    period_end_us: int
    table: Digest


@dataclass(frozen=True)
class RedactionBody:
    """The record of leaf `leaf` was erased; its leaf stays."""

    leaf: Hex32
    reason: str


@dataclass(frozen=True)
class ModelSignatureBody:
    """The files of an artefact were signed for tools that know no log; `signature` is the blob of the signature.

    `format` and `algorithm` say which kind of signature it is, `public_key` is the PEM that checks it.
    """

    name: str
    digest: Digest
    format: str
    algorithm: str
    public_key: str
    signature: Digest


@dataclass(frozen=True)
class MetricChange:
    """An adapter's metric before and after something changed, with the interval of the paired difference."""

    benchmark: str
    metric: str
    before_micro: int
    after_micro: int
    delta_micro: int
    low_micro: int
    high_micro: int
    num_items: int


@dataclass(frozen=True)
class WorkflowEffectBody:
    """What workflow patches (leaf hashes) did to the outcome, told by the next run that ended.

    `also_changed` names what else differed between the two runs, so that the patches alone cannot have the credit.
    """

    workflow: str
    patches: tuple[Hex32, ...]
    verdict: Literal["improved", "worsened", "mixed", "no measurable effect", "not measured"]
    reason: str
    confidence_micro: int
    changes: tuple[MetricChange, ...]
    also_changed: tuple[str, ...]


@dataclass(frozen=True)
class KeyRotationBody:
    """A key takes the place of an older one; signed with the new key, and with the old one or the operator's.

    Both public keys stand here, so that the signatures can be checked by whoever knows either of them.
    """

    name: str
    role: Literal["operator", "log", "contributor"]
    old_key_id: Hex32
    old_public_key: Hex32
    key_id: Hex32
    public_key: Hex32


@dataclass(frozen=True)
class KeyRevocationBody:
    """What a key signed at `from_us` or later does not count; signed by the operator."""

    name: str
    role: Literal["operator", "log", "contributor"]
    key_id: Hex32
    from_us: int
    reason: str


@dataclass(frozen=True)
class TableRewrite:
    """A stored table that record `leaf` made gave way to one without the erased rows; `num_rows` are left.

    `part` says which: dataset, refined or trace (directories), rows or decisions.
    """

    part: Literal["dataset", "refined", "rows", "decisions", "trace"]
    leaf: Hex32
    before: Digest
    after: Digest
    num_rows: int


@dataclass(frozen=True)
class RowRedactionBody:
    """Rows were erased from every table that held them.

    `lines` are their line numbers in the contributed file (empty: every row): an id of a row could be guessed from.
    """

    contribution: Hex32
    lines: tuple[int, ...]
    rewritten: tuple[TableRewrite, ...]
    reason: str


@dataclass(frozen=True)
class PlayerValue:
    """What one part of a system was worth: its Banzhaf value and its leave-one-out value, each with an interval.

    `id` names what was switched on and off (a key id, leaf hash or digest); `name` is empty where another record says
    it, so that it can be erased there. `p_micro` is adjusted by Holm over the settlement's players and rounded up.
    """

    kind: Literal["contributor", "dataset", "adapter", "rule", "base", "prompt", "retrieval", "workflow_patch"]
    id: str
    name: str
    value_micro: int
    low_micro: int
    high_micro: int
    loo_micro: int
    loo_low_micro: int
    loo_high_micro: int
    p_micro: int
    verdict: Literal["helped", "hindered", "no measurable effect"]


@dataclass(frozen=True)
class SettlementBody:
    """What the players behind an adapter were worth on a suite, measured by training coalitions of them again.

    Values are in the unit that `utility` names, higher being better. `players` holds the largest, all `num_players` of
    them where the record has room; `values` is the blob of all. `table` is the blob of what was measured (coalition,
    digest of what was trained, utility of each item), `plan` the JSON blob that says how to measure any of it again.
    A cell is one item's utility under one coalition.
    """

    adapter: Digest
    adapter_name: str
    base: Digest
    dataset: Digest
    suite: Digest
    suite_name: str
    over: str
    utility: str
    method: str
    players: tuple[PlayerValue, ...]
    num_players: int
    num_coalitions: int
    num_cells: int
    empty_micro: int
    full_micro: int
    confidence_micro: int
    values: Digest
    table: Digest
    plan: Digest


Body = (
    ContributorBody
    | KeyBody
    | DatasetBody
    | RefinementBody
    | PromptBody
    | BaseModelBody
    | AdapterBody
    | BenchmarkBody
    | PublicationBody
    | ApprovalBody
    | RetrievalBody
    | WorkflowRunBody
    | WorkflowPatchBody
    | AdapterLoadedBody
    | CompletionsBody
    | InfluenceBody
    | StatementBody
    | RedactionBody
    | ModelSignatureBody
    | WorkflowEffectBody
    | KeyRotationBody
    | KeyRevocationBody
    | RowRedactionBody
    | SettlementBody
)

BODY_OF_KIND: dict[str, type[Body]] = {
    "contributor": ContributorBody,
    "key": KeyBody,
    "dataset": DatasetBody,
    "refinement": RefinementBody,
    "prompt": PromptBody,
    "base_model": BaseModelBody,
    "adapter": AdapterBody,
    "benchmark": BenchmarkBody,
    "publication": PublicationBody,
    "approval": ApprovalBody,
    "retrieval": RetrievalBody,
    "workflow_run": WorkflowRunBody,
    "workflow_patch": WorkflowPatchBody,
    "adapter_loaded": AdapterLoadedBody,
    "completions": CompletionsBody,
    "influence": InfluenceBody,
    "statement": StatementBody,
    "redaction": RedactionBody,
    "model_signature": ModelSignatureBody,
    "workflow_effect": WorkflowEffectBody,
    "key_rotation": KeyRotationBody,
    "key_revocation": KeyRevocationBody,
    "row_redaction": RowRedactionBody,
    "settlement": SettlementBody,
}
KINDS = tuple(BODY_OF_KIND)
NOTICE_KINDS = frozenset({"key_rotation", "key_revocation", "redaction", "row_redaction"})
"""What bears on records that came before: their keys changed, or they were erased."""
