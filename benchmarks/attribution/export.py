"""A lab as files, for libraries that live in another environment: model, checkpoints with Adam's moments, data, steps.

base/                                  Hugging Face folder
first/  checkpoints/<k>/               PEFT adapter folders; the latter with exp_avg and exp_avg_sq
data.npz                               row_ids row_labels query_ids query_labels, steps [s, rows], lr [s]
lab.json                               seed, digest, settings, the step of each checkpoint
"""

import json
from pathlib import Path

import numpy as np
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.attribution.lab import Lab
from pipelines.train.lora import ADAPTER_WEIGHTS_FILE, export_adapter, set_weights, trainable


def export(lab: Lab, folder: Path) -> Path:
    """Write the lab, unless it is there; return the folder."""
    if (folder / "lab.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    model = lab.model()
    model.peft_config["default"].base_model_name_or_path = str(lab.base_folder.resolve())
    run = lab.run()
    export_adapter(model, unflat(model, run.initial().weights), folder / "first")
    for number, state in enumerate(lab.checkpoints):
        into = folder / "checkpoints" / str(number)
        weights = unflat(model, state.weights)
        set_weights(model, weights)
        export_adapter(model, weights, into)
        for name in ("exp_avg", "exp_avg_sq"):
            save_file(unflat(model, getattr(state, name)), into / f"{name}.safetensors")
    recipe = run.recipe
    np.savez(
        folder / "data.npz",
        row_ids=np.array([ids for ids, _ in lab.examples]),
        row_labels=np.array([labels for _, labels in lab.examples]),
        query_ids=np.array([ids for ids, _ in lab.queries]),
        query_labels=np.array([labels for _, labels in lab.queries]),
        steps=np.array([step.rows for step in recipe.steps]),
        lr=np.array([step.lr for step in recipe.steps]),
    )
    facts = {
        "seed": lab.seed,
        "digest": lab.digest,
        "base": str(lab.base_folder.resolve()),
        "weights": ADAPTER_WEIGHTS_FILE,
        "checkpoint_steps": [state.step for state in lab.checkpoints],
        **lab.settings.to_dict(),
    }
    (folder / "lab.json").write_text(json.dumps(facts, indent=1, sort_keys=True), encoding="utf-8")
    return folder


def unflat(model: object, flat: Tensor) -> dict[str, Tensor]:
    """Return the flat adapter [p] by PEFT's saved names."""
    parameters = trainable(model)  # type: ignore[arg-type]
    parts = flat.split([parameter.numel() for parameter in parameters.values()])
    return {name: part.view(like.shape) for (name, like), part in zip(parameters.items(), parts, strict=True)}
