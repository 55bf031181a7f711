"""Pages beside MLflow: `mlflow server --app-name trailmark` serves MLflow as ever, and these under /trailmark/.

They do what an artifact in a sandboxed frame cannot: search the whole log, link to MLflow's own pages, compare two
versions. They read the home's log directly, so they are right even where the view is behind.
"""

from typing import TYPE_CHECKING

from attribution.pages.site import Site
from attribution.trail import Trail
from configs.env import home, variable

if TYPE_CHECKING:
    from fastapi import FastAPI

NAME, MOUNT = "trailmark", "/trailmark"
STATIC_PREFIX = "_MLFLOW_STATIC_PREFIX"  # set by `mlflow server --static-prefix`


def create_app() -> "FastAPI":
    """Return MLflow's own application with our pages mounted before its catch-all.

    The entry point of group `mlflow.app`; uvicorn, MLflow's default server, calls it in each worker.
    """
    from mlflow.server.fastapi_app import app
    from starlette.routing import Mount

    site = Site(lambda: Trail.open(home(), create=False))
    app.router.routes.insert(0, Mount(variable(STATIC_PREFIX).rstrip("/") + MOUNT, site.app(), name=NAME))
    return app
