"""Answers of a given form: what finishes with `stop` parses and validates, at any temperature and in any company."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from serve_apps.engine.config import GrammarSpec, SamplingParams
from serve_apps.engine.engine import Engine
from serve_apps.engine.errors import GrammarFailed, InvalidRequest, MissingExtra
from serve_apps.engine.grammar import MAX_COMPILED, MAX_SOURCE_CHARS, Grammars, check_grammar
from serve_apps.engine.logit_edits import LogitEdits, apply_edits_
from tests.serve_apps.engine.engine_cases import engine_for, prompts, ref, request, run, text, tokens
from tests.tiny_model import build_tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["bee", "fish"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"left": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
            "required": ["left"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
PHONE = r"\d{3}-\d{4}( ext)?"
TOKENIZER: Any = build_tokenizer()


def schema(value: Any) -> GrammarSpec:
    return GrammarSpec("json_schema", json.dumps(value))


def free(spec: GrammarSpec, **sampling: Any) -> dict[str, Any]:
    return {"grammar": spec, "ignore_eos": False, "max_tokens": 200, **sampling}


def test_what_finishes_with_stop_parses_and_validates(tiny_base: Path, strong_adapters: dict[str, Path]) -> None:
    """Hot and greedy rows of four grammars and none, base and adapter, pre-empted now and then."""
    engine = engine_for(tiny_base, num_kv_blocks=100, max_model_len=300)
    adapter = ref(strong_adapters["strong-r8-all"])
    asked = prompts(engine, 30)
    specs = (schema(PERSON), schema(TREE), GrammarSpec("json_object"), GrammarSpec("regex", PHONE), None)
    requests = [
        request(
            f"{index}",
            asked[index],
            adapter if index % 3 else None,
            temperature=0.0 if index % 4 == 0 else 1.5,
            seed=index,
            **(free(spec) if (spec := specs[index % 5]) else {}),
        )
        for index in range(30)
    ]
    outputs = run(engine, requests)
    assert engine.stats()["num_preemptions"]
    num_finished = [0] * 5
    for index in range(30):
        said, reason = text(outputs[f"{index}"]), outputs[f"{index}"][-1].finish_reason
        assert reason in ("stop", "length"), outputs[f"{index}"][-1].error
        if reason == "stop":
            num_finished[index % 5] += 1
            check(index % 5, said)
    assert num_finished[0] >= 3 and num_finished[3] == 6, num_finished
    alone = run(engine_for(tiny_base, max_model_len=300), [requests[1]])["1"]
    assert tokens(alone) == tokens(outputs["1"])


def check(kind: int, said: str) -> None:
    if kind == 3:
        assert re.fullmatch(PHONE, said)
        return
    value = json.loads(said)
    jsonschema.validate(value, (PERSON, TREE, {"type": "object"})[kind])


def test_a_complete_answer_ends_at_once(tiny_base: Path) -> None:
    engine = engine_for(tiny_base)
    outputs = run(engine, [request("r", prompts(engine, 1)[0], **free(GrammarSpec("regex", "yes|no")))])["r"]
    assert text(outputs) in ("yes", "no")
    assert outputs[-1].finish_reason == "stop"
    assert engine.tokenizer.decode(tokens(outputs)) == text(outputs)  # no end token was needed


def test_a_forced_form_is_the_likeliest_one(tiny_base: Path) -> None:
    """The model knows `Bees make honey.`: a grammar that allows it does not change it."""
    engine = engine_for(tiny_base)
    spec = GrammarSpec("regex", r"(Bees|Fish) make [a-z]+\.")
    assert text(run(engine, [request("r", prompts(engine, 9)[8], **free(spec))])["r"]) == "Bees make honey."


def test_penalties_go_with_a_grammar(tiny_base: Path) -> None:
    engine = engine_for(tiny_base)
    params = free(schema(PERSON), temperature=1.0, seed=3, frequency_penalty=1.0, top_p=0.9, logprobs=2)
    outputs = run(engine, [request("r", prompts(engine, 1)[0], **params)])["r"]
    assert outputs[-1].finish_reason == "stop"
    check(0, text(outputs))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (schema({"type": "nonsense"}), "Invalid type: nonsense"),
        (schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (schema({"$ref": "#/nope"}), "/nope"),
        (schema({"type": "integer", "minimum": 5, "maximum": 3}), "minimum"),
        (schema([1]), "a schema is a JSON object"),
        (schema({"x-guidance": {"lenient": True}, "type": "array", "uniqueItems": True}), "uniqueItems"),
        (GrammarSpec("json_schema", "{"), "not JSON"),
        (GrammarSpec("json_schema", "[" * 60_000), "not JSON"),
        (GrammarSpec("regex", "[0-9]+("), "unclosed group"),
        (GrammarSpec("regex", r"(a)\1"), "backreferences"),
        (GrammarSpec("regex", "a" * (MAX_SOURCE_CHARS + 1)), "characters"),
    ],
)
def test_a_grammar_that_cannot_be_kept_is_refused_with_the_reason(spec: GrammarSpec, words: str) -> None:
    grammars = Grammars(TOKENIZER, vocab_size=len(TOKENIZER), end_token_ids=frozenset({TOKENIZER.eos_token_id}))
    for refuse in (check_grammar, grammars.start):
        with pytest.raises(InvalidRequest, match=rf"(?s)grammar \({spec.kind}\).*{re.escape(words)}"):
            refuse(spec)


@pytest.mark.parametrize("other", [{"stop": ("x",)}, {"stop_token_ids": (3,)}, {"min_tokens": 2}, {"ignore_eos": True}])
def test_other_ends_do_not_go_with_a_grammar(other: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(other))):
        SamplingParams(grammar=GrammarSpec("json_object"), **other)


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch, tiny_base: Path) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtra, match=r"trailmark\[structured\]"):
        check_grammar(GrammarSpec("json_object"))
    engine = engine_for(tiny_base)
    with pytest.raises(MissingExtra, match=r"trailmark\[structured\]"):
        engine.add(request("r", prompts(engine, 1)[0], **free(GrammarSpec("json_object"))))
    assert not engine.has_unfinished
    assert run(engine, [request("plain", prompts(engine, 1)[0])])["plain"][-1].finished


def test_a_grammar_is_compiled_once_and_states_are_apart() -> None:
    grammars = Grammars(TOKENIZER, vocab_size=len(TOKENIZER), end_token_ids=frozenset({TOKENIZER.eos_token_id}))
    spec = GrammarSpec("regex", "ab")
    first, second = grammars.start(spec), grammars.start(spec)
    for token_id in TOKENIZER.encode("ab", add_special_tokens=False):
        first.advance(token_id)
    assert first.is_finished and not second.is_finished
    assert first.bitmask() != second.bitmask()
    for index in range(MAX_COMPILED):
        grammars.start(GrammarSpec("regex", f"a{{{index + 1}}}"))
    assert len(grammars._compiled) == MAX_COMPILED and spec not in grammars._compiled


def test_masks_let_through_exactly_what_may_follow() -> None:
    """Against the plain way: is there a way on after this token?"""
    grammars = Grammars(TOKENIZER, vocab_size=len(TOKENIZER) + 5, end_token_ids=frozenset({TOKENIZER.eos_token_id}))
    words = ("honey", "hon", "home")
    state = grammars.start(GrammarSpec("regex", "|".join(words)))
    said = ""
    for letter in "hon":
        edits = LogitEdits(SamplingParams(), [], end_token_ids=frozenset(), grammar=state)
        plain = LogitEdits(SamplingParams(), [], end_token_ids=frozenset(), grammar=None)
        logits = torch.zeros(2, len(TOKENIZER) + 5)
        assert apply_edits_(logits, [edits, plain]) == {}
        assert not logits[1].any()
        allowed = {token for token in range(logits.shape[1]) if logits[0, token] == 0}
        expected = {
            token
            for token in range(len(TOKENIZER))
            if (piece := TOKENIZER.decode([token])) and any(word.startswith(said + piece) for word in words)
        }
        assert allowed - {TOKENIZER.eos_token_id} == expected - set(TOKENIZER.all_special_ids)
        assert (TOKENIZER.eos_token_id in allowed) == (said in words)
        state.advance(TOKENIZER.encode(letter, add_special_tokens=False)[0])
        said += letter


def test_a_grammar_that_fails_midway_fails_its_request_alone(tiny_base: Path) -> None:
    engine = engine_for(tiny_base)
    asked = prompts(engine, 2)
    engine.add(request("bad", asked[0], **free(GrammarSpec("json_object"))))
    engine.add(request("good", asked[1]))
    break_grammar(engine, "bad")
    outputs = run(engine)
    assert outputs["bad"][-1].finish_reason == "error"
    assert "grammar" in (outputs["bad"][-1].error or "")
    assert outputs["good"][-1].num_output_tokens == 12
    assert GrammarFailed.__doc__


def break_grammar(engine: Engine, request_id: str) -> None:
    """Let the request's grammar take in a token that it does not allow, which leaves it in error."""
    grammar = engine._sequences[request_id].grammar
    assert grammar is not None
    grammar.advance(engine.tokenizer.encode("}", add_special_tokens=False)[0])
