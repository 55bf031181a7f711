"""dattri-llm: EK-FAC (last checkpoint, and summed over all), LESS over all checkpoints, AdamW-influence."""

import functools
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dattri_llm.attribution import AdamWInfluenceAttributor, AttributionArguments, EKFACAttributor, LESSAttributor
from dattri_llm.gradient.streaming import GradientStreamer
from dattri_llm.task import AttributionTask
from dattri_llm.utils.hashing import hash_sample
from lab_files import Clock, LabFiles, Method, folder_bytes, run_all
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

DATA_SEED, BATCH_ROWS = 42, 32


class Rows(Dataset):
    """Token ids and labels as dictionaries."""

    def __init__(self, ids: Any, labels: Any) -> None:
        self.ids, self.labels = torch.as_tensor(ids), torch.as_tensor(labels)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}

    def hashes(self) -> list[str]:
        """The library's name of each row: what the model is called with."""
        return [hash_sample({"input_ids": ids}) for ids in self.ids]


def loss(model: nn.Module, batch: Any, *, reduction: str = "sum") -> Tensor:
    """Nats of the target tokens: their sum, or their mean over the batch as training takes it."""
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1].float().flatten(0, 1)
    return nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), reduction=reduction)


def arguments(folder: Path, **more: Any) -> AttributionArguments:
    """CPU, float32, batches of 32."""
    sizes = {"per_device_train_batch_size": BATCH_ROWS, "per_device_eval_batch_size": BATCH_ROWS}
    return AttributionArguments(str(folder), use_cpu=True, **sizes, **more)


def matrix(score: Any, rows: Rows, queries: Rows) -> np.ndarray:
    """Return [queries, rows]; rows with the same text share what the library found for that text."""
    ids, found = score.agnostic_matrix()
    place, copies = {name: index for index, name in enumerate(ids)}, Counter(rows.hashes())
    columns = {name: index for index, name in enumerate(score.test_ids)}
    whole = found[[place[name] for name in rows.hashes()]][:, [columns[name] for name in queries.hashes()]]
    return (whole / torch.tensor([copies[name] for name in rows.hashes()])[:, None]).T.numpy()


def in_folder(run: Callable[[LabFiles, Path], Method]) -> Callable[[LabFiles], Method]:
    """Give a method a folder that is gone afterwards."""

    @functools.wraps(run)
    def inside(lab: LabFiles) -> Method:
        folder = Path(tempfile.mkdtemp())
        try:
            return run(lab, folder)
        finally:
            shutil.rmtree(folder)

    return inside


def ekfac(*, damping: float, checkpoints: str) -> Callable[[LabFiles], Method]:
    """EK-FAC at relative `damping`: at the "last" checkpoint, or summed over all, "equal" or by their rates ("lr")."""

    @in_folder
    def run(lab: LabFiles, folder: Path) -> Method:
        rows, queries = Rows(lab.row_ids, lab.row_labels), Rows(lab.query_ids, lab.query_labels)
        chosen = [lab.num_checkpoints - 1] if checkpoints == "last" else list(range(lab.num_checkpoints))
        clock, total, num_bytes = Clock(), np.zeros((len(queries), len(rows))), 0
        for number in chosen:
            task = AttributionTask(loss, lab.model(number))
            attributor = EKFACAttributor(arguments(folder / str(number)), task=task)
            with clock.phase("build"):
                ((train, test),) = attributor.cache(rows, queries)
                fisher = attributor.fit(train)
            num_bytes += folder_bytes(Path(train)) + folder_bytes(Path(fisher))
            with clock.phase("query"):
                score = attributor.attribute_from_cache(
                    train, test, fisher_dir=fisher, damping=damping, relative_damping=True
                )
            weight = lab.lr_near(number) if checkpoints == "lr" else 1.0
            total += weight * matrix(score, rows, queries)
        settings = {"relative_damping": damping, "checkpoints": checkpoints}
        return Method(total, clock["build"], clock["query"] / len(queries), num_bytes / len(rows), "online", settings)

    return run


@in_folder
def less(lab: LabFiles, folder: Path) -> Method:
    """LESS as published, all checkpoints, weighted by their rates; no projection, which can only lose."""
    rows, queries = Rows(lab.row_ids, lab.row_labels), Rows(lab.query_ids, lab.query_labels)
    clock, total, num_bytes = Clock(), np.zeros((len(queries), len(rows))), 0
    for number in range(lab.num_checkpoints):
        model = lab.model(number)
        task = AttributionTask(loss, model)
        attributor = LESSAttributor(
            arguments(folder / str(number)), task=task, optimizers=[optimizer_of(lab, model, number)]
        )
        with clock.phase("build"):
            ((train, test),) = attributor.cache(rows, queries)
        num_bytes += folder_bytes(Path(train))
        with clock.phase("query"):
            score = attributor.attribute_from_cache(train, test, checkpoint_weight=lab.lr_near(number))
        total += matrix(score, rows, queries)
    per_query = clock["query"] / len(queries)
    return Method(total, clock["build"], per_query, num_bytes / len(rows), "online", {"checkpoints": "lr"})


