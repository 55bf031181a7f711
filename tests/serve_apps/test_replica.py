"""What the settings of a service become: the engine's own settings, and what a replica asks of the cluster."""

from pathlib import Path

import pytest

from configs.schema import ServeSettings, load_settings
from serve_apps import app
from serve_apps.gateway import Base
from serve_apps.replica import engine_config


def test_every_bound_of_adapters_and_tenants_reaches_the_engine() -> None:
    settings = ServeSettings(
        adapter_cache_mib=3,
        adapter_host_mib=5,
        max_step_adapter_mib=2,
        enable_prefix_cache=False,
        tenant_weights={"acme": 2.0},
    )
    config = engine_config(settings, base_path="base", base_digest="sha256:0")
    assert (config.adapter_cache_bytes, config.adapter_host_bytes) == (3 << 20, 5 << 20)
    assert config.max_step_adapter_bytes == 2 << 20
    assert not config.enable_prefix_cache
    assert config.tenant_weights == (("acme", 2.0),)
    assert engine_config(ServeSettings(), base_path="base", base_digest="sha256:0").max_step_adapter_bytes is None


@pytest.mark.parametrize(("preset", "device", "num_gpus"), [("local", "cpu", 0), ("h200", "cuda", 0.6)])
def test_a_replica_asks_for_the_device_that_its_engine_uses(
    preset: str, device: str, num_gpus: float, tmp_path: Path
) -> None:
    settings = load_settings(preset).serve
    assert engine_config(settings, base_path="base", base_digest="sha256:0").device == device
    bound = app.build(settings, home=tmp_path, base=Base("base", "sha256:0", "tiny"))
    (backend,) = bound._bound_deployment.init_args
    assert backend._bound_deployment.ray_actor_options["num_gpus"] == num_gpus
