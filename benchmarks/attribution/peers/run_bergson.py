"""bergson: EK-FAC and TrackStar through its pipelines at the last checkpoint, MAGIC through the lab's very run."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchopt
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
from bergson.magic.cli import compute_query_gradients
from bergson.magic.data_stream import DataStream
from bergson.magic.trainer import BackwardState, Trainer
from bergson.utils import weighted_causal_lm_ce
from datasets import Dataset
from lab_files import Clock, LabFiles, Method, folder_bytes, run_all
from torchopt.pytree import tree_iter


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


def magic(lab: LabFiles) -> Method:
    """MAGIC, one backward sweep per query: the lab's rows in their order, its rates, its clip, AdamW as torch has it."""
    folder, clock = Path(tempfile.mkdtemp()), Clock()
    order = lab.steps.reshape(-1)
    documents = [[int(row)] * lab.row_ids.shape[1] for row in order]
    model = lab.model(None)
    model.config._attn_implementation = "eager"
    model.loss_function = weighted_causal_lm_ce
    model.get_base_model().loss_function = weighted_causal_lm_ce
    train = dataset(lab.row_ids[order], lab.row_labels[order], doc_ids=documents)
    stream = DataStream(train, lab.steps.shape[1], weight_shape=(len(lab.row_ids),))
    rates = [*lab.lr, 0.0]
    optimizer = torchopt.adamw(lambda count: rates[int(count)], betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    trainer, state = Trainer.initialize(model, optimizer)
    clip = lab.train["max_grad_norm"]
    with clock.phase("build"):
        state = trainer.train(state, stream, inplace=True, save_dir=str(folder), max_grad_norm=clip)
    _same_end(lab, state.params)
    final = state.to("cpu").detach_()
    scores = np.zeros((len(lab.query_ids), len(lab.row_ids)))
    with clock.phase("query"):
        for query in range(len(scores)):
            scores[query] = _magic_query(lab, query, trainer, stream, state, final, folder, clip)
    num_bytes = folder_bytes(folder)
    shutil.rmtree(folder)
    per_query = clock["query"] / len(scores)
    return Method(scores, clock["build"], per_query, num_bytes / len(lab.row_ids), "audit", {"eps_root": 0.0})


def _magic_query(
    lab: LabFiles, query: int, trainer: Any, stream: Any, state: Any, final: Any, folder: Path, clip: float
) -> np.ndarray:
    state.detach_()
    state.copy_(final)
    one = dataset(lab.query_ids[query : query + 1], lab.query_labels[query : query + 1])
    gradients, _ = compute_query_gradients(state, trainer.model, DataStream(one, 1, weight_shape=(1,)), "mean")
    state.detach_()
    stream.requires_grad = True
    stream.weights.grad = None
    moments = [torch.zeros_like(m) for m in tree_iter(state.opt_state) if torch.is_tensor(m) and m.is_floating_point()]
    found = trainer.backward(
        str(folder),
        stream,
        BackwardState(gradients, moments, torch.zeros_like(stream.weights)),
        state,
        cleanup=False,
        inplace=True,
        max_grad_norm=clip,
    )
    # Its scores are derivatives of the loss: negative where the row helps.
    return -found.weight_grads.detach().numpy()


def _same_end(lab: LabFiles, found: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import load_file

    recorded = load_file(lab.adapter(-1) / lab.facts["weights"])
    drift = max(float((value - recorded[name.replace(".default.", ".")]).abs().max()) for name, value in found.items())
    print(f"MAGIC: its run ends {drift:.2g} from the recorded weights", flush=True)
    assert drift < 1e-2, "it trained another model"


if __name__ == "__main__":
    run_all(
        "bergson",
        {
            "bergson EK-FAC, damping 0.1": ekfac(0.1),
            "bergson EK-FAC, damping 0.01": ekfac(0.01),
            "bergson TrackStar, dim 16": trackstar_method(projection_dim=16, mix=True),
            "bergson TrackStar, dim 32, unmixed": trackstar_method(projection_dim=32, mix=False),
            "bergson MAGIC": magic,
        },
    )