def optimizer_of(lab: LabFiles, model: nn.Module, checkpoint: int) -> torch.optim.Optimizer:
    """Return AdamW with the moments of a checkpoint."""
    exp_avg, exp_avg_sq = lab.moments(checkpoint)
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=lab.train["learning_rate"], weight_decay=0.0)
    for name, value in parameters.items():
        saved = name.replace(".default.", ".")
        optimizer.state[value] = {
            "step": torch.tensor(float(lab.facts["checkpoint_steps"][checkpoint])),
            "exp_avg": exp_avg[saved],
            "exp_avg_sq": exp_avg_sq[saved],
        }
    return optimizer


@in_folder
def adamw_influence(lab: LabFiles, folder: Path) -> Method:
    """AdamW-influence through the lab's very run: its rows in their order, its rates, its clip."""
    order = lab.steps.reshape(-1)
    rows, queries = Rows(lab.row_ids, lab.row_labels), Rows(lab.query_ids, lab.query_labels)
    place = np.empty_like(order)
    place[_drawn_order(len(order))] = order
    ordered = Rows(lab.row_ids[place], lab.row_labels[place])
    GradientStreamer._create_optimizer_and_scheduler = _with_rates(lab)  # type: ignore[method-assign]
    rates = {name: lab.train[name] for name in ("learning_rate", "max_grad_norm")}
    args = arguments(folder, data_seed=DATA_SEED, **rates)
    task = AttributionTask(functools.partial(loss, reduction="mean"), lab.model(None))
    attributor = AdamWInfluenceAttributor(args, task=task)
    clock = Clock()
    with clock.phase("build"):
        ((train, test),) = attributor.cache(ordered, queries)
    _same_end(lab, task.model)
    with clock.phase("query"):
        score = attributor.attribute_from_cache(train, test, propagation="test", loss_reduction="mean")
    num_bytes = folder_bytes(Path(train))
    # Its scores are the loss's: negative where the row helps.
    found = -matrix(score, rows, queries)
    return Method(found, clock["build"], clock["query"] / len(queries), num_bytes / len(rows), "audit", {})


def _drawn_order(count: int) -> np.ndarray:
    """The order in which the library's shuffling loader will read; rows are laid out so that it reads ours."""
    seeded = torch.Generator().manual_seed(DATA_SEED)
    loader = DataLoader(range(count), batch_size=BATCH_ROWS, shuffle=True, generator=seeded)  # type: ignore[arg-type]
    return torch.cat(list(loader)).numpy()


def _with_rates(lab: LabFiles) -> Callable[[Any], Any]:
    """The library builds its schedule by name; ours warms up one step earlier than any of that name."""
    rates = [*lab.lr, 0.0]
    plain = GradientStreamer._create_optimizer_and_scheduler

    def create(self: Any) -> Any:
        optimizer, _ = plain(self)
        top = lab.train["learning_rate"]
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rates[step] / top)

    return create


def _same_end(lab: LabFiles, model: nn.Module) -> None:
    from safetensors.torch import load_file

    recorded = load_file(lab.adapter(-1) / lab.facts["weights"])
    found = {name.replace(".default.", "."): value for name, value in model.named_parameters() if value.requires_grad}
    drift = max(float((found[name] - value).abs().max()) for name, value in recorded.items())
    print(f"AdamW-influence: its run ends {drift:.2g} from the recorded weights", flush=True)
    assert drift < 1e-2, "it trained another model"


if __name__ == "__main__":
    run_all(
        "dattri-llm",
        {
            "dattri-llm EK-FAC, damping 0.1": ekfac(damping=0.1, checkpoints="last"),
            "dattri-llm EK-FAC, damping 0.01": ekfac(damping=0.01, checkpoints="last"),
            "dattri-llm EK-FAC, 6 checkpoints": ekfac(damping=0.01, checkpoints="equal"),
            "dattri-llm EK-FAC, 6 checkpoints by rate": ekfac(damping=0.01, checkpoints="lr"),
            "dattri-llm LESS": less,
            "dattri-llm AdamW-influence": adamw_influence,
        },
    )
