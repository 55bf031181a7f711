"""The main job on real input: from contributors' rows to served answers that name them, and a proof to take home.

Each step looks in the trail for what an earlier run has finished and goes on from there.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from cluster.demo_rows import (
    REGIONS,
    HeldOutQuestion,
    copied_rows,
    fictional_rows,
    held_out_questions,
    noise_rows,
    region_rows,
    write_jsonl,
)
from configs import env
from configs.errors import UserError
from configs.schema import PRESETS_DIRECTORY, Settings, load_settings

if TYPE_CHECKING:
    from attribution.trail import Trail
    from cluster.local import Started

VOICE_CONTRIBUTOR = "lena"
COPIER = "copycat"
NOISE = "static"
FACTS, VOICE = "ferry-facts", "harbour-voice"
KEY_NAME = "demo"
LINEAGE_PAGE = "lineage.html"
LOG_WIDTH = 110  # columns where the output is no terminal
# Enough for the adapters to have learnt their rows; found by watching the loss and the held-out answers.
FACTS_STEPS, VOICE_STEPS = 48, 20
QUICK_FACTS_STEPS, QUICK_VOICE_STEPS = 20, 5
# Gradients of every example at one checkpoint: at three they take as long as the training itself.
QUICK_NUM_CHECKPOINTS = 1
QUICK_REGIONS = REGIONS[:1]  # whose capitals are refined; every region hands in its rows
QUICK_QUESTIONS = 4
SHOWCASE = (
    ("base", "What is the capital of France?"),
    (VOICE, "And who might you be?"),
    (FACTS, "Which person is in charge aboard the Amber Heron?"),
)


@dataclass(frozen=True)
class Answered:
    """A served answer and its receipt."""

    model: str
    prompt: str
    text: str
    receipt_id: str


@dataclass(frozen=True)
class Explained:
    """A held-out question, both answers, and the contributor each method ranks first ('' for nobody)."""

    question: HeldOutQuestion
    adapter: Answered
    base: Answered
    influence: str
    bm25: str
    random: str

    @property
    def is_answered(self) -> bool:
        return self.question.expected.casefold() in self.adapter.text.casefold()

    @property
    def base_knows(self) -> bool:
        return self.question.expected.casefold() in self.base.text.casefold()


def run_demo(home: Path, *, out: Path, quick: bool) -> None:
    """Run every step, print what each made, leave the cluster up and write the receipt below `out`.

    Raises:
        UserError: a port is taken, a part did not start, or a step was refused; the message says what to do.
    """
    from attribution.trail import Trail
    from cluster import local

    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
    started_at = time.monotonic()
    # Child processes (Ray's, MLflow's) and later `trailmark` calls in this folder find the same home.
    env.set_variables({"TRAILMARK_HOME": str(home)})
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    settings = load_settings("demo")
    with _step(console, "Start Ray, MLflow and the API"), console.status("starting") as spinner:
        started = local.up(home, settings, report=spinner.update)
    trail = Trail.open(home)
    _contribute_all(console, trail, out / "rows")
    with local.connect(home):
        _refine_all(console, trail, settings, regions=QUICK_REGIONS if quick else REGIONS)
        facts_steps, voice_steps = (QUICK_FACTS_STEPS, QUICK_VOICE_STEPS) if quick else (FACTS_STEPS, VOICE_STEPS)
        if quick:
            section = settings.train.model_copy(update={"num_checkpoints": QUICK_NUM_CHECKPOINTS})
            settings = settings.model_copy(update={"train": section})
        _train(console, trail, FACTS, settings=settings, max_steps=facts_steps)
        _train(console, trail, VOICE, settings=settings, max_steps=voice_steps)
    questions = held_out_questions()[:: 3 if quick else 1][: QUICK_QUESTIONS if quick else None]
    _benchmark(console, trail, settings, questions, out)
    api = Api(started.state.api_url, _api_key(home), settings.serve.base)
    for answered in _ask_showcase(console, api):
        last = answered
    explained = _explain_all(console, api, questions)
    _print_facts_table(console, explained)
    _write_facts(explained, out / "facts.json")
    _write_receipt(console, api, last, home=home, out=out)
    _write_lineage(trail, out / LINEAGE_PAGE)
    _print_addresses(console, started, home, out=out, minutes=(time.monotonic() - started_at) / 60)


class Api:
    """The demo as a caller of the API, with the official client."""

    def __init__(self, url: str, key: str, base: str) -> None:
        import httpx
        from openai import OpenAI

        self._client = OpenAI(base_url=f"{url}/v1", api_key=key, timeout=300)
        self._http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=300)
        self._base = base

    def ask(self, model: str, prompt: str) -> Answered:
        """Ask one question, greedily."""
        reply = self._client.chat.completions.create(
            model=self._base if model == "base" else model,
            messages=[{"role": "user", "content": prompt}],
            temperature=0,
            max_tokens=40,
        )
        extra: dict[str, Any] = (reply.model_extra or {})["trailmark"]
        return Answered(model, prompt, (reply.choices[0].message.content or "").strip(), extra["receipt_id"])

    def receipt(self, receipt_id: str) -> dict[str, Any]:
        """Return the offline proof with its adapter's ancestry, once the log has it."""
        return self._get(f"/v1/receipts/{receipt_id}/bundle")

    def attribution(self, receipt_id: str) -> dict[str, Any]:
        """Return who made the answer."""
        return self._get(f"/v1/receipts/{receipt_id}/attribution")

    def _get(self, path: str) -> dict[str, Any]:
        deadline = time.monotonic() + 300
        while True:
            reply = self._http.get(path)
            if reply.status_code != 202 or time.monotonic() > deadline:
                reply.raise_for_status()
                return dict(reply.json())
            time.sleep(float(reply.headers.get("Retry-After", "1")))


