"""An adapter's OpenSSF model signature (OMS): what tools that know no log check a model folder with.

A signature is a Sigstore bundle round a DSSE envelope round an in-toto statement that lists the SHA-256 of every file
of the folder, signed with ECDSA on P-256. `model_signing verify key` of the original tool accepts it, and this module
accepts what that tool signs file by file with SHA-256. Made from a stored manifest, so no file is hashed twice.

Sources: github.com/sigstore/model-transparency v1.1.1 (signing.py, sign_ec_key.py: the statement, the bundle, the key
hint); docs.sigstore.dev/about/bundle (media type v0.3); secure-systems-lab/dsse protocol.md v1.0 (what is signed).
"""

import contextlib
import os
import tempfile
from base64 import b64encode
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

import rfc8785
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from attribution.disk import REAL
from attribution.log.note import NoteError, decode_base64
from attribution.records import PAYLOAD_TYPE, STATEMENT_TYPE, RecordError, parse_strict, pre_auth_encoding
from attribution.store import MANIFEST, Manifest
from configs.errors import UserError

FORMAT = "https://model_signing/signature/v1.0"
ALGORITHM = "ecdsa-p256-sha256"
MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
SERIALISATION = {"method": "files", "hash_type": "sha256", "allow_symlinks": False}
KEY_FILE, PUBLIC_FILE = "model-signing.pem", "model-signing.pub.pem"


class ModelSignatureError(UserError):
    """A model signature or its key that is malformed, missing, or not for these files."""


@dataclass(frozen=True)
class ModelKey:
    """The P-256 key that signs adapters; model signing knows no Ed25519."""

    private: ec.EllipticCurvePrivateKey

    @property
    def public_pem(self) -> str:
        """The public half as PEM, which `model_signing verify key --public_key` reads."""
        return _pem(self.private.public_key())

    def sign(self, message: bytes) -> bytes:
        """Return the DER signature of `message`; one message has one signature (RFC 6979)."""
        return self.private.sign(message, ec.ECDSA(SHA256(), deterministic_signing=True))


def ensure_model_key(home: Path) -> ModelKey:
    """Return the home's key for signing models, made the first time: keys/model-signing.pem, 0600, and its public half.

    Raises ModelSignatureError when others may read it, or it is no P-256 key.
    """
    path = home / "keys" / KEY_FILE
    if not path.exists():
        _create(path)
    mode = path.stat().st_mode
    if mode & 0o077:
        raise ModelSignatureError(f"key file {path}: mode {mode & 0o777:o} lets others read it; run chmod 600 {path}")
    try:
        private = load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError) as error:
        raise ModelSignatureError(f"key file {path}: not an unencrypted PEM private key") from error
    if not isinstance(private, ec.EllipticCurvePrivateKey) or not isinstance(private.curve, ec.SECP256R1):
        raise ModelSignatureError(f"key file {path}: holds no P-256 key; move it away, and a fresh one is made")
    key = ModelKey(private)
    public = path.with_name(PUBLIC_FILE)
    if not public.exists():
        public.write_text(key.public_pem, encoding="ascii")
    return key


def sign_model(name: str, manifest: Manifest, key: ModelKey) -> bytes:
    """Return the signature of a stored directory: its files and the manifest itself, whose SHA-256 is its digest."""
    digests = _digests(manifest)
    statement: Any = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": _root(list(digests.values()))}}],
        "predicateType": FORMAT,
        "predicate": {
            "serialization": SERIALISATION,
            "resources": [
                {"name": path, "algorithm": "sha256", "digest": hexadecimal} for path, hexadecimal in digests.items()
            ],
        },
    }
    payload = rfc8785.dumps(statement)
    signature = {"sig": b64encode(key.sign(pre_auth_encoding(payload))).decode(), "keyid": ""}
    bundle: Any = {
        "mediaType": MEDIA_TYPE,
        "verificationMaterial": {"publicKey": {"hint": _hint(key.private.public_key())}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": b64encode(payload).decode(),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [signature],
        },
    }
    return rfc8785.dumps(bundle)


