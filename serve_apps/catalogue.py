"""Which models are served: the base and every published adapter trained on it, as the log has them at this moment."""

import logging
from dataclasses import dataclass
from typing import Any

from attribution.registry import Published
from attribution.store import StoreError
from attribution.trail import Trail
from serve_apps.calls import AdapterChoice
from serve_apps.errors import ApiError, Problem, tampered, unknown_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelEntry:
    """One line of GET /v1/models; `alias_of` is set for a bare adapter name, which stands for its newest version."""

    model_id: str
    created_s: int
    digest: str
    base: str | None = None
    alias_of: str | None = None

    def body(self) -> dict[str, Any]:
        """Return it as OpenAI's model object, with ours under `trailmark`."""
        ours = {"digest": self.digest, "base": self.base, "alias_of": self.alias_of}
        return {
            "id": self.model_id,
            "object": "model",
            "created": self.created_s,
            "owned_by": "trailmark",
            "trailmark": ours,
        }


class Catalogue:
    """A view of the registry for one base model. Every call sees what has been published since."""

    def __init__(self, trail: Trail, *, base_name: str, base_digest: str, started_s: int) -> None:
        self._trail = trail
        self._base = ModelEntry(base_name, started_s, base_digest)
        self._base_of: dict[str, str] = {}
        self._versions: dict[str, Published] = {}
        self._newest: dict[str, Published] = {}
        self._size = -1

    def models(self) -> list[ModelEntry]:
        """Return the base, then per adapter its bare name and every version, by name."""
        served = [published for published in self._published().values() if self._is_served(published)]
        newest = {published.name: published for published in served}  # versions come in rising order
        aliases = [self._entry(found, name, found.reference) for name, found in newest.items()]
        versions = [self._entry(found, found.reference, None) for found in served]
        return [self._base, *sorted(aliases + versions, key=lambda entry: _natural(entry.model_id))]

    def model(self, model_id: str) -> ModelEntry:
        """Return one entry; ApiError 404 naming near matches when there is none."""
        for entry in self.models():
            if entry.model_id == model_id:
                return entry
        raise self._unknown(model_id)

    def choose(self, model_id: str) -> AdapterChoice | None:
        """Return the adapter that a model name stands for now, None for the base.

        ApiError 404 when nobody published it, 400 when it was trained on another base than the one served.
        """
        if model_id == self._base.model_id:
            return None
        published = self._published().get(model_id) or self._newest.get(model_id)
        if published is None:
            raise self._unknown(model_id)
        base = self._base_digest(published.digest)
        if base is None:
            raise tampered(published.reference, published.digest)
        if base != self._base.digest:
            message = f"The model `{model_id}` was trained on base {base}, and this server runs {self._base.digest}."
            raise ApiError(Problem(400, message, code="base_mismatch", param="model"))
        made = self._trail.find(published.digest)
        return AdapterChoice(published.digest, published.reference, made.leaf_hash if made else None)

    def _published(self) -> dict[str, Published]:
        """Return every adapter version by `name@version`, in rising order; read again when the log has grown."""
        self._trail.refresh()
        size = self._trail.log.size
        if size != self._size:
            adapters = self._trail.registry.list(kind="adapter")
            self._versions = {found.reference: found for found in adapters}
            self._newest = {found.name: found for found in adapters}
            self._size = size
        return self._versions

    def _is_served(self, published: Published) -> bool:
        return self._base_digest(published.digest) == self._base.digest

    def _unknown(self, model_id: str) -> ApiError:
        return unknown_model(model_id, [entry.model_id for entry in self.models()])

    def _entry(self, published: Published, model_id: str, alias_of: str | None) -> ModelEntry:
        return ModelEntry(model_id, published.time_us // 1_000_000, published.digest, self._base.digest, alias_of)

    def _base_digest(self, adapter: str) -> str | None:
        """Return the base an adapter's manifest names, None when the manifest is gone or altered; read once."""
        if adapter not in self._base_of:
            try:
                self._base_of[adapter] = str(self._trail.store.manifest(adapter).meta.get("base", ""))
            except StoreError as error:
                logger.error("adapter %s is not served: %s", adapter, error)
                return None
        return self._base_of[adapter]


def _natural(model_id: str) -> tuple[str, int]:
    name, _, version = model_id.partition("@")
    return name, int(version or 0)
