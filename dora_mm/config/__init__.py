"""Strict run configs: the schemas, the loader and the paths that configs name."""

from dora_mm.config.loader import (
    ConfigError,
    differing_keys,
    dump_config,
    find_path,
    load_config,
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
    "resolve_model",
    "resolve_path",
    "run_name",
]
