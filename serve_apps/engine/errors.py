"""What the engine refuses, by name; every message says the field, the value and what would work."""

from configs.errors import UserError


class EngineError(UserError):
    """A request, adapter or model that the engine cannot serve."""


class InvalidRequest(EngineError):
    """A field of the request, its sampling or the engine's own settings is outside what works."""


class PromptTooLong(EngineError):
    """The prompt leaves no room for a single new token."""


class UnknownAdapter(EngineError):
    """No adapter lies at the given path."""


class CorruptAdapter(EngineError):
    """The adapter's files do not say what they should: not safetensors, truncated, wrong shape, NaN, changed."""


class UnsupportedAdapter(EngineError):
    """The adapter is sound but uses a PEFT feature that the engine does not compute."""


class AdapterTooLarge(EngineError):
    """The adapter alone exceeds the cache's budget."""


class AdapterCacheFull(EngineError):
    """Every resident adapter is leased, so there is no room now; later there will be."""


class AdapterInUse(EngineError):
    """A leased adapter cannot be unloaded."""


class UnsupportedModel(EngineError):
    """The base model's architecture, or an option of its config, is not one that the engine computes."""


class CorruptModel(EngineError):
    """The base model's folder lacks a tensor or holds one of the wrong shape."""


class EngineClosed(EngineError):
    """The engine has been closed."""


class MissingExtra(EngineError):
    """The request needs a library that an extra of the distribution installs, and it is not there."""


class GrammarFailed(EngineError):
    """A grammar got too complex for its limits while an answer was being written."""
