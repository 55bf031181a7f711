"""bergson: EK-FAC and TrackStar through its pipelines, at the last checkpoint."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bergson.cli.trackstar import trackstar
from bergson.config.config import (
    DataConfig,
    HessianConfig,
    HessianPipelineConfig,
    IndexConfig,
    InversionConfig,
    PreprocessConfig,
    QuerySetConfig,
    ScoreConfig,
    TrackstarConfig,
)
from bergson.data import load_scores
from bergson.hessians.pipeline import hessian_pipeline
from datasets import Dataset
from lab_files import Clock, LabFiles, Method, folder_bytes, run_all


def dataset(ids: Any, labels: Any, **columns: Any) -> Dataset:
    """Tokenised rows as the library reads them."""
    plain = {"input_ids": ids.tolist(), "labels": labels.tolist(), "length": [ids.shape[1]] * len(ids)}
    return Dataset.from_dict({**plain, **columns})


def saved(lab: LabFiles, folder: Path) -> tuple[Path, Path]:
    """Write rows and queries where the pipelines find them."""
    rows, queries = folder / "rows", folder / "queries"
    dataset(lab.row_ids, lab.row_labels).save_to_disk(str(rows))
    dataset(lab.query_ids, lab.query_labels).save_to_disk(str(queries))
    return rows, queries


def index_config(lab: LabFiles, folder: Path, rows: Path, **more: Any) -> IndexConfig:
    """The last checkpoint, float32, batches of 2,048 tokens."""
    return IndexConfig(
        run_path=str(folder / "run"),
        model=str(lab.adapter(-1)),
        tokenizer=lab.facts["base"],
        data=DataConfig(dataset=str(rows)),
        precision="fp32",
        **more,
    )


def scores_of(folder: Path, lab: LabFiles) -> np.ndarray:
    """Return [queries, rows] of a run."""
    found = np.asarray(load_scores(folder / "run" / "scores")[:])
    assert found.shape == (len(lab.row_ids), len(lab.query_ids)), found.shape
    return found.T


def ekfac(damping: float) -> Callable[[LabFiles], Method]:
    """EK-FAC at a damping relative to each module's mean eigenvalue."""

    def run(lab: LabFiles) -> Method:
        folder, clock = Path(tempfile.mkdtemp()), Clock()
        rows, queries = saved(lab, folder)
        with clock.phase("all"):
            hessian_pipeline(
                index_config(lab, folder, rows),
                HessianConfig(method="kfac", ev_correction=True),
                ScoreConfig(),
                PreprocessConfig(),
                HessianPipelineConfig(
                    query=QuerySetConfig(dataset=str(queries)), inversion_cfg=InversionConfig(damping_factor=damping)
                ),
            )
        scores, num_bytes = scores_of(folder, lab), folder_bytes(folder / "run" / "hessian")
        shutil.rmtree(folder)
        settings = {"damping_factor": damping}
        per_query = clock["all"] / len(lab.query_ids)
        return Method(scores, clock["all"], per_query, num_bytes / len(lab.row_ids), "online", settings)

    return run


def trackstar_method(*, projection_dim: int, mix: bool) -> Callable[[LabFiles], Method]:
    """TrackStar with Adam's second moments; `mix` blends the queries' own statistics in, as published."""

    def run(lab: LabFiles) -> Method:
        folder, clock = Path(tempfile.mkdtemp()), Clock()
        rows, queries = saved(lab, folder)
        with clock.phase("all"):
            trackstar(
                index_config(lab, folder, rows, projection_dim=projection_dim),
                TrackstarConfig(
                    query=QuerySetConfig(dataset=str(queries)),
                    preprocess_cfg=PreprocessConfig(unit_normalize=True),
                    mix_hessians=mix,
                    stats_sample_size=None,
                ),
            )
        scores = scores_of(folder, lab)
        num_bytes = folder_bytes(folder / "run" / "query") / len(lab.query_ids)
        shutil.rmtree(folder)
        settings = {"projection_dim": projection_dim, "mix_hessians": mix}
        return Method(scores, clock["all"], clock["all"] / len(lab.query_ids), num_bytes, "online", settings)

    return run


if __name__ == "__main__":
    run_all(
        "bergson",
        {
            "bergson EK-FAC, damping 0.1": ekfac(0.1),
            "bergson EK-FAC, damping 0.01": ekfac(0.01),
            "bergson TrackStar, dim 16": trackstar_method(projection_dim=16, mix=True),
            "bergson TrackStar, dim 32, unmixed": trackstar_method(projection_dim=32, mix=False),
        },
    )
