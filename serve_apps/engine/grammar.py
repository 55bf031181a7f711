"""Answers of a given form: a state per request that says which tokens may come next.

The work is llguidance's (https://github.com/guidance-ai/llguidance, MIT, no dependencies), which the extra `structured`
installs; it is imported when the first such request comes. It computes each mask when it is needed, so a schema costs
milliseconds before the first token, not a table over the vocabulary.
"""

import json
import threading
from collections import OrderedDict
from typing import Any, Protocol

from serve_apps.engine.config import GrammarSpec
from serve_apps.engine.errors import GrammarFailed, InvalidRequest, MissingExtra

MAX_SOURCE_CHARS = 64 << 10
MAX_COMPILED = 64
# White space between JSON tokens: none, one blank, or a new line with its indentation. Without a bound a model that
# is unsure writes blanks for ever.
JSON_WHITE_SPACE = r"(\n {0,8}| )?"
_SILENT = 0


class GrammarState(Protocol):
    """Where one answer stands in its grammar."""

    @property
    def is_finished(self) -> bool:
        """Whether the answer is complete and nothing may follow."""

    def bitmask(self) -> bytes:
        """Return a bit per token id, lowest bit first: may it come next? End tokens may where the answer may end.

        Raises GrammarFailed.
        """

    def advance(self, token_id: int) -> None:
        """Take in the token that was chosen; errors show at the next `bitmask`."""


class Grammars:
    """Compiles grammars for one tokenizer and keeps the last ones; safe to use from several threads."""

    def __init__(self, tokenizer: Any, *, vocab_size: int, end_token_ids: frozenset[int]) -> None:
        self._tokenizer, self._vocab_size, self._end_token_ids = tokenizer, vocab_size, end_token_ids
        self._lock = threading.Lock()
        self._vocabulary: Any = None
        self._compiled: OrderedDict[GrammarSpec, Any] = OrderedDict()

    def start(self, spec: GrammarSpec) -> GrammarState:
        """Return the state of an answer that has not begun. Raises InvalidRequest, MissingExtra."""
        with self._lock:
            if spec not in self._compiled:
                self._compiled[spec] = self._compile(spec)
                if len(self._compiled) > MAX_COMPILED:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(spec)
            return _State(self._compiled[spec].deep_copy())

    def _compile(self, spec: GrammarSpec) -> Any:
        library = _library()
        source = _source(spec, library)
        if self._vocabulary is None:
            self._vocabulary = self._read_vocabulary()
        matcher = library.LLMatcher(self._vocabulary, source, log_level=_SILENT)
        if matcher.is_error():
            raise InvalidRequest(f"grammar ({spec.kind}): {_first_line(matcher.get_error())}")
        return matcher

    def _read_vocabulary(self) -> Any:
        from llguidance.hf import from_tokenizer

        if not self._end_token_ids:
            raise InvalidRequest("grammar: the model has no end token, so no answer could end; serve one that has")
        try:
            return from_tokenizer(self._tokenizer, n_vocab=self._vocab_size, eos_token=sorted(self._end_token_ids))
        except ValueError as error:
            raise InvalidRequest(f"grammar: this model's tokenizer cannot be used: {error}") from error


def check_grammar(spec: GrammarSpec) -> None:
    """Find out, without a model, whether `spec` can be served. Raises InvalidRequest, MissingExtra."""
    library = _library()
    is_wrong, messages = library.LLMatcher.validate_grammar_with_warnings(_source(spec, library))
    if is_wrong:
        raise InvalidRequest(f"grammar ({spec.kind}): {_first_line(messages[0])}")


class _State:
    """A `GrammarState` over llguidance's matcher."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    @property
    def is_finished(self) -> bool:
        return bool(self._matcher.is_stopped() and not self._matcher.is_error())

    def bitmask(self) -> bytes:
        mask: bytes = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise GrammarFailed(f"grammar: {_first_line(self._matcher.get_error())}; use a simpler one")
        return mask

    def advance(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise MissingExtra(
            "grammar: answers of a given form need llguidance, which is not installed; "
            "run: pip install 'trailmark[structured]'"
        ) from error
    return llguidance


def _source(spec: GrammarSpec, library: Any) -> str:
    """Return the grammar in llguidance's own form."""
    if len(spec.source) > MAX_SOURCE_CHARS:
        raise InvalidRequest(
            f"grammar ({spec.kind}) has {len(spec.source)} characters; at most {MAX_SOURCE_CHARS} are taken"
        )
    if spec.kind == "regex":
        return str(library.LLMatcher.grammar_from_regex(spec.source))
    schema = '{"type": "object"}' if spec.kind == "json_object" else spec.source
    try:
        is_object = isinstance(json.loads(schema), dict)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"grammar ({spec.kind}) is not JSON: {error}") from None
    if not is_object:
        raise InvalidRequest(f"grammar ({spec.kind}): a schema is a JSON object, got {schema[:40]}")
    # Not lenient: a keyword that the library cannot enforce is refused, not passed over.
    options = {"whitespace_pattern": JSON_WHITE_SPACE, "lenient": False}
    return str(library.LLMatcher.grammar_from_json_schema(schema, overrides=options))


def _first_line(message: str) -> str:
    lines = [line.strip() for line in message.strip().splitlines()]
    said = [line for line in lines if line and not line.startswith(("<state>", "^", "Tokens:"))]
    return " ".join(said[:4])[:300]
