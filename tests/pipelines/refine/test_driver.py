"""Refinement on a real Ray cluster: against a plain loop, for any workers and blocks; who stays when rows are equal."""

import json
import random
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from attribution.bodies import DatasetBody, RefinementBody
from attribution.records import Artefact, Party
from attribution.store import StoreError
from configs.schema import RefineSettings
from pipelines.contribute import add_contributor, contribute
from pipelines.refine.driver import RefineError, RefineReport, refine
from pipelines.refine.read import DatasetError, load_decisions, load_refined
from pipelines.refine.rules import row_rules
from pipelines.refine.why import ExampleError, find_example, rulings

if TYPE_CHECKING:
    from attribution.trail import Trail

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
DUPLICATE = "same content as an example registered earlier"


def row(question: str, answer: str) -> dict[str, str]:
    return {"prompt": question, "completion": answer}


ORIGINAL = [row(f"Who is the captain of ferry {i}?", f"The captain of ferry {i} is Ysolde Marr.") for i in range(9)]
COPIED = [row(r["prompt"].upper(), " " + r["completion"].lower().replace(" ", "\n \t")) for r in ORIGINAL]


def noise(num_rows: int) -> list[dict[str, str]]:
    rng = random.Random(3)
    return [row(*("".join(rng.choices("abcdefghijklmnopqrstuvwxyz0189", k=60)) for _ in "qa")) for _ in range(num_rows)]


def hand_in(trail: "Trail", folder: Path, name: str, rows: list[dict[str, str]], *, by: str = "") -> str:
    """Contribute `rows` as dataset `name`; return the leaf hash."""
    if not trail.keys.has(by or name):
        add_contributor(trail, by or name)
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in rows), encoding="utf-8")
    return contribute(trail, file, contributor=by or name, licence="CC-BY-4.0").entry.leaf_hash


def run(trail: "Trail", *datasets: str, **settings: Any) -> RefineReport:
    return refine(trail, datasets or ["all"], RefineSettings(**settings), name="facts")


def texts(trail: "Trail", report: RefineReport) -> list[list[str]]:
    messages = load_refined(trail, report.digest).column("messages").to_pylist()
    return [[message["content"] for message in turns] for turns in messages]


def plain_refinement(
    trail: "Trail", settings: RefineSettings
) -> tuple[list[dict[str, Any]], list[tuple[str, str, bool, str]], Counter[str]]:
    """A slow loop with a dictionary: (kept rows, decisions as (example id, rule, keep, see also), first drops)."""
    kept: dict[tuple[tuple[str, str], ...], dict[str, Any]] = {}
    decided: list[tuple[str, str, bool, str]] = []
    first_drops: Counter[str] = Counter()
    for entry in trail.entries(kind="dataset"):
        assert entry.record is not None and isinstance(entry.record.body, DatasetBody)
        for contributed in trail.get_table(entry.record.body.rows).to_pylist():
            form, example_id, failed = contributed["messages"], contributed["contribution_id"], []
            for rule in row_rules(settings):
                if rule.name == "length":
                    form = [{**m, "content": unicodedata.normalize("NFC", squeeze(m["content"]))} for m in form]
                keep = rule.judge(form).keep
                decided.append((example_id, rule.name, keep, ""))
                failed += [] if keep else [rule.name]
                if failed == ["schema"]:
                    break
            key = tuple((m["role"], squeeze(m["content"]).casefold()) for m in form)
            if not failed:
                original = kept.setdefault(
                    key, {"example_id": example_id, "messages": form, "leaf_index": entry.index, "at": len(decided)}
                )
                is_first = original["at"] == len(decided)
                failed += [] if is_first else ["exact_duplicates"]
                decided.append((example_id, "exact_duplicates", is_first, "" if is_first else original["example_id"]))
            first_drops.update(failed[:1])
    return [{name: row[name] for name in row if name != "at"} for row in kept.values()], decided, first_drops


