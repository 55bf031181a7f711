"""Every format by its name, and the folder that holds them all with the proofs they rest on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from attribution.exports import files
from attribution.exports.cyclonedx import cyclonedx
from attribution.exports.dossier import Dossier, ExportError
from attribution.exports.model_card import model_card
from attribution.exports.openlineage import openlineage
from attribution.exports.prov import prov_json
from attribution.exports.slsa import slsa_envelope
from attribution.lineage import record_bundle
from attribution.store import MANIFEST, write_atomically

if TYPE_CHECKING:
    from attribution.trail import Trail

ALL = "all"
# The file of each format in a folder.
FORMATS = {
    "cyclonedx": files.CYCLONEDX_FILE,
    "openlineage": files.OPENLINEAGE_FILE,
    "prov": files.PROV_FILE,
    "slsa": files.PROVENANCE_FILE,
    "model-card": files.CARD_FILE,
}


def export_text(trail: "Trail", dossier: Dossier, form: str) -> str:
    """Return an adapter's lineage in one format. ExportError when there is no such format."""
    write: dict[str, Callable[[Dossier], str]] = {
        "cyclonedx": cyclonedx,
        "openlineage": openlineage,
        "prov": prov_json,
        "slsa": lambda found: slsa_envelope(found, trail.keys.get("operator")),
        "model-card": model_card,
    }
    if form not in write:
        raise ExportError(f"format {form!r}: choose one of {', '.join([*write, ALL])}")
    return write[form](dossier)


def export_folder(trail: "Trail", dossier: Dossier, folder: Path, *, weights: bool = False) -> list[Path]:
    """Write every format, the proofs, the model signature and what checks them into a folder; return the files.

    With `weights` the adapter itself too. Files of an earlier export are replaced.

    Raises:
        ExportError: `folder` is a file, or holds another adapter's files.
        StoreError: the adapter is missing from the store or altered, and `weights` asks for it.
    """
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"--out {folder}: is a file; give a folder for every format at once")
    folder.mkdir(parents=True, exist_ok=True)
    texts = {file: export_text(trail, dossier, form) for form, file in FORMATS.items()}
    for file, leaf in dossier.proofs.items():
        texts[file] = json.dumps(record_bundle(trail, leaf), indent=1, ensure_ascii=False) + "\n"
    texts[files.TRUST_FILE] = (trail.home / files.TRUST_FILE).read_text(encoding="utf-8")
    if dossier.signature is not None:
        body = dossier.signature[1]
        texts[files.SIGNATURE_FILE] = trail.store.get_blob(body.signature).decode()
        texts[files.PUBLIC_KEY_FILE] = body.public_key
    for file, text in texts.items():
        write_atomically(folder / file, text.encode())
        (folder / file).chmod(0o644)
    written = [folder / file for file in texts]
    return [*written, *_copy_weights(trail, dossier, folder / files.ADAPTER_FOLDER)] if weights else written


def _copy_weights(trail: "Trail", dossier: Dossier, target: Path) -> list[Path]:
    """Copy the adapter's files, checked, into a folder that holds nothing else."""
    source = trail.store.get_directory(dossier.digest)
    names = sorted(path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
    there = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    if there and (target / MANIFEST).is_file() and (target / MANIFEST).read_bytes() == (source / MANIFEST).read_bytes():
        there -= set(names)
    if there:
        raise ExportError(f"--out {target}: holds other files ({', '.join(sorted(there)[:3])}); give a fresh folder")
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
    return [target / name for name in names]