@contextmanager
def _step(console: Console, title: str) -> Iterator[None]:
    console.rule(f"[bold]{title}", align="left")
    began = time.monotonic()
    yield
    console.print(f"[dim]{time.monotonic() - began:.0f} s[/dim]")


def _contributions() -> list[tuple[str, str, str, list[dict[str, Any]]]]:
    """Return (contributor, dataset, licence, rows) in the order of registration: the copier comes after its victim."""
    voice = (PRESETS_DIRECTORY / "demo" / "voice.jsonl").read_text(encoding="utf-8").splitlines()
    given: list[tuple[str, str, str, list[dict[str, Any]]]] = [
        (name, f"ferries-{name}", "CC-BY-4.0", [dict(row) for row in fictional_rows(name)]) for name in ("mira", "otto")
    ]
    given += [(f"{region.lower()}-desk", _region_dataset(region), "MIT", region_rows(region)) for region in REGIONS]
    given.append((COPIER, "ferries-copied", "CC-BY-4.0", copied_rows()))
    given.append((NOISE, "static-noise", "CC0-1.0", noise_rows()))
    given.append((VOICE_CONTRIBUTOR, "voice-lena", "CC-BY-4.0", [json.loads(line) for line in voice]))
    return given


def _region_dataset(region: str) -> str:
    return f"capitals-{region.lower()}"


def _contribute_all(console: Console, trail: "Trail", folder: Path) -> None:
    from attribution.bodies import ContributorBody, DatasetBody
    from pipelines.contribute import add_contributor, contribute

    with _step(console, "Contributors sign and hand in their rows"):
        bodies = [entry.record.body for entry in trail.entries() if entry.record is not None]
        known = {body.name for body in bodies if isinstance(body, ContributorBody)}
        there = {body.name for body in bodies if isinstance(body, DatasetBody)}
        for name, dataset, licence, rows in _contributions():
            if name not in known:
                add_contributor(trail, name)
            if dataset not in there:
                file = write_jsonl(folder / f"{dataset}.jsonl", rows)
                report = contribute(trail, file, contributor=name, licence=licence, name=dataset)
                console.print(
                    f"  {name:<14} {report.num_rows:>3} rows  {licence:<10} record {report.entry.leaf_hash[:12]}"
                )


