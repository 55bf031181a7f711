"""What an adapter was made from, as far as it can be made again: base, rows, settings."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import ValidationError

from configs.errors import UserError
from configs.schema import TrainSettings
from pipelines.benchmark.run import TrainedAdapter, resolve_adapter

if TYPE_CHECKING:
    from attribution.bodies import RefinementBody
    from attribution.trail import Entry, Trail


class SettleError(UserError):
    """An adapter that cannot be settled as asked; the message says what is missing."""


@dataclass(frozen=True)
class Subject:
    """An adapter with the settings it was trained under; `dataset` is the digest of its refined rows."""

    adapter: TrainedAdapter
    entry: "Entry"
    settings: TrainSettings
    dataset: str
    refinement: "RefinementBody | None"


def subject_of(trail: "Trail", reference: str) -> Subject:
    """Return an adapter by name, name@version or digest, with what it takes to train it again.

    Raises:
        BenchmarkError: no such adapter.
        SettleError: its settings are gone or are not those of this code.
    """
    from attribution.bodies import AdapterBody, RefinementBody
    from attribution.erasure import maker_of

    adapter = resolve_adapter(trail, reference)
    entry = trail.find(adapter.digest)
    assert entry is not None and entry.record is not None and isinstance(entry.record.body, AdapterBody)
    dataset = entry.record.body.dataset
    maker = maker_of(trail, dataset)
    body = maker.record.body if maker is not None and maker.record is not None else None
    refinement = body if isinstance(body, RefinementBody) else None
    return Subject(adapter, entry, _settings(trail, entry, reference), dataset, refinement)


def _settings(trail: "Trail", entry: "Entry", reference: str) -> TrainSettings:
    assert entry.record is not None
    config = entry.record.config
    if not config or not trail.store.has(config):
        raise SettleError(
            f"adapter {reference!r}: the settings it was trained under are not in this home, so no coalition can be "
            "trained like it; `trailmark ask who` and `trailmark benchmark` still work"
        )
    try:
        return TrainSettings.model_validate(trail.get_json(config))
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, detail["loc"])) for detail in error.errors())
        raise SettleError(
            f"adapter {reference!r}: it was trained under settings that this code does not take ({fields}); settle it "
            f"with the code {entry.record.code.commit or 'of that time'}"
        ) from error
