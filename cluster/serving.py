"""The API of a running cluster: the actors behind it, the deployments, and the first key."""

import logging
from collections.abc import Callable
from pathlib import Path

from cluster.session import connect
from configs.schema import Settings

FIRST_KEY_NAME = "default"


def start(home: Path, settings: Settings, *, report: Callable[[str], None]) -> str:
    """Start the log writer, the scorers and the API in the home's cluster; return the API's URL when it answers."""
    from attribution import actors
    from attribution.trail import Trail
    from pipelines.base_model import resolve_base
    from serve_apps import app

    report(f"preparing the base model {settings.serve.base}")
    base = resolve_base(Trail.open(home), settings.serve.base)
    with connect(home):
        report("starting the log writer and the scorers")
        actors.start(home, settings.attribution)
        report("starting the API")
        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # `report` tells the steps
        return app.deploy(settings.serve, home=str(home), base_path=str(base.path), base_digest=base.digest)


def stop(home: Path) -> None:
    """Close the API: replicas end their running requests and send their last receipts before they go."""
    from attribution import actors
    from serve_apps import app

    with connect(home):
        app.stop()
        actors.stop()  # after the replicas: their last receipts pass through the log writer


def ensure_api_key(home: Path) -> str | None:
    """Make the home's first key, an ordinary tenant's; return the secret, shown once, or None when there are keys."""
    from serve_apps.apikeys import ApiKeys, keys_path

    keys = ApiKeys(keys_path(home))
    if keys.list():
        return None
    return keys.create(FIRST_KEY_NAME)
