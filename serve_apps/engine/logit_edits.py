"""What a request changes in its own logits before a token is chosen: penalties, biases, tokens held back, a grammar."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kernels.devices import to_device
from serve_apps.engine.config import SamplingParams
from serve_apps.engine.grammar import GrammarState

FIRST_ROOM = 256


class LogitEdits:
    """One request's edits and the tokens they depend on. Cheap per token: nothing is recounted."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        *,
        end_token_ids: frozenset[int],
        grammar: GrammarState | None,
    ) -> None:
        self.params = params
        self.grammar = grammar
        self._held_back = np.array(sorted(end_token_ids), dtype=np.int64)
        self._bias_ids = np.array([token_id for token_id, _ in params.logit_bias], dtype=np.int64)
        self._biases = np.array([bias for _, bias in params.logit_bias], dtype=np.float32)
        self._counts_outputs = bool(params.presence_penalty or params.frequency_penalty)
        self._is_penalised = params.repetition_penalty != 1 or self._counts_outputs
        self._num_output = 0
        # Distinct tokens met so far: place of each id, ids and how often each stands in the output.
        self._place: dict[int, int] = {}
        self._ids = np.empty(FIRST_ROOM, dtype=np.int64)
        self._counts = np.zeros(FIRST_ROOM, dtype=np.float32)
        if params.repetition_penalty != 1:
            for token_id in prompt_token_ids:
                self._meet(token_id)

    @property
    def holds_back(self) -> np.ndarray:
        """Ids of the end tokens while the answer is shorter than `min_tokens`; empty afterwards."""
        return self._held_back if self._num_output < self.params.min_tokens else self._held_back[:0]

    @property
    def biases(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids with a bias, and the biases."""
        return self._bias_ids, self._biases

    @property
    def penalised(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids that penalties touch, and how often each stands in the output."""
        size = len(self._place)
        return self._ids[:size], self._counts[:size]

    @property
    def are_none(self) -> bool:
        """Whether the next token's logits stay as they are."""
        return not (len(self._place) or len(self._bias_ids) or len(self.holds_back) or self.grammar)

    def note(self, token_id: int) -> None:
        """Take in a token of the output."""
        self._num_output += 1
        if self._is_penalised:
            self._counts[self._meet(token_id)] += 1
        if self.grammar is not None:
            self.grammar.advance(token_id)

    def _meet(self, token_id: int) -> int:
        place = self._place.setdefault(token_id, len(self._place))
        if place == len(self._ids):
            self._ids = np.concatenate((self._ids, np.empty_like(self._ids)))
            self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
        self._ids[place] = token_id
        return place


def apply_edits_(logits_NV: Tensor, edits: Sequence[LogitEdits]) -> dict[int, Exception]:
    """Change each row of `logits` (fp32 [n, vocabulary]) in place by its own edits, all rows at once.

    Returns, by row, why its grammar cannot go on; such a row is left as it was.
    """
    active = [row for row, edit in enumerate(edits) if not edit.are_none]
    if not active:
        return {}
    flat = logits_NV.view(-1)
    _penalise_(flat, edits, active, width=logits_NV.shape[1])
    _bias_(flat, edits, active, width=logits_NV.shape[1])
    held = _places([(row, edits[row].holds_back) for row in active], width=logits_NV.shape[1])
    flat[to_device(torch.from_numpy(held), flat.device)] = -torch.inf
    return _mask_(logits_NV, {row: grammar for row in active if (grammar := edits[row].grammar) is not None})


def _penalise_(flat: Tensor, edits: Sequence[LogitEdits], active: list[int], *, width: int) -> None:
    touched = [(row, *edits[row].penalised) for row in active]
    places = to_device(torch.from_numpy(_places([(row, ids) for row, ids, _ in touched], width=width)), flat.device)
    if not len(places):
        return
    params = [edits[row].params for row in active]
    sizes = [len(ids) for _, ids, _ in touched]
    repetition, presence, frequency = (
        to_device(torch.from_numpy(np.repeat(np.array(values, dtype=np.float32), sizes)), flat.device)
        for values in (
            [each.repetition_penalty for each in params],
            [each.presence_penalty for each in params],
            [each.frequency_penalty for each in params],
        )
    )
    counts = to_device(torch.from_numpy(np.concatenate([counts for _, _, counts in touched])), flat.device)
    values = flat[places]
    values = torch.where(values > 0, values / repetition, values * repetition)
    flat[places] = values - presence * (counts > 0) - frequency * counts


def _bias_(flat: Tensor, edits: Sequence[LogitEdits], active: list[int], *, width: int) -> None:
    pairs = [(row, *edits[row].biases) for row in active]
    places = to_device(torch.from_numpy(_places([(row, ids) for row, ids, _ in pairs], width=width)), flat.device)
    if len(places):
        biases = np.concatenate([biases for _, _, biases in pairs])
        flat[places] += to_device(torch.from_numpy(biases), flat.device)


def _places(ids_by_row: list[tuple[int, np.ndarray]], *, width: int) -> np.ndarray:
    """Return the places in the flat logits of (row, token ids)."""
    return np.concatenate([ids + row * width for row, ids in ids_by_row])


def _mask_(logits_NV: Tensor, grammars: dict[int, GrammarState]) -> dict[int, Exception]:
    """Leave each row only the tokens that its grammar allows next."""
    width, errors = logits_NV.shape[1], dict[int, Exception]()
    rows, masks = [], []
    for row, grammar in grammars.items():
        try:
            bits = np.frombuffer(grammar.bitmask(), dtype=np.uint8)
        except Exception as error:  # a library's own: this request ends, the others go on
            errors[row] = error
            continue
        allowed = np.zeros(width, dtype=bool)
        known = np.unpackbits(bits, bitorder="little")[:width]
        allowed[: len(known)] = known
        rows.append(row)
        masks.append(allowed)
    if rows:
        forbidden = to_device(torch.from_numpy(~np.stack(masks)), logits_NV.device)
        index = to_device(torch.tensor(rows), logits_NV.device)
        logits_NV[index] = logits_NV[index].masked_fill(forbidden, -torch.inf)
    return errors
