"""Connecting this process to Ray: the cluster that is up, or one that lives as long as the command.

Ray reads its address and token from the environment, and worker processes inherit both; so these functions set them
for the time of the connection and put the old values back.
"""

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from cluster.state import cluster_id_of, ensure_ray_directory, ensure_token, load_state
from configs import env
from configs.errors import UserError
from configs.schema import ClusterSettings

NAMESPACE = "trailmark"
MIB = 1 << 20
NUM_STARTS = 3


def ray_variables(token_file: Path) -> dict[str, str]:
    """Return the variables every process that talks to our Ray needs."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray 2.60 warns at each task about a change to come in how it hides GPUs; we declare none where there is none.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


@contextlib.contextmanager
def ray_session(home: Path, settings: ClusterSettings) -> Iterator[str]:
    """Yield the address of the home's cluster if it is up, else of one that ends with this block.

    Nested use, and use inside a Ray job, keeps the connection there is.
    """
    import ray

    if ray.is_initialized():
        yield ray.get_runtime_context().gcs_address
    elif load_state(home).is_alive("ray"):
        with connect(home) as address:
            yield address
    else:
        with private_ray(
            num_cpus=settings.num_cpus,
            object_store_mib=settings.object_store_mib,
            num_gpus=settings.num_gpus,
            token_file=ensure_token(home),
            temp_dir=ensure_ray_directory(cluster_id_of(home), name="own"),
        ) as address:
            yield address


@contextlib.contextmanager
def connect(home: Path) -> Iterator[str]:
    """Connect to the home's running cluster and yield its address.

    Raises:
        UserError: no cluster is up.
    """
    import ray

    state = load_state(home)
    if not state.is_alive("ray"):
        raise UserError(f"no cluster is up for {home}; start one with `trailmark up`")
    variables = {**ray_variables(ensure_token(home)), "RAY_ADDRESS": state.ray_address}
    with ray_environment(variables):
        ray.init(address=state.ray_address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.WARNING)
        try:
            yield state.ray_address
        finally:
            ray.shutdown()


@contextlib.contextmanager
def private_ray(
    *,
    num_cpus: int,
    object_store_mib: int,
    num_gpus: int = 0,
    token_file: Path | None = None,
    temp_dir: Path | None = None,
) -> Iterator[str]:
    """Start a Ray of this process's own, yield its address, and stop it at the end of the block.

    Its logs, below `temp_dir` (default: Ray's own), are removed unless the block raises.
    """
    import ray

    with contextlib.ExitStack() as stack:
        if token_file is None:
            token_file = ensure_token(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trailmark-token-"))))
        stack.enter_context(ray_environment(ray_variables(token_file)))
        options = {
            "num_cpus": num_cpus,
            "num_gpus": num_gpus,
            "object_store_memory": object_store_mib * MIB,
            "_temp_dir": str(temp_dir) if temp_dir else None,
        }
        stack.callback(ray.shutdown)
        started = _start_private(options)
        address = str(ray.get_runtime_context().gcs_address)
        # Two clusters may share this host: Train, Serve and workers must find this one.
        stack.enter_context(ray_environment({"RAY_ADDRESS": address}))
        yield address
    shutil.rmtree(started.address_info["session_dir"], ignore_errors=True)


def _start_private(options: dict[str, Any]) -> Any:
    """Start Ray in this process; try again when its node was not ready within the 30 s that Ray 2.60 fixes.

    A loaded machine takes longer: at a load of 16 on 2 cores the agent imports for half a minute.
    """
    import ray

    fixed = {"address": "local", "namespace": NAMESPACE, "include_dashboard": False, "log_to_driver": False}
    attempt = partial(ray.init, **fixed, **options, logging_level=logging.WARNING, _node_ip_address="127.0.0.1")
    for num_left in range(NUM_STARTS - 1, -1, -1):
        try:
            return attempt()
        except Exception as error:
            ray.shutdown()
            if num_left == 0 or "timed out during startup" not in str(error):
                raise
    raise AssertionError("the last attempt returns or raises")


@contextlib.contextmanager
def ray_environment(values: dict[str, str]) -> Iterator[None]:
    """Set variables for the block, and have Ray's own cache of them read again on both sides."""
    try:
        with env.temporary_variables(values):
            _reread_token()
            yield
    finally:
        _reread_token()


def _reread_token() -> None:
    """Make Ray, which reads its mode and token once per process, read them again."""
    from ray._raylet import AuthenticationTokenLoader, Config

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
