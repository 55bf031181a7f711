"""Every kernel compiles for a Hopper GPU with the real compiler, which needs no GPU."""

import json
import subprocess
import sys
from pathlib import Path

from configs import env

ROOT = Path(__file__).parents[2]
KERNELS = {
    *("_sort_tokens", "_list_tiles", "_shrink", "_expand", "_rms_norm", "_silu_mul", "_kv_write", "_rope_kv_write"),
    *("_sample", "_attend_decode", "_merge_splits", "_attend_chunks", "_lora_gradient"),
}
# What one program may have on an H100 or H200.
MAX_SHARED_BYTES = 227 * 1024


def test_every_kernel_compiles(tmp_path: Path) -> None:
    variables = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_kernels.py"))],
        capture_output=True,
        text=True,
        check=False,
        env=env.child_environment(variables),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert {each["kernel"] for each in compiled} == KERNELS
    assert all(each["shared"] <= MAX_SHARED_BYTES for each in compiled)
    # An aligned pool is read 16 bytes at a time.
    assert all(each["wide_loads"] for each in compiled if each["kernel"] in ("_shrink", "_expand"))