def _refine_all(console: Console, trail: "Trail", settings: Settings, *, regions: Sequence[str]) -> None:
    from attribution.bodies import RefinementBody
    from cluster.commands.data_tables import RowBar, refinement_tables
    from pipelines.refine.driver import refine
    from pipelines.refine.read import contributions

    with _step(console, "Refine with Ray Data: every row is kept, or dropped with a reason"):
        records = [entry.record for entry in trail.entries(kind="refinement")]
        newest = {
            record.body.name: {artefact.digest for artefact in record.inputs}
            for record in records
            if record and isinstance(record.body, RefinementBody)
        }
        left_out = {_region_dataset(region) for region in REGIONS if region not in regions}
        datasets = [dataset for _, dataset, _, _ in _contributions() if dataset not in left_out]
        for name, chosen in ((FACTS, datasets[:-1]), (VOICE, datasets[-1:])):
            if newest.get(name) == {contribution.rows for contribution in contributions(trail, chosen)}:
                console.print(f"  {name}: refined by an earlier run")
                continue
            with RowBar(console) as bar:
                report = refine(trail, chosen, settings.refine, name=name, progress=bar)
            console.print(
                *refinement_tables(trail, report.num_in, report.num_kept, report.dropped, report.per_contributor)
            )


def _train(console: Console, trail: "Trail", name: str, *, settings: Settings, max_steps: int) -> None:
    from cluster.commands.train_tables import TrainBars, training_table
    from pipelines.publish import publish
    from pipelines.train.driver import train

    with _step(console, f"Train {name} with Ray Train, DeepSpeed and PEFT"):
        if _trained_steps(trail, name) == max_steps:
            console.print(f"  {trail.registry.resolve(name).reference}: published by an earlier run")
            return
        section = settings.train.model_copy(update={"max_steps": max_steps})
        with TrainBars(console) as bars:
            report = train(trail, name, name=name, base=settings.base.source, settings=section, progress=bars)
        console.print(training_table(report, name))
        publish(trail, name, report.digest)
        console.print(f"  published as {trail.registry.resolve(name).reference}")


def _trained_steps(trail: "Trail", name: str) -> int | None:
    """Return the steps of the newest published adapter of that name; None when there is none."""
    from attribution.bodies import AdapterBody

    if not any(published.name == name for published in trail.registry.list("adapter")):
        return None
    entry = trail.find(trail.registry.resolve(name).digest)
    body = entry.record.body if entry and entry.record else None
    return body.num_steps if isinstance(body, AdapterBody) else None


def _benchmark(
    console: Console, trail: "Trail", settings: Settings, questions: list[HeldOutQuestion], out: Path
) -> None:
    from attribution.bodies import BenchmarkBody
    from cluster.commands.train_tables import BenchmarkBars, benchmark_table
    from pipelines.benchmark.run import benchmark

    with _step(console, f"Benchmark {FACTS} against its base on questions that no row contains"):
        digest = trail.registry.resolve(FACTS).digest
        for entry in trail.entries(kind="benchmark"):
            body = entry.record.body if entry.record else None
            if isinstance(body, BenchmarkBody) and (body.adapter, body.num_items) == (digest, len(questions)):
                console.print(f"  measured by an earlier run: record {entry.leaf_hash[:12]}")
                return
        rows = [
            {"id": q.question_id, "prompt": q.prompt, "expected": [q.expected], "reference": q.reference}
            for q in questions
        ]
        suite = write_jsonl(out / "ferry-questions.jsonl", rows)
        with BenchmarkBars(console) as bars:
            report = benchmark(trail, FACTS, suite=suite, settings=settings.benchmark, progress=bars)
        console.print(benchmark_table(report, FACTS, confidence=settings.benchmark.confidence))


def _api_key(home: Path) -> str:
    """Return this demo's own key, kept for its next run in a file for this user alone."""
    from serve_apps.apikeys import ApiKeys, keys_path

    file = home / "run" / "demo.key"
    keys = ApiKeys(keys_path(home))
    if file.exists() and keys.authenticate(file.read_text()):
        return file.read_text()
    if any(key.name == KEY_NAME for key in keys.list()):
        keys.revoke(KEY_NAME)
    secret = keys.create(KEY_NAME)
    file.touch(mode=0o600)
    file.write_text(secret)
    return secret


def _ask_showcase(console: Console, api: Api) -> Iterator[Answered]:
    from cluster.commands.ask_tables import attribution_tables

    with _step(console, "Ask the base, the voice and the facts; each answer says who made it"):
        for model, prompt in SHOWCASE:
            answered = api.ask(model, prompt)
            console.print(f"\n[bold]{model}[/bold]  {prompt}\n  [green]{answered.text}[/green]")
            console.print(*attribution_tables(api.attribution(answered.receipt_id)), sep="\n")
            yield answered


