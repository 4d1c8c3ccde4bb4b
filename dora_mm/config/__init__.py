"""Strict run configs: a schema for each thing that is configured, the loader, and checks of the paths they name."""

from dora_mm.config.loader import (
    ConfigError,
    differing_keys,
    dump_config,
    find_path,
    load_config,
    resolve_adapter,
    resolve_model,
    resolve_path,
    run_name,
)

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