def verify_model(bundle: bytes, manifest: Manifest, *, public_pem: str) -> int:
    """Return how many files were signed, once the key is found to have signed those of `manifest` and itself, no more.

    Raises ModelSignatureError naming the file that was not signed, or was and is not there.
    """
    signed, expected = signed_files(bundle, public_pem=public_pem), _digests(manifest)
    for path in sorted(signed.keys() | expected.keys()):
        if signed.get(path) != expected.get(path):
            raise ModelSignatureError(f"model signature: {path} is not the file that was signed")
    return len(signed)


def signed_files(bundle: bytes, *, public_pem: str) -> dict[str, str]:
    """Return path -> SHA-256 in hex of the files that a signature covers, once the key is found to have made it.

    Raises ModelSignatureError saying what is wrong.
    """
    try:
        value = parse_strict(bundle, "model signature")
        envelope = value["dsseEnvelope"]
        (entry,) = envelope["signatures"]
        payload = decode_base64(envelope["payload"], what="payload")
        signature = decode_base64(entry["sig"], what="signature")
        hint = value["verificationMaterial"]["publicKey"]["hint"]
        types = (value["mediaType"], envelope["payloadType"])
    except (RecordError, NoteError, KeyError, TypeError, ValueError) as error:
        raise ModelSignatureError(f"model signature: not a bundle with one DSSE signature: {error}") from error
    if types != (MEDIA_TYPE, PAYLOAD_TYPE):
        raise ModelSignatureError(f"model signature: of type {types}, not {(MEDIA_TYPE, PAYLOAD_TYPE)}")
    public_key = _public_key(public_pem)
    if hint != _hint(public_key):
        raise ModelSignatureError("model signature: made with another key than the one given")
    try:
        public_key.verify(signature, pre_auth_encoding(payload), ec.ECDSA(SHA256()))
    except InvalidSignature as error:
        raise ModelSignatureError("model signature: not made with this key, or altered") from error
    return _resources(payload)


def _resources(payload: bytes) -> dict[str, str]:
    """The files of a signed statement, once they lead to the digest it names."""
    try:
        statement = parse_strict(payload, "model signature")
        predicate = statement["predicate"]
        serialisation = predicate["serialization"]
        files = {item["name"]: item["digest"] for item in predicate["resources"] if item["algorithm"] == "sha256"}
        (subject,) = statement["subject"]
        root = subject["digest"]["sha256"]
        known = (statement["_type"], statement["predicateType"], serialisation["method"], serialisation["hash_type"])
        num_files = len(predicate["resources"])
        found = _root(list(files.values()))
    except (RecordError, KeyError, TypeError, ValueError) as error:
        raise ModelSignatureError(f"model signature: its statement lacks a part: {error}") from error
    if known != (STATEMENT_TYPE, FORMAT, "files", "sha256") or len(files) != num_files:
        raise ModelSignatureError("model signature: not one of SHA-256 file by file, which is what can be checked here")
    if found != root:
        raise ModelSignatureError("model signature: its files do not lead to the digest it names")
    return files


def _digests(manifest: Manifest) -> dict[str, str]:
    """Path -> SHA-256 of every file of a stored directory, in the order of the original tool: by the path's parts."""
    files = {file.path: file.sha256 for file in manifest.files}
    files[MANIFEST] = sha256(manifest.canonical()).hexdigest()
    return {path: files[path] for path in sorted(files, key=lambda path: PurePosixPath(path).parts)}


def _root(digests: list[str]) -> str:
    """SHA-256 over the files' digests one after the other."""
    return sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()


def _pem(key: ec.EllipticCurvePublicKey) -> str:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def _hint(key: ec.EllipticCurvePublicKey) -> str:
    """How a bundle names its key: SHA-256 of the PEM text."""
    return sha256(_pem(key).encode()).hexdigest()


def _public_key(pem: str) -> ec.EllipticCurvePublicKey:
    try:
        key = load_pem_public_key(pem.encode())
    except ValueError as error:
        raise ModelSignatureError("model signing key: not a PEM public key") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ModelSignatureError("model signing key: not on the curve P-256")
    return key


def _create(path: Path) -> None:
    """Write a fresh key whole or not at all; of several processes at once, the first one's stays."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")  # 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            path.hardlink_to(name)
    finally:
        Path(name).unlink(missing_ok=True)
    REAL.sync_directory(path.parent)
