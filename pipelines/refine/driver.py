"""Refine contributions with Ray Data: blocks of rows in parallel, one pass over keys, one dataset whatever the workers.

Ray is initialised by the caller. The store must be readable, and HOME/run writable, from every node.
"""

import contextlib
import json
import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.data
import rfc8785

from attribution.bodies import ContributorRows, Dropped, RefinementBody, RuleUse
from attribution.records import Artefact, Party
from configs.errors import UserError
from configs.schema import RefineSettings
from pipelines.refine import dedup
from pipelines.refine.annotate import Origin, annotate
from pipelines.refine.merge import Tally, merge, save_block
from pipelines.refine.read import Block, Contribution, blocks, read_block, refinable, verified_rows
from pipelines.refine.rules import row_rules
from pipelines.refine.table import DECISIONS_FILE, ROWS_FILE, SUMMARY_FILE

if TYPE_CHECKING:
    from attribution.trail import Entry, Trail

SCRATCH_FOLDER = "run"
KIND = "refined"

Progress = Callable[[int, int], None]
"""Called with (rows judged, rows in all), first with zero rows judged."""


class RefineError(UserError):
    """A refinement that leaves nothing."""


@dataclass(frozen=True)
class RefineReport:
    """What a refinement did. `dropped` and `per_contributor` are those of its record, in its order."""

    entry: "Entry"
    digest: str
    num_in: int
    num_kept: int
    dropped: tuple[Dropped, ...]
    per_contributor: tuple[ContributorRows, ...]


@dataclass(frozen=True)
class _Made:
    """A refined dataset in the store, before its record."""

    digest: str
    body: RefinementBody


def refine(
    trail: "Trail",
    datasets: Sequence[str],
    settings: RefineSettings,
    *,
    name: str,
    progress: Progress | None = None,
    workflow: Artefact | None = None,
) -> RefineReport:
    """Refine `datasets` (see `read.refinable`) into one dataset in the store, and record it.

    The digest depends on the contributions and the rules' settings alone: not on `num_workers`, `block_rows`, the order
    of `datasets` or `name`. `workflow`: the definition of the workflow that asks, an input of the record.

    Raises:
        UserError: an unknown, erased, altered or unsigned dataset, or one of a revoked key; or every row dropped (the
            message says why).
    """
    chosen = refinable(trail, datasets)
    scratch_parent = trail.home / SCRATCH_FOLDER
    scratch_parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="refine-", dir=scratch_parent))
    try:
        made = _make(trail, chosen, settings, name=name, folder=folder, progress=progress or _ignore)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return _record(trail, chosen, settings, made, workflow=workflow)


def _make(
    trail: "Trail",
    chosen: Sequence[Contribution],
    settings: RefineSettings,
    *,
    name: str,
    folder: Path,
    progress: Progress,
) -> _Made:
    scratch, output = folder / "blocks", folder / "output"
    scratch.mkdir()
    output.mkdir()
    paths = [(contribution, verified_rows(trail, contribution)) for contribution in chosen]
    work = blocks(paths, block_rows=settings.block_rows)
    annotate_blocks(work, settings, scratch=scratch, progress=progress)
    tally = merge(scratch, len(work), folder=output)
    if not tally.kept:
        raise RefineError(f"refine {name!r}: every row was dropped: {_reasons(tally)}; nothing was recorded")
    body = _body(trail, chosen, settings, tally, name=name, output=output)
    (output / SUMMARY_FILE).write_bytes(rfc8785.dumps(_summary(body)))
    digest = trail.store.put_directory(output, kind=KIND, meta={"num_rows": body.num_kept})
    return _Made(digest, body)


def annotate_blocks(work: Sequence[Block], settings: RefineSettings, *, scratch: Path, progress: Progress) -> None:
    """Judge every block with at most `settings.num_workers` Ray Data tasks at once; the results lie in `scratch`."""
    num_rows = sum(block.num_rows for block in work)
    progress(0, num_rows)
    if not work:
        return
    with _quiet_ray_data():
        items = [_task_item(block) for block in work]
        judged = ray.data.from_items(items, override_num_blocks=len(items)).map(
            _judge_block,
            fn_kwargs={"settings": settings, "scratch": scratch},
            compute=ray.data.TaskPoolStrategy(size=settings.num_workers),
        )
        done = 0
        for row in judged.iter_rows():
            done += row["num_rows"]
            progress(done, num_rows)


def _task_item(block: Block) -> dict[str, Any]:
    """Return the block as plain columns, which is what Ray Data carries without pickling."""
    return {
        "index": block.index,
        "path": str(block.path),
        "first_row": block.first_row,
        "num_rows": block.num_rows,
        **asdict(block.origin),
    }


