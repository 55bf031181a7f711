"""The pages beside MLflow: search, a record, the difference of two versions. Rendered here; they run no script."""

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from attribution.lineage import Lineage, record_bundle
from attribution.pages.record_facts import record_view, words
from attribution.pages.show import LineagePages, find_entry
from attribution.receipts import recent_receipts
from attribution.search_index import SearchIndex
from attribution.trail import Trail
from configs.errors import UserError

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

    from attribution.answers import Answer

_FOLDER = Path(__file__).parent
PAGE_SIZE = 50
MAX_EXAMPLES = 100
PATHS = {
    "search": "/",
    "record": "/record/{reference}",
    "page": "/record/{reference}/lineage.html",
    "proof": "/record/{reference}/record.json",
    "diff": "/diff",
    "ask": "/ask/{question}",
}
QUESTIONS = {
    "who": "Who made this answer?",
    "improved": "What improved the model?",
    "dataset": "Which dataset mattered?",
    "adapter": "Which adapter changed performance?",
    "value": "What part created value?",
}
SANDBOX = "sandbox allow-scripts"


class Site:
    """The pages of one home. The log is opened with the first request, for the server may start before it is there."""

    def __init__(self, open_trail: Callable[[], Trail]) -> None:
        self._open_trail = open_trail

    @cached_property
    def trail(self) -> Trail:
        """The log that is shown."""
        return self._open_trail()

    @cached_property
    def lineage(self) -> Lineage:
        """Its graph."""
        return Lineage(self.trail)

    @cached_property
    def pages(self) -> LineagePages:
        """Its lineage pages."""
        return LineagePages(self.trail, self.lineage)

    @cached_property
    def index(self) -> SearchIndex:
        """Its search index."""
        return SearchIndex(self.trail, self.lineage)

    def app(self) -> "Starlette":
        """Return the application to mount."""
        from starlette.applications import Starlette
        from starlette.routing import Route

        routes = [Route(path, getattr(self, name)) for name, path in PATHS.items()]
        return Starlette(routes=routes, exception_handlers={UserError: self.refused})

    def search(self, request: "Request") -> "Response":
        """The whole log by words, names, digests and kinds, newest first."""
        query, kind = request.query_params.get("q", "").strip(), request.query_params.get("kind", "")
        before = request.query_params.get("before", "")
        hits = self.index.find(query, kind=kind, before=int(before) if before.isdigit() else None, limit=PAGE_SIZE + 1)
        return self._render(
            "search.jinja",
            request,
            query=query,
            kind=kind,
            before=before,
            counts=self.index.counts(query),
            hits=hits[:PAGE_SIZE],
            more=hits[PAGE_SIZE - 1].log_index if len(hits) > PAGE_SIZE else None,
            size=self.trail.log.size,
        )

    def record(self, request: "Request") -> "Response":
        """One record: what it says, who is behind it, where it is in MLflow, its neighbours, and its graph."""
        entry = find_entry(self.trail, request.path_params["reference"])
        return self._render("record.jinja", request, record=record_view(self.trail, self.lineage, entry))

    def page(self, request: "Request") -> "Response":
        """The self-contained lineage page, as an artifact has it, drawn from the log as it is now."""
        from starlette.responses import HTMLResponse

        entry = find_entry(self.trail, request.path_params["reference"])
        return HTMLResponse(self.pages.page(entry.leaf_hash), headers={"Content-Security-Policy": SANDBOX})

    def proof(self, request: "Request") -> "Response":
        """The file that `trailmark verify` takes."""
        from starlette.responses import JSONResponse

        entry = find_entry(self.trail, request.path_params["reference"])
        name = f'attachment; filename="record-{entry.leaf_hash[:16]}.json"'
        return JSONResponse(record_bundle(self.trail, entry.leaf_hash), headers={"Content-Disposition": name})

    def diff(self, request: "Request") -> "Response":
        """What changed between two versions, and what it did to the score."""
        from attribution.lineage_diff import diff

        published = [item.reference for item in self.trail.registry.list()]
        older, newer = (request.query_params.get(name, "") for name in ("older", "newer"))
        found = diff(self.trail, older, newer).to_dict() if older and newer else None
        return self._render("diff.jinja", request, published=published, older=older, newer=newer, diff=found)

    def ask(self, request: "Request") -> "Response":
        """One of the five questions. No model is loaded here: who made an answer is told as it was last recorded."""
        from attribution.pages.ask import answer_view

        asked = request.path_params["question"]
        if asked not in QUESTIONS:
            raise UserError(f"question {asked!r}: there are {', '.join(QUESTIONS)}")
        receipt, adapter = (request.query_params.get(name, "").strip() for name in ("receipt", "adapter"))
        examples = request.query_params.get("examples", "").strip()
        answer = self._answered(asked, receipt, adapter, examples)
        mount = request.scope.get("root_path", "")
        return self._render(
            "ask.jinja",
            request,
            view=None if answer is None else answer_view(answer),
            questions=QUESTIONS,
            asked=asked,
            receipt=receipt,
            adapter=adapter,
            examples=examples,
            receipts=recent_receipts(self.trail),
            published=[item.reference for item in self.trail.registry.list(kind="adapter")],
            record_link=lambda leaf: mount + PATHS["record"].replace("{reference}", leaf),
        )

    def _answered(self, asked: str, receipt: str, adapter: str, examples: str) -> "Answer | None":
        from attribution import questions
        from attribution.receipt_evidence import NUM_TOP, recorded_explanation

        if asked == "who":
            if not receipt:
                return None
            if examples and not (examples.isascii() and examples.isdigit() and 1 <= int(examples) <= MAX_EXAMPLES):
                raise UserError(f"examples {examples!r}: say a whole number from 1 to {MAX_EXAMPLES}")
            num_examples = int(examples or NUM_TOP)
            return questions.ask_who(
                self.trail,
                receipt,
                explain=lambda one: recorded_explanation(self.trail, one, num_examples=num_examples),
            )
        if asked == "value":
            return questions.ask_value(self.trail)
        of_adapter = {
            "improved": questions.ask_improved,
            "dataset": questions.ask_dataset,
            "adapter": questions.ask_adapter,
        }
        return of_adapter[asked](self.trail, adapter or None)

    def refused(self, request: "Request", error: Exception) -> "Response":
        """A name that means nothing, and the like: said in words, with the way back."""
        return self._render("refused.jinja", request, status=404, message=str(error))

    def _render(self, template: str, request: "Request", *, status: int = 200, **values: Any) -> "Response":
        from starlette.responses import HTMLResponse

        mount = request.scope.get("root_path", "")

        def link(name: str, *, reference: str = "", question: str = "who") -> str:
            path = PATHS[name].replace("{reference}", quote(reference, safe="@:"))
            return mount + path.replace("{question}", question)

        mlflow = mount.rpartition("/")[0] + "/"
        text = self._templates.get_template(template).render(**values, link=link, style=self._style, mlflow=mlflow)
        return HTMLResponse(text, status_code=status, headers={"Content-Security-Policy": self._policy})

    @cached_property
    def _style(self) -> str:
        from attribution.pages.ask import style

        return style()

    @cached_property
    def _policy(self) -> str:
        digest = base64.b64encode(hashlib.sha256(self._style.encode()).digest()).decode()
        sources = f"style-src 'sha256-{digest}'; frame-src 'self'; form-action 'self'"
        return f"default-src 'none'; {sources}; base-uri 'none'; frame-ancestors 'self'"

    @cached_property
    def _templates(self) -> Any:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined

        environment = Environment(loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined)
        environment.filters.update(words=words, when=when, number=number, change=change, pretty=pretty)
        return environment


def when(time_us: int) -> str:
    """Return a time as UTC to the second."""
    from datetime import UTC, datetime

    return datetime.fromtimestamp(time_us / 1_000_000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def number(value: float) -> str:
    """Return a whole number with separators, any other to three places."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"


def change(spread: Mapping[str, float] | None) -> str:
    """Return a difference with its sign and interval."""
    if spread is None:
        return "not measured"
    return f"{spread['value']:+.3f} ({spread['low']:+.3f} to {spread['high']:+.3f})"


def pretty(value: Any) -> str:
    """Return a fact as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return number(value)
    if isinstance(value, list) and all(isinstance(item, str | int) for item in value):
        return ", ".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