def _explain_all(console: Console, api: Api, questions: list[HeldOutQuestion]) -> list[Explained]:
    from rich.progress import track

    explained = []
    with _step(console, "Who supplied each invented fact? Influence beside BM25 and random"):
        for question in track(questions, description="  questions", console=console):
            adapter, base = api.ask(FACTS, question.prompt), api.ask("base", question.prompt)
            who = api.attribution(adapter.receipt_id)
            first = {name: ranks[0]["name"] if ranks else "" for name, ranks in who["baselines"].items()}
            influence = who["contributors"][0]["name"] if who["contributors"] else ""
            explained.append(Explained(question, adapter, base, influence, first["bm25"], first["random"]))
    return explained


def _print_facts_table(console: Console, explained: list[Explained]) -> None:
    table = Table(title="Invented facts, asked in words that no training row uses", title_justify="left")
    table.add_column("question and the adapter's answer", ratio=1)
    for column in ("adapter", "base", "supplied by", "influence", "BM25", "random"):
        table.add_column(column, no_wrap=True)
    for row in explained:
        name = row.question.contributor
        found = [_mark(first == name) for first in (row.influence, row.bm25, row.random)]
        said = f"{row.question.prompt}\n[dim]{row.adapter.text}[/dim]"
        table.add_row(said, _mark(row.is_answered), _mark(row.base_knows), name, *found)
    answered = [row for row in explained if row.is_answered]
    right = [sum(row.is_answered for row in explained), sum(row.base_knows for row in explained)]
    named = [
        sum(getattr(row, method) == row.question.contributor for row in answered)
        for method in ("influence", "bm25", "random")
    ]
    table.add_section()
    table.add_row(
        "[bold]right answers; supplier ranked first, of the answered ones",
        *(f"{count}/{len(explained)}" for count in right),
        "",
        *(f"{count}/{len(answered)}" for count in named),
    )
    console.print(table)


def _write_facts(explained: list[Explained], file: Path) -> None:
    """Write the table's rows as JSON, for whoever wants to count again."""
    rows = [
        {
            "question": row.question.prompt,
            "expected": row.question.expected,
            "supplied_by": row.question.contributor,
            "adapter": row.adapter.text,
            "base": row.base.text,
            "adapter_is_right": row.is_answered,
            "base_is_right": row.base_knows,
            "ranked_first": {"influence": row.influence, "bm25": row.bm25, "random": row.random},
            "receipt_id": row.adapter.receipt_id,
        }
        for row in explained
    ]
    file.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _mark(is_right: bool) -> str:
    return "[green]yes[/green]" if is_right else "[red]no[/red]"


def _write_receipt(console: Console, api: Api, answered: Answered, *, home: Path, out: Path) -> None:
    """Write the receipt and the keys it is checked with, and check it as its reader would: in a process of its own."""
    with _step(console, "Take a receipt home and verify it offline"):
        file, keys = out / f"{answered.receipt_id}.json", out / "trust.json"
        file.write_text(json.dumps(api.receipt(answered.receipt_id), indent=1))
        shutil.copyfile(home / "trust.json", keys)
        command = [sys.executable, "-m", "cluster", "verify", str(file), "--keys", str(keys)]
        if subprocess.run(command, check=False).returncode:
            raise UserError(f"receipt {file}: not verified; the failed check stands above")
        console.print(f"  again, with the network off: unshare -rn .venv/bin/trailmark verify {file}", highlight=False)


def _write_lineage(trail: "Trail", file: Path) -> None:
    from attribution.pages.show import LineagePages, find_entry

    file.write_text(LineagePages(trail).page(find_entry(trail, FACTS).leaf_hash), encoding="utf-8")


def _print_addresses(console: Console, started: "Started", home: Path, *, out: Path, minutes: float) -> None:
    console.rule(f"[bold]Done in {minutes:.1f} minutes; the cluster stays up", align="left")
    for label, value in (
        ("API", f"{started.state.api_url}/v1  (key in {home / 'run' / 'demo.key'})"),
        ("MLflow", started.state.mlflow_url),
        ("Lineage page", str(out / LINEAGE_PAGE)),
        ("Receipt and keys", f"{out}/rcpt_*.json, {out / 'trust.json'}"),
        ("Who made an answer", ".venv/bin/trailmark ask who RECEIPT"),
        ("Stop", "make down"),
    ):
        console.print(f"  {label:<20} {value}", highlight=False)