def _judge_block(item: dict[str, Any], *, settings: RefineSettings, scratch: Path) -> dict[str, Any]:
    """One Ray Data task: read, judge, save. Only the count returns through Ray; the texts go by the shared folder."""
    origin = Origin(item["contributor"], item["licence"], item["dataset"], item["leaf_index"])
    block = Block(item["index"], Path(item["path"]), origin, item["first_row"], item["num_rows"])
    save_block(scratch, block.index, annotate(read_block(block), origin, rules=row_rules(settings)))
    return {"num_rows": block.num_rows}


@contextlib.contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """Turn Ray Data's own bars and notes off for the block; the caller shows progress."""
    context = ray.data.DataContext.get_current()
    logger = logging.getLogger("ray.data")
    before = context.enable_progress_bars, logger.level
    context.enable_progress_bars = False
    # A warning of Ray's says at each run that its bars are off; what fails still raises.
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars = before[0]
        logger.setLevel(before[1])


def _body(
    trail: "Trail",
    chosen: Sequence[Contribution],
    settings: RefineSettings,
    tally: Tally,
    *,
    name: str,
    output: Path,
) -> RefinementBody:
    num_in: Counter[str] = Counter()
    for contribution in chosen:
        num_in[contribution.origin.contributor] += contribution.num_rows
    uses = [RuleUse(rule.name, rule.digest, json.dumps(dict(rule.params))) for rule in row_rules(settings)]
    by_count = sorted(tally.dropped.items(), key=lambda item: (-item[1], item[0]))
    return RefinementBody(
        name=name,
        rules=(*uses, RuleUse(dedup.NAME, dedup.digest(), "{}")),
        num_in=num_in.total(),
        num_kept=tally.kept.total(),
        dropped=tuple(Dropped(rule, reason, count) for (rule, reason), count in by_count),
        per_contributor=tuple(ContributorRows(key, num_in[key], tally.kept[key]) for key in num_in),
        decisions=trail.store.put_blob(output / DECISIONS_FILE),
        rows=trail.store.put_blob(output / ROWS_FILE),
    )


def _summary(body: RefinementBody) -> dict[str, Any]:
    """What stands beside the rows for a reader without the log: everything but the name, which is not content."""
    return {
        "v": 1,
        "num_in": body.num_in,
        "num_kept": body.num_kept,
        "rules": [{"name": use.name, "digest": use.digest, "params": json.loads(use.params)} for use in body.rules],
        "dropped": [{"rule": drop.rule, "reason": drop.reason, "count": drop.count} for drop in body.dropped],
        "per_contributor": [
            {"key_id": rows.key_id, "num_in": rows.num_in, "num_kept": rows.num_kept} for rows in body.per_contributor
        ],
    }


CONTRIBUTION = "contribution"
"""The name of every contribution among the inputs: theirs are contributors' words, and go when these are erased."""


def _record(
    trail: "Trail",
    chosen: Sequence[Contribution],
    settings: RefineSettings,
    made: _Made,
    *,
    workflow: Artefact | None,
) -> RefineReport:
    asked_by = [workflow] if workflow else []
    patches = [patch.leaf_hash for item in asked_by if (patch := trail.find(item.digest))]
    operator = trail.keys.get("operator")
    authors = dict.fromkeys(contribution.origin.contributor for contribution in chosen)
    entry = trail.record(
        "refinement",
        made.body,
        inputs=[*(Artefact("dataset", CONTRIBUTION, contribution.rows) for contribution in chosen), *asked_by],
        outputs=[Artefact(KIND, made.body.name, made.digest)],
        contributors=[Party(operator.key_id, "refiner"), *(Party(key_id, "contributor") for key_id in authors)],
        parents=list(dict.fromkeys([*(leaf for each in chosen for leaf in _records_behind(trail, each)), *patches])),
        config=trail.run_config(settings),
    )
    body = made.body
    return RefineReport(entry, made.digest, body.num_in, body.num_kept, body.dropped, body.per_contributor)


def _records_behind(trail: "Trail", contribution: Contribution) -> Iterator[str]:
    """The contribution's record and, where rows of it were erased, the redaction that left these."""
    yield contribution.origin.dataset
    made = trail.find(contribution.rows)
    if made is not None:
        yield made.leaf_hash


def _reasons(tally: Tally) -> str:
    return ", ".join(f"{count} by {rule} ({reason})" for (rule, reason), count in tally.dropped.most_common())


def _ignore(done: int, total: int) -> None:
    """Show nothing."""
