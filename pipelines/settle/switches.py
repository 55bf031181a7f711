"""The switches there are: over contributors, datasets, refinement rules, adapters."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import numpy as np

from attribution.settlement import PlayerKind
from pipelines.settle.game import Bits, Game, Player, Switch
from pipelines.settle.rules import game_of_rules
from pipelines.settle.subject import SettleError, Subject

if TYPE_CHECKING:
    from attribution.trail import Trail
    from pipelines.train.data import Example


def switch_of(over: str) -> Switch:
    """Return the switch of a name. Raises SettleError with the names there are."""
    if over in SWITCHES:
        return SWITCHES[over]
    near = get_close_matches(over, SWITCHES, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise SettleError(f"--over {over!r}: {hint}known: {', '.join(SWITCHES)}")


def game_of_contributors(trail: "Trail", subject: Subject, _: tuple[str, ...]) -> Game:
    """Each person whose rows the adapter learned from; a rotated key is still the same person."""
    from pipelines.refine.read import contributor_names

    names = contributor_names(trail)
    examples, _rows = encoded_rows(trail, subject)
    newest = _newest_keys(names)
    owners = [newest.get(names.get(example.contributor, ""), example.contributor) for example in examples]
    return _game_of_owners("contributors", "contributor", owners, names, examples)


def game_of_datasets(trail: "Trail", subject: Subject, _: tuple[str, ...]) -> Game:
    """Each contribution of rows."""
    from attribution.bodies import DatasetBody

    examples, rows = encoded_rows(trail, subject)
    if not rows or "dataset" not in rows[0]:
        raise SettleError(f"dataset {subject.dataset}: its rows do not say which contribution they came with")
    names = {}
    for entry in trail.entries(kind="dataset"):
        if entry.record is not None and isinstance(entry.record.body, DatasetBody):
            names[entry.leaf_hash] = entry.record.body.name
    return _game_of_owners("datasets", "dataset", [row["dataset"] for row in rows], names, examples)


def game_of_adapters(trail: "Trail", subject: Subject, others: tuple[str, ...]) -> Game:
    """The adapter and the others given, each on or off, together on one base."""
    from attribution.bodies import AdapterBody

    digests = list(dict.fromkeys((subject.adapter.digest, *others)))
    players = []
    for digest in digests:
        made = trail.find(digest)
        body = made.record.body if made is not None and made.record is not None else None
        if not isinstance(body, AdapterBody):
            raise SettleError(f"adapter {digest}: its record is not in this log, or was erased")
        if body.base != subject.adapter.base_digest:
            raise SettleError(
                f"adapter {body.name!r}: it was trained on another base ({body.base[:19]}) than "
                f"{subject.adapter.name!r} ({subject.adapter.base_digest[:19]}); only adapters of one base combine"
            )
        players.append(Player("adapter", digest, body.name))
    return Game("adapters", "combine", tuple(players), lambda on: on, adapters=tuple(digests))


def encoded_rows(trail: "Trail", subject: Subject) -> tuple[tuple["Example", ...], list[dict[str, Any]]]:
    """Return the rows of the subject's dataset as training sees them, and their columns, row by row."""
    from transformers import AutoTokenizer

    from attribution.erasure import remaining
    from attribution.store import StoreError
    from pipelines.refine.read import load_refined
    from pipelines.train.data import encode_rows

    try:
        table = load_refined(trail, subject.dataset)
    except StoreError as error:
        raise SettleError(
            f"adapter {subject.adapter.name!r}: the rows it was trained on are not in this home ({error}); restore "
            "them from a copy, or settle an adapter that was trained here"
        ) from error
    if remaining(trail, subject.dataset) != subject.dataset:
        raise SettleError(
            f"adapter {subject.adapter.name!r}: rows it was trained on were erased since, so it cannot be made again; "
            "train a new one on what is left and settle that"
        )
    tokenizer = AutoTokenizer.from_pretrained(subject.adapter.base_path, local_files_only=True)
    examples = encode_rows(table, tokenizer, max_length=subject.settings.max_length).examples
    by_id = {row["example_id"]: row for row in table.drop_columns(["messages"]).to_pylist()}
    return examples, [by_id[example.example_id] for example in examples]


def _game_of_owners(
    over: str, kind: PlayerKind, owners: Sequence[str], names: dict[str, str], examples: tuple["Example", ...]
) -> Game:
    ids = sorted(set(owners))
    place = {owner: number for number, owner in enumerate(ids)}
    of_row = np.array([place[owner] for owner in owners])
    counts = np.bincount(of_row, minlength=len(ids))
    players = tuple(Player(kind, owner, names.get(owner, owner[:12]), int(counts[place[owner]])) for owner in ids)

    def chosen(coalition: Bits) -> Bits:
        return np.asarray(coalition[of_row])

    return Game(over, "replay", players, chosen, examples=examples)


def _newest_keys(names: dict[str, str]) -> dict[str, str]:
    """The key by which a person of several keys is known: their names come in order of the log."""
    return {name: key_id for key_id, name in names.items()}


SWITCHES: dict[str, Switch] = {
    switch.over: switch
    for switch in (
        Switch("contributors", "whose rows it learned from", game_of_contributors),
        Switch("datasets", "contributions of rows", game_of_datasets),
        Switch("rules", "refinement rules that dropped rows", game_of_rules),
        Switch("adapters", "this adapter and those of --with, on one base", game_of_adapters, takes_adapters=True),
    )
}
