"""TRAK at every checkpoint of the one run (an ensemble of checkpoints, not of independent runs)."""

import contextlib
import io
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lab_files import Clock, LabFiles, Method, folder_bytes, run_all
from torch import Tensor, nn
from torch.func import functional_call
from trak import TRAKer
from trak.modelout_functions import AbstractModelOutput
from trak.projectors import BasicProjector, ProjectionType


class TargetTokens(AbstractModelOutput):
    """TRAK's log-odds of the target tokens, summed; the text benchmarks of its authors do the same per token."""

    def __init__(self) -> None:
        super().__init__()

    @staticmethod
    def get_output(
        model: nn.Module, weights: Iterable[Tensor], buffers: Iterable[Tensor], ids: Tensor, labels: Tensor
    ) -> Tensor:
        log_p, kept = _log_p(model, weights, buffers, ids.unsqueeze(0), labels.unsqueeze(0))
        odds = log_p - torch.log1p(-log_p.exp().clamp(max=1 - 1e-6))
        return (odds * kept).sum()

    def get_out_to_loss_grad(
        self, model: nn.Module, weights: Iterable[Tensor], buffers: Iterable[Tensor], batch: Iterable[Tensor]
    ) -> Tensor:
        ids, labels = batch
        log_p, kept = _log_p(model, weights, buffers, ids, labels)
        return (((1 - log_p.exp()) * kept).sum(dim=1) / kept.sum(dim=1)).clone().detach().unsqueeze(-1)


def _log_p(model: nn.Module, weights: Any, buffers: Any, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = functional_call(model, (weights, buffers), args=(), kwargs={"input_ids": ids}).logits[:, :-1]
    targets, kept = labels[:, 1:].clamp_min(0), labels[:, 1:] != -100
    return logits.log_softmax(-1).gather(2, targets.unsqueeze(-1)).squeeze(-1), kept


def trak(*, dim: int, damping: float) -> Callable[[LabFiles], Method]:
    """TRAK with a projection to `dim` and ridge `damping`."""

    def run(lab: LabFiles) -> Method:
        folder, clock = Path(tempfile.mkdtemp()), Clock()
        rows = [torch.as_tensor(lab.row_ids), torch.as_tensor(lab.row_labels)]
        queries = [torch.as_tensor(lab.query_ids), torch.as_tensor(lab.query_labels)]
        model = lab.model()
        names = [name for name, value in model.named_parameters() if value.requires_grad]
        size = sum(value.numel() for value in model.parameters() if value.requires_grad)
        projector = BasicProjector(size, dim, 0, ProjectionType.rademacher, "cpu", dtype=torch.float32)
        with contextlib.redirect_stdout(io.StringIO()):
            traker = TRAKer(
                model,
                task=TargetTokens(),
                train_set_size=len(rows[0]),
                save_dir=str(folder),
                device="cpu",
                projector=projector,
                proj_dim=dim,
                grad_wrt=names,
                lambda_reg=damping,
                use_half_precision=False,
            )
            with clock.phase("build"):
                for number in range(lab.num_checkpoints):
                    traker.load_checkpoint(lab.model(number).state_dict(), model_id=number)
                    for start in range(0, len(rows[0]), 32):
                        batch = [one[start : start + 32] for one in rows]
                        traker.featurize(batch=batch, num_samples=len(batch[0]))
                traker.finalize_features()
            num_bytes = folder_bytes(folder)
            with clock.phase("query"):
                for number in range(lab.num_checkpoints):
                    traker.start_scoring_checkpoint("lab", lab.model(number).state_dict(), number, len(queries[0]))
                    traker.score(batch=queries, num_samples=len(queries[0]))
                scores = np.array(traker.finalize_scores("lab"))
        shutil.rmtree(folder)
        settings = {"proj_dim": dim, "lambda_reg": damping, "models": lab.num_checkpoints}
        per_query = clock["query"] / len(queries[0])
        return Method(scores.T, clock["build"], per_query, num_bytes / len(rows[0]), "online", settings)

    return run


if __name__ == "__main__":
    run_all("traker", {"TRAK, dim 512": trak(dim=512, damping=1e-3), "TRAK, dim 2048": trak(dim=2048, damping=1e-1)})
