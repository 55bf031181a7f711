"""bergson MAGIC through the lab's very run: its rows in their order, its rates, its clip, AdamW.

The library's own eps_root of 1e-17 stays on: without it the derivative of a second moment that is still zero (LoRA's A
before B has moved) is NaN. It moves the final weights by less than rounding does.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchopt
from bergson.magic.cli import compute_query_gradients
from bergson.magic.data_stream import DataStream
from bergson.magic.trainer import BackwardState, Trainer
from bergson.utils import weighted_causal_lm_ce
from lab_files import Clock, LabFiles, Method, folder_bytes, run_all
from run_bergson import dataset
from torchopt.pytree import tree_iter

EPS_ROOT = 1e-17


def magic(lab: LabFiles) -> Method:
    """One forward run, one backward sweep per query."""
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
    optimizer = torchopt.adamw(
        lambda count: rates[int(count)], betas=(0.9, 0.999), eps=1e-8, eps_root=EPS_ROOT, weight_decay=0.0
    )
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
    return Method(scores, clock["build"], per_query, num_bytes / len(lab.row_ids), "audit", {"eps_root": EPS_ROOT})


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
    run_all("bergson", {"bergson MAGIC": magic})