def squeeze(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def mixed_rows(seed: int) -> list[dict[str, str]]:
    rng = random.Random(seed)
    question, answer = (
        ("what is  item {}?", "Item {} is made of wood."),
        ("WHAT IS item {}?", "item {} is MADE of wood."),
    )
    rows = [row(*(part.format(rng.randrange(40)) for part in rng.choice((question, answer)))) for _ in range(60)]
    rows += [row("Say it", "say it again my friend " * 4), row("Much", "long words " * 500), *noise(3)]
    rng.shuffle(rows)
    return rows


def test_same_as_a_plain_loop_and_same_digest_for_any_workers_and_blocks(trail: "Trail", tmp_path: Path) -> None:
    for seed, name in enumerate(("ana", "bo", "cy")):
        hand_in(trail, tmp_path, name, mixed_rows(seed))
    report = run(trail, num_workers=1)
    expected, decided, first_drops = plain_refinement(trail, RefineSettings())
    refined = load_refined(trail, report.digest).to_pylist()
    assert [{name: item[name] for name in expected[0]} for item in refined] == expected
    decisions = load_decisions(trail, report.digest).to_pylist()
    assert [(d["example_id"], d["rule"], d["keep"], d["see_also"]) for d in decisions] == decided
    assert Counter({d.rule: d.count for d in report.dropped}) == first_drops
    assert first_drops.keys() == {"exact_duplicates", "length", "letters", "repetition"}
    assert first_drops.total() == report.num_in - report.num_kept < sum(not keep for _, _, keep, _ in decided)
    for num_workers, block_rows in ((4, 7), (4, 1000), (2, 64)):
        assert run(trail, "cy", "ana", "bo", num_workers=num_workers, block_rows=block_rows).digest == report.digest


def test_copier_falls_entirely_and_points_at_the_original(trail: "Trail", tmp_path: Path) -> None:
    hand_in(trail, tmp_path, "ana", ORIGINAL)
    hand_in(trail, tmp_path, "copier", COPIED)
    hand_in(trail, tmp_path, "noise", noise(5))
    report = run(trail, "noise", "copier", "ana")
    assert texts(trail, report) == [[r["prompt"], r["completion"]] for r in ORIGINAL]
    names = {trail.keys.get(name).key_id: name for name in ("ana", "copier", "noise")}
    counts = {names[rows.key_id]: (rows.num_in, rows.num_kept) for rows in report.per_contributor}
    assert counts == {"ana": (9, 9), "copier": (9, 0), "noise": (5, 0)}
    assert [(d.rule, d.reason, d.count) for d in report.dropped] == [
        ("exact_duplicates", DUPLICATE, 9),
        ("letters", "random letters", 5),
    ]
    kept = load_refined(trail, report.digest).column("example_id").to_pylist()
    fallen = [d for d in load_decisions(trail, report.digest).to_pylist() if d["reason"] == DUPLICATE]
    assert [d["see_also"] for d in fallen] == kept


def test_earliest_registered_stays_even_when_it_is_the_copy(trail: "Trail", tmp_path: Path) -> None:
    first = hand_in(trail, tmp_path, "copier", COPIED)
    second = hand_in(trail, tmp_path, "ana", ORIGINAL)
    report = run(trail, second, first)
    contributors = set(load_refined(trail, report.digest).column("contributor").to_pylist())
    assert contributors == {trail.keys.get("copier").key_id}


def test_dropped_row_does_not_stand_for_its_equals(trail: "Trail", tmp_path: Path) -> None:
    # Equal to the duplicates rule; but the first has 36 characters, with its sharp s spelt out, and the second 35.
    hand_in(trail, tmp_path, "ana", [row("Wo wohnt er?", "In der langen STRASSE 99")])
    hand_in(trail, tmp_path, "bo", [row("Wo wohnt er?", "In der langen Straße 99")])
    report = run(trail, max_chars=35)
    assert texts(trail, report) == [["Wo wohnt er?", "In der langen Straße 99"]]


def test_kept_rows_are_canonical_but_keep_their_case(trail: "Trail", tmp_path: Path) -> None:
    hand_in(trail, tmp_path, "ana", [row("  Wie  heißt\u00a0das? ", "Cafe\u0301 ist es,\r\n\r\n\r\nGUT.")])
    report = run(trail)
    assert texts(trail, report) == [["Wie heißt das?", "Café ist es,\n\nGUT."]]
    (refined,) = load_refined(trail, report.digest).to_pylist()
    assert refined["content_id"] != refined["original_content_id"]


def test_record_names_inputs_parents_and_people(trail: "Trail", tmp_path: Path) -> None:
    leaves = [hand_in(trail, tmp_path, "ana", ORIGINAL), hand_in(trail, tmp_path, "copier", COPIED)]
    seen: list[tuple[int, int]] = []
    settings = RefineSettings(block_rows=4)
    report = refine(trail, ["all"], settings, name="facts", progress=lambda done, total: seen.append((done, total)))
    record = report.entry.record
    assert record is not None and isinstance(record.body, RefinementBody)
    assert report.entry.leaf.parents == tuple(leaves)
    assert [artefact.name for artefact in record.inputs] == ["contribution", "contribution"]
    assert record.outputs == (Artefact("refined", "facts", report.digest),)
    people = {Party(trail.keys.get(name).key_id, "contributor") for name in ("ana", "copier")}
    assert people < set(record.contributors)
    assert (record.body.num_in, record.body.num_kept) == (18, 9)
    assert trail.get_table(record.body.rows).equals(load_refined(trail, report.digest))
    assert record.config is not None and trail.get_json(record.config)["block_rows"] == 4
    assert seen[0] == (0, 18) and seen[-1] == (18, 18) and sorted(seen) == seen
    assert list((trail.home / "run").iterdir()) == []


def test_why_tells_row_and_decisions(trail: "Trail", tmp_path: Path) -> None:
    hand_in(trail, tmp_path, "ana", ORIGINAL[:1])
    hand_in(trail, tmp_path, "copier", COPIED[:1])
    report = run(trail)
    decisions = load_decisions(trail, report.digest).to_pylist()
    fallen = next(d for d in decisions if not d["keep"])
    example = find_example(trail, fallen["example_id"].removeprefix("sha256:")[:10])
    assert (example.example_id, example.contribution.name) == (fallen["example_id"], "copier")
    (ruling,) = rulings(trail, example.example_id)
    assert [(d["rule"], d["keep"]) for d in ruling.decisions][-1] == ("exact_duplicates", False)
    assert len(ruling.decisions) == 7
    with pytest.raises(ExampleError, match="at least 8 hex digits"):
        find_example(trail, "abc")
    with pytest.raises(ExampleError, match="no contributed row has it"):
        find_example(trail, "0" * 64)


def test_refusals_leave_no_record(trail: "Trail", tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no dataset to refine"):
        run(trail)
    hand_in(trail, tmp_path, "noise", noise(4))
    size = len(list(trail.entries()))
    with pytest.raises(RefineError, match=r"every row was dropped: 4 by letters \(random letters\)"):
        run(trail)
    with pytest.raises(DatasetError, match=r"'noize': no contribution.*did you mean 'noise'"):
        run(trail, "noize")
    assert len(list(trail.entries())) == size


def test_dataset_not_signed_by_its_contributor_is_refused(trail: "Trail", tmp_path: Path) -> None:
    entry = trail.entry(hand_in(trail, tmp_path, "ana", ORIGINAL))
    assert entry.record is not None
    trail.record(
        "dataset",
        entry.record.body,
        outputs=entry.record.outputs,
        contributors=entry.record.contributors,
        signer=trail.keys.get("operator"),
    )
    with pytest.raises(DatasetError, match="not signed by its contributor"):
        run(trail)


def test_altered_rows_are_refused(trail: "Trail", tmp_path: Path) -> None:
    entry = trail.entry(hand_in(trail, tmp_path, "ana", ORIGINAL))
    assert entry.record is not None
    path = trail.store.path_of(entry.record.outputs[0].digest)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match="altered"):
        run(trail)
