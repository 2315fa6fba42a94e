"""Lay the keys of ``preset: NAME`` under a config's own.

Not here: the table of presets (:mod:`gspo.losses.presets`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from omegaconf import DictConfig, OmegaConf

from gspo.errors import InputError, did_you_mean
from gspo.losses.presets import PRESETS

logger = logging.getLogger(__name__)

# Of a file's loss, what stays when the command line names another objective.
_PENALTIES = ("kl_coef", "kl_estimator", "entropy_coef")
_CORRECTION = ("correction", "correction_low", "correction_high")


def preset_keys(cfg: DictConfig) -> dict[str, Any]:
    """Return what the config's ``preset`` lays under its own keys; those that differ are logged.

    A section whose ``_component_`` is another than the preset's stands alone. An ``optimizer`` is
    completed, not made.

    Raises:
        InputError: No preset has that name.
    """
    config_keys = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(config_keys, dict)
    name = config_keys.get("preset")
    if name is None:
        return {}
    if not isinstance(name, str) or name not in PRESETS:
        raise InputError("preset", name, "is not known", did_you_mean(str(name), PRESETS))
    keys = deepcopy(dict(PRESETS[name].config))
    standing: list[str] = []  # keys of the config's own that differ
    for key, value in list(keys.items()):
        in_config = config_keys.get(key)
        if not isinstance(value, dict) or not isinstance(in_config, dict):
            if key in config_keys and in_config != value:
                standing.append(key)
            if key == "optimizer":
                del keys[key]
            continue
        differing = [f"{key}.{k}" for k in value if k in in_config and in_config[k] != value[k]]
        standing += differing
        if f"{key}._component_" in differing:
            del keys[key]
    if standing and os.environ.get("RANK", "0") == "0":
        remaining = sorted(_dotted(keys) - set(standing))
        logger.warning(
            "preset: %s gives way to the config's own %s; it sets %s.",
            name,
            ", ".join(standing),
            ", ".join(remaining) or "nothing",
        )
    return keys


def _dotted(keys: dict[str, Any]) -> set[str]:
    names = set()
    for key, value in keys.items():
        if isinstance(value, dict):
            names |= {f"{key}.{k}" for k in value}
        else:
            names.add(key)
    return names


def make_room(from_file: dict[str, Any], overrides: Sequence[str]) -> None:
    """Take what a preset sets out of a file's keys where the command line names the preset.

    The command line comes later than the file. Of the file's ``loss`` its penalties and its
    correction stay; the rest is another objective's.
    """
    name = ""
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "preset":
            name = value
    if name not in PRESETS:
        return
    for key, value in PRESETS[name].config.items():
        in_file = from_file.get(key)
        if key == "loss" and isinstance(in_file, dict):
            stays = _PENALTIES + _CORRECTION
            from_file[key] = {k: v for k, v in in_file.items() if k in stays}
        elif key == "loss" or not isinstance(in_file, dict):
            from_file.pop(key, None)
        else:
            from_file[key] = {k: v for k, v in in_file.items() if k not in value}
