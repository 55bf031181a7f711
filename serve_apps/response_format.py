"""`response_format`: the forms an answer can be held to; `regex` is ours, the others OpenAI's."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool

from serve_apps.engine.config import GrammarSpec
from serve_apps.engine.errors import InvalidRequest, MissingExtra
from serve_apps.engine.grammar import check_grammar
from serve_apps.errors import invalid, unsupported


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TextFormat(_Form):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(_Form):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(_Form):
    """A JSON schema. It is always kept to, so `strict` changes nothing; name and description are the caller's notes."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    json_schema: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: StrictBool | None = None


class JsonSchemaFormat(_Form):
    """JSON that satisfies a schema; its properties come in the schema's order."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


class RegexFormat(_Form):
    """Text that a regular expression matches from end to end."""

    type: Literal["regex"]
    pattern: str = Field(min_length=1)


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat | RegexFormat, Field(discriminator="type")]
TAGS = ("text", "json_object", "json_schema", "regex")
FIELDS = ("type", "json_schema", "name", "schema", "description", "strict", "pattern")
_PARAM = {
    "json_object": "response_format",
    "json_schema": "response_format.json_schema.schema",
    "regex": "response_format.pattern",
}


def grammar_of(form: ResponseFormat | None) -> GrammarSpec | None:
    """Return what the engine must keep to; None for text."""
    if isinstance(form, JsonSchemaFormat):
        return GrammarSpec("json_schema", json.dumps(form.json_schema.json_schema, ensure_ascii=False))
    if isinstance(form, RegexFormat):
        return GrammarSpec("regex", form.pattern)
    return GrammarSpec("json_object") if isinstance(form, JsonObjectFormat) else None


def check_servable(spec: GrammarSpec) -> None:
    """Compile a grammar on trial (milliseconds, for large schemas more). Raises ApiError naming the field."""
    try:
        check_grammar(spec)
    except MissingExtra as error:
        raise unsupported("response_format", str(error)) from None
    except InvalidRequest as error:
        raise invalid(_PARAM[spec.kind], str(error)) from None
