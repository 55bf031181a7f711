"""The view on an MLflow server over PostgreSQL: the same entities, found again and mended."""

from pathlib import Path

import pytest

from attribution.mlflow_view import MlflowView
from attribution.trail import Trail
from configs.errors import UserError
from configs.schema import load_settings
from tests.attribution.mlflow_process import MlflowProcess
from tests.attribution.postgres import needs_postgres, postgres
from tests.attribution.story import tell


@needs_postgres
def test_the_view_equals_the_log_on_postgresql(tmp_path: Path) -> None:
    pytest.importorskip("psycopg2", reason="psycopg2-binary is not installed (extra dev)")
    story = tell(Trail.open(tmp_path / "home"), num_receipts=20)
    with postgres() as store_uri:
        server = MlflowProcess(tmp_path / "server", store_uri=store_uri)
        server.start()
        try:
            view = MlflowView(story.trail, server.uri)
            assert view.sync() == 7  # base, two contributions, refinement, adapter, publication, completions
            assert view.asides() == [] and view.reconcile(repair=False) == []
            again = MlflowView(story.trail, server.uri, cursor_file=tmp_path / "another-cursor")
            assert again.sync() == 7 and again.reconcile(repair=False) == [], "found by their tags, not made twice"
            again.close()
            (adapter,) = (model for model in view._connect().server.models() if model.name == "support")
            view._connect().server.client.set_logged_model_tags(adapter.model_id, {"trailmark.digest": "sha256:0"})
            assert [item.problem for item in view.reconcile(repair=False)] == ["altered"]
            assert view.reconcile() == []
            view.close()
        finally:
            server.stop()


def test_an_address_without_its_driver_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("mlflow: {store_uri: 'postgresql://me@host/mlflow'}\n")
    with pytest.raises(UserError, match=r"mlflow.store_uri = .*postgresql\+psycopg2://"):
        load_settings(file)
