"""Strict run configs: a schema for each thing that is configured, the loader, and checks of the paths they name."""

from dora_mm.config.loader import ConfigError, differing_keys, dump_config, load_config, run_name
from dora_mm.config.paths import find_path, resolve_adapter, resolve_model, resolve_path

__all__ = [
    "ConfigError",
    "differing_keys",
    "dump_config",
    "find_path",
    "load_config",
    "resolve_adapter",
    "resolve_model",
    "resolve_path",
    "run_name",
]
