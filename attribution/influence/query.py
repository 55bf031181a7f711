"""What the model says about one completion: gradients at every checkpoint, and the adapter's gain over the base."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attribution.influence.encode import IGNORED_LABEL
from attribution.influence.factors import Encoded, LoraFactors, set_factor_weights
from attribution.influence.gradients import GradientFeatures, target_log_likelihoods
from attribution.influence.rows import StoreRows, TraceRows
from attribution.influence.store import Trace, TraceError

if TYPE_CHECKING:
    from attribution.influence.codec import GradientCodec
    from attribution.influence.gradient_store import GradientStore
    from attribution.store import Store


ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class Completion:
    """What was asked and answered, as token ids."""

    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...]

    @property
    def encoded(self) -> Encoded:
        ignored = [IGNORED_LABEL] * len(self.prompt_token_ids)
        return [*self.prompt_token_ids, *self.output_token_ids], [*ignored, *self.output_token_ids]


class AdapterModels:
    """One base model in memory with one adapter on it, in float32 and evaluation mode; both are swapped on demand.

    Not safe for use by several threads: an actor or a command owns one.
    """

    def __init__(self) -> None:
        self._base_path: Path | None = None
        self._adapter_path: Path | None = None
        self._model: Any = None
        self._features: tuple[tuple[int, int], GradientFeatures] | None = None
        self._codecs: dict[Path, GradientCodec] = {}
        self._states: dict[tuple[Path, int], tuple[dict[str, Tensor], dict[str, Tensor] | None]] = {}
        self._own: dict[tuple[Path, Path], bool] = {}
        self._verified: set[Path] = set()

    def folder(self, store: "Store", digest: str) -> Path:
        """Return a stored folder, its files verified the first time it is asked for: a base takes seconds to hash."""
        path = store.get_directory(digest, verify=False)
        if path not in self._verified:
            store.get_directory(digest)
            self._verified.add(path)
        return path

    def gains(self, completion: Completion, *, base: Path, adapter: Path) -> NDArray[np.float64]:
        """Return float64 [output tokens]: nats by which the adapter made each token likelier than the base alone."""
        model = self._load(base, adapter)
        batch = [completion.encoded]
        adapted = target_log_likelihoods(model, batch)[0]
        with model.disable_adapter():
            alone = target_log_likelihoods(model, batch)[0]
        return (adapted - alone).double().numpy()

    def is_own(self, trace: Trace, adapter: Path) -> bool:
        """Say whether an adapter's weights are those its trace ends with: none merged, averaged or edited since."""
        key = (trace.path, adapter)
        if key not in self._own:
            from safetensors.torch import load_file

            served = load_file(adapter / ADAPTER_WEIGHTS_FILE)
            trained = trace.adapter_weights(trace.checkpoint_steps[-1])
            self._own[key] = served.keys() == trained.keys() and all(
                torch.equal(served[name].float(), trained[name].float()) for name in served
            )
        return self._own[key]

    def features(
        self, completion: Completion, rows: "TraceRows | StoreRows", *, base: Path, adapter: Path, num_groups: int
    ) -> NDArray[np.float32]:
        """Return float32 [views, token groups, d] of the completion, made as the rows were."""
        if isinstance(rows, StoreRows):
            return self.store_features(
                completion, rows.trace, rows.store, base=base, adapter=adapter, num_groups=num_groups
            )
        trace = rows.trace
        model = self._load(base, adapter)
        features = self._features_like(model, trace)
        with served_again(features.factors):
            return np.stack(
                [self._at(features, completion, trace, step, num_groups) for step in trace.checkpoint_steps]
            )

    def store_features(
        self,
        completion: Completion,
        trace: Trace,
        store: "GradientStore",
        *,
        base: Path,
        adapter: Path,
        num_groups: int = 1,
        views: Sequence[str] | None = None,
    ) -> NDArray[np.float32]:
        """Return float32 [views, token groups, d] at some checkpoints of a store, all by default.

        One forward per view, one backward per view and group. Raises TraceError when the store is of another adapter.
        """
        factors = LoraFactors(self._load(base, adapter))
        with served_again(factors):
            parts = [self._view(factors, completion, trace, store, view, num_groups) for view in views or store.steps]
        return np.stack(parts)

    def _view(
        self,
        factors: LoraFactors,
        completion: Completion,
        trace: Trace,
        store: "GradientStore",
        view: str,
        num_groups: int,
    ) -> NDArray[np.float32]:
        codec, weights, moments = self._checkpoint(factors, trace, store, view)
        return checkpoint_rows(factors, codec, completion.encoded, weights, exp_avg_sq=moments, num_groups=num_groups)

    def set_features(
        self,
        queries: Sequence[Encoded],
        trace: Trace,
        store: "GradientStore",
        *,
        base: Path,
        adapter: Path,
        views: Sequence[str],
    ) -> NDArray[np.float32]:
        """Return float32 [views, queries, d] of a query set, in batches. Raises TraceError as `store_features` does."""
        factors = LoraFactors(self._load(base, adapter))
        rows = np.empty((len(views), len(queries), store.dim(views[0])), np.float32)
        with served_again(factors):
            for index, view in enumerate(views):
                codec, weights, moments = self._checkpoint(factors, trace, store, view)
                set_factor_weights(factors, weights)
                for batch in factors.batches(queries):
                    pairs = factors.pairs([queries[row] for row in batch])
                    rows[index, batch] = codec.encode(pairs, exp_avg_sq=moments).detach().cpu().numpy()
        return rows

    def _checkpoint(
        self, factors: LoraFactors, trace: Trace, store: "GradientStore", view: str
    ) -> "tuple[GradientCodec, dict[str, Tensor], dict[str, Tensor] | None]":
        """Return a checkpoint's codec, weights and second moments. Raises TraceError for another adapter's."""
        codec = self._codec(store, view)
        if list(factors.shapes) != [one.name for one in codec.factors]:
            raise TraceError(
                f"trace {trace.path.name}: its gradients are of other modules than the adapter's; "
                "the trace belongs to another adapter"
            )
        return codec, *self._state(trace, int(view), with_moments=codec.preconditioner == "adam")

    def _state(
        self, trace: Trace, step: int, *, with_moments: bool
    ) -> "tuple[dict[str, Tensor], dict[str, Tensor] | None]":
        """Return a checkpoint's weights and, where rows were made with them, second moments; kept for later queries."""
        key = (trace.path, step)
        if key not in self._states:
            self._states[key] = (trace.adapter_weights(step), trace.exp_avg_sq(step) if with_moments else None)
        return self._states[key]

    def _codec(self, store: "GradientStore", view: str) -> "GradientCodec":
        key = store.codec_file(view)
        if key not in self._codecs:
            device = next(self._model.parameters()).device
            self._codecs[key] = store.codec(view).to(device)
        return self._codecs[key]

    @staticmethod
    def _at(
        features: GradientFeatures, completion: Completion, trace: Trace, step: int, num_groups: int
    ) -> NDArray[np.float32]:
        set_factor_weights(features.factors, trace.adapter_weights(step))
        input_ids, labels = completion.encoded
        rows = features.token_features(input_ids, labels, exp_avg_sq=trace.exp_avg_sq(step), num_groups=num_groups)
        return rows.numpy()

    def _features_like(self, model: nn.Module, trace: Trace) -> GradientFeatures:
        """Return features projected as the trace's were. Raises TraceError when the adapter has other modules."""
        key = (trace.projection_dim, trace.projection_seed)
        if self._features is None or self._features[0] != key:
            self._features = (key, GradientFeatures(model, projection_dim=key[0], seed=key[1]))
        features = self._features[1]
        if tuple(features.module_dims) != trace.module_names:
            raise TraceError(
                f"trace {trace.path.name}: its gradients are of other modules than the adapter's; "
                "the trace belongs to another adapter"
            )
        return features

    def _load(self, base: Path, adapter: Path) -> Any:
        if (self._base_path, self._adapter_path) == (base, adapter):
            return self._model
        from peft import PeftModel
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()  # its bar would be drawn over ours, and into the logs of an actor
        plain = self._model.unload() if self._model is not None and self._base_path == base else None
        self._model = self._features = self._base_path = self._adapter_path = None
        self._codecs.clear()
        self._states.clear()
        if plain is None:
            plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
            plain.requires_grad_(False)
        self._model = PeftModel.from_pretrained(plain, adapter).eval()
        self._base_path, self._adapter_path = base, adapter
        return self._model


def checkpoint_rows(
    factors: LoraFactors,
    codec: "GradientCodec",
    example: Encoded,
    weights: Mapping[str, Tensor],
    *,
    exp_avg_sq: Mapping[str, Tensor] | None = None,
    num_groups: int = 1,
) -> NDArray[np.float32]:
    """Return float32 [token groups, d] of an example at a checkpoint, whose weights stay in the model."""
    set_factor_weights(factors, weights)
    groups = factors.group_pairs(example, num_groups=num_groups)
    return torch.cat([codec.encode(pairs, exp_avg_sq=exp_avg_sq) for pairs in groups]).cpu().numpy()


@contextmanager
def served_again(factors: LoraFactors) -> Iterator[None]:
    """Put the factors' present weights back afterwards."""
    served = {name: parameter.detach().clone() for name, parameter in factors.parameters().items()}
    try:
        yield
    finally:
        set_factor_weights(factors, served)
