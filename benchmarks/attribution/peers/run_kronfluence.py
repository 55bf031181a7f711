"""kronfluence EK-FAC on the lab's last checkpoint."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from lab_files import Clock, LabFiles, Method, folder_bytes, run_all
from torch import Tensor, nn
from torch.utils.data import Dataset


class Rows(Dataset):
    """Token ids and labels as dictionaries."""

    def __init__(self, ids: Any, labels: Any) -> None:
        self.ids, self.labels = torch.as_tensor(ids), torch.as_tensor(labels)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


class LoraTask(Task):
    """Summed nats of the target tokens; labels drawn from the model for the Fisher."""

    def __init__(self, model: nn.Module) -> None:
        self.names = [name for name, module in model.named_modules() if _is_factor(name, module)]

    def compute_train_loss(self, batch: dict[str, Tensor], model: nn.Module, sample: bool = False) -> Tensor:
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1].float()
        targets = batch["labels"][:, 1:]
        if sample:
            with torch.no_grad():
                drawn = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1).view(targets.shape)
            targets = torch.where(targets == -100, targets, drawn)
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-100)

    def compute_measurement(self, batch: dict[str, Tensor], model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        return self.names


def _is_factor(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and name.endswith((".lora_A.default", ".lora_B.default"))


def ekfac(damping: float | None) -> Any:
    """Return the method at a damping; None is the library's own, 0.1 times the mean eigenvalue."""

    def run(lab: LabFiles) -> Method:
        torch.manual_seed(0)
        model = lab.model()
        task = LoraTask(model)
        model = prepare_model(model, task)
        rows, queries = Rows(lab.row_ids, lab.row_labels), Rows(lab.query_ids, lab.query_labels)
        clock, folder = Clock(), Path(tempfile.mkdtemp())
        analyzer = Analyzer("lab", model, task, cpu=True, output_dir=str(folder), disable_tqdm=True)
        with clock.phase("build"):
            analyzer.fit_all_factors(
                "factors", rows, per_device_batch_size=32, factor_args=FactorArguments(strategy="ekfac")
            )
        num_bytes = folder_bytes(folder)
        with clock.phase("query"):
            analyzer.compute_pairwise_scores(
                "scores",
                "factors",
                query_dataset=queries,
                train_dataset=rows,
                per_device_query_batch_size=len(queries),
                per_device_train_batch_size=32,
                score_args=ScoreArguments(damping_factor=damping),
            )
        scores = analyzer.load_pairwise_scores("scores")["all_modules"].numpy()
        with clock.phase("own"):
            _own_pass(lab)
        shutil.rmtree(folder)
        # It keeps factors but no gradients, so each set of queries pays for the rows' gradients again.
        per_query = (clock["query"] - clock["own"]) / len(queries)
        settings = {"strategy": "ekfac", "damping": damping or "0.1 mean eigenvalue"}
        return Method(scores, clock["build"], per_query, num_bytes / len(rows), "online", settings)

    return run


def _own_pass(lab: LabFiles) -> None:
    """The queries' own forward and backward, which no method is charged for."""
    model = lab.model()
    task = LoraTask(model)
    batch = {"input_ids": torch.as_tensor(lab.query_ids), "labels": torch.as_tensor(lab.query_labels)}
    task.compute_train_loss(batch, model).backward()


if __name__ == "__main__":
    run_all(
        "kronfluence",
        {f"kronfluence EK-FAC, damping {name}": ekfac(value) for name, value in (("default", None), ("1e-8", 1e-8))},
    )
