"""The CPU kernels in C (`cpu_*.c`): compiled on first use for the very processor, kept per user, called through ctypes.

No wheel can hold them: built for any x86-64 they would miss AVX-512, built for one they would crash on another. The
library shares torch's OpenMP threads, because torch has loaded libgomp under its own name before. Without a C compiler
the engine computes the same through torch, slower.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch  # before the library is opened: its libgomp is the one that both use

SOURCES = tuple(sorted(Path(__file__).parent.glob("cpu_*.[ch]")))
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-fvisibility=hidden", "-Wno-psabi")
COMPILE_TIMEOUT_S = 300
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}

_P, _L, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
# Function -> argument types, as in the C sources; those in `_VOID` return nothing, the others 1 when memory ran out.
_SIGNATURES: dict[str, list[type]] = {
    "lora_add": [_P, _P, _P, _P, _L, _P, _L, _L, _L, _P, _L, _L, _I, _I, _I],
    "linear": [_P, _P, _P, _P, _L, _L, _L, _I, _I, _I, _I],
    "rope_kv": [_P, _P, _P, _P, _P, _P, _P, _P, _P, _L, _L, _L, _L, _F, _I, _I],
    "attention": [_P, _P, _P, _P, _P, _L, _L, _L, _L, _L, _L, _F, _L, _I, _I],
    "add_rms_norm": [_P, _P, _P, _P, _L, _L, _F, _I, _I],
    "silu_mul": [_P, _P, _L, _L, _I, _I],
    "score_rows": [_P, _P, _P, _P, _P, _L, _L, _L, _I],
    "layers": [_P],
    "ask_for_large_pages": [_P, _L],
    "set_num_threads": [_I],
    "has_bf16_dot": [],
}
_VOID = ("rope_kv", "add_rms_norm", "silu_mul", "score_rows", "ask_for_large_pages", "set_num_threads")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Native:
    """The opened library, one callable per exported function; they take addresses, sizes and the number of threads."""

    path: Path
    lora_add: Callable[..., int]
    linear: Callable[..., int]
    rope_kv: Callable[..., None]
    attention: Callable[..., int]
    add_rms_norm: Callable[..., None]
    silu_mul: Callable[..., None]
    score_rows: Callable[..., None]
    layers: Callable[..., int]
    ask_for_large_pages: Callable[..., None]
    set_num_threads: Callable[..., None]
    has_bf16_dot: bool

    def compute_alone(self) -> None:
        """Make torch and these kernels use one thread when the calling thread computes.

        For threads that work beside the one that steps: libgomp counts the teams of all threads, and once they are
        more than the processors, its threads sleep at the end of every parallel region instead of waiting for the
        next. A step has hundreds of regions; waking up took a quarter of it (docs/log.md, 2026-11-25).
        """
        torch.get_num_threads()  # torch sets up a thread on first use, and would undo what comes now
        self.set_num_threads(1)


def load(cache: Path) -> Native | None:
    """Open the kernels, compiling them into `cache` when this processor, compiler or source is new.

    Safe for several processes at once: each compiles into a folder of its own and renames the result into place.
    None, with one warning in the log that says why, when they cannot be compiled or opened here.
    """
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        _warn("no C compiler is on PATH; install gcc")
        return None
    try:
        path = cache / f"cpu-{_key(compiler)}.so"
        if not path.exists():
            _compile(compiler, path)
        return _open(path)
    except subprocess.CalledProcessError as error:
        _warn(f"{compiler} failed: {error.stderr.strip()[-500:]}")
    except (OSError, subprocess.TimeoutExpired) as error:
        _warn(str(error))
    return None


def cpu_flags() -> str:
    """Return what -march=native looks at, as one line."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    wanted = ("vendor_id", "cpu family", "model\t", "model name", "flags", "Features", "CPU part")
    first_core = lines[: lines.index("")] if "" in lines else lines
    return "\n".join([platform.machine(), *(line for line in first_core if line.startswith(wanted))])


def check(code: int) -> None:
    """Raise MemoryError when a kernel says that memory ran out."""
    if code:
        raise MemoryError("a CPU kernel found no memory for its scratch")


def _warn(reason: str) -> None:
    _log.warning("CPU kernels are off, torch computes instead (several times slower LoRA): %s", reason)


def _key(compiler: str) -> str:
    """Return a name for what the binary depends on."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=30).stdout
    digest = hashlib.sha256("\n".join([compiler, version, *FLAGS, cpu_flags()]).encode())
    for source in SOURCES:
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def _compile(compiler: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        built = Path(scratch) / path.name
        sources = [str(source) for source in SOURCES if source.suffix == ".c"]
        command = [compiler, *FLAGS, "-o", str(built), *sources]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=COMPILE_TIMEOUT_S)
        os.replace(built, path)


def _open(path: Path) -> Native:
    library = ctypes.CDLL(str(path))
    functions = {}
    for name, types in _SIGNATURES.items():
        function = getattr(library, f"trailmark_{name}")
        function.argtypes = types
        function.restype = None if name in _VOID else ctypes.c_int
        functions[name] = function
    has_bf16_dot = bool(functions.pop("has_bf16_dot")())
    return Native(path=path, has_bf16_dot=has_bf16_dot, **functions)
