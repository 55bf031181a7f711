"""Names blocks of tokens by all that their keys and values depend on: base, adapter content, every token so far."""

import hashlib
from collections.abc import Sequence

import numpy as np


def first_key(base_digest: str, adapter_digest: str | None, *, is_long: bool = False) -> bytes:
    """Return the key that every chain of one base and one adapter's content starts from.

    `is_long`: keys were rotated by the frequencies of long sequences.
    """
    parts = [base_digest, "" if adapter_digest is None else f"adapter {adapter_digest}"]
    if is_long:
        parts.append("long")
    return hashlib.sha256("\n".join(parts).encode()).digest()


def extend_keys(keys: list[bytes], token_ids: Sequence[int], *, block_size: int, num_tokens: int) -> None:
    """Append to a chain, which begins with its first key, the keys of further whole blocks of the first `num_tokens`.

    keys[i + 1] names block i: SHA-256 of the key before it and of the block's tokens.
    """
    for block in range(len(keys) - 1, num_tokens // block_size):
        tokens = np.asarray(token_ids[block * block_size : (block + 1) * block_size], dtype=np.int64)
        keys.append(hashlib.sha256(keys[-1] + tokens.tobytes()).digest())
