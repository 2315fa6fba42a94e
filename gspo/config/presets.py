"""Lay the keys of ``preset: NAME`` under a config's own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from omegaconf import DictConfig, OmegaConf

from gspo.errors import InputError, did_you_mean
from gspo.losses.presets import PRESETS, logger

_BESIDE = (
    "kl_coef",
    "kl_estimator",
    "entropy_coef",
    "correction",
    "correction_low",
    "correction_high",
)


def preset_keys(cfg: DictConfig) -> dict[str, Any]:
    """What the config's ``preset`` lays under its own keys; those that differ are logged and stand.

    A section whose ``_component_`` is another than the preset's stands alone. An ``optimizer`` is completed, not made.

    Raises:
        InputError: no preset has that name.
    """
    own = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(own, dict)
    name = own.get("preset")
    if name is None:
        return {}
    if not isinstance(name, str) or name not in PRESETS:
        raise InputError(f"preset: {name!r} is not known.{did_you_mean(str(name), PRESETS)}")
    keys, standing = deepcopy(dict(PRESETS[name].config)), []
    for key, value in list(keys.items()):
        given = own.get(key)
        if not isinstance(value, dict) or not isinstance(given, dict):
            standing += [key] if key in own and given != value else []
            if key == "optimizer":
                del keys[key]
            continue
        differing = [f"{key}.{k}" for k in value if k in given and given[k] != value[k]]
        standing += differing
        if f"{key}._component_" in differing:
            del keys[key]
    if standing and os.environ.get("RANK", "0") == "0":
        sets = {
            f"{key}.{k}" for key, value in keys.items() if isinstance(value, dict) for k in value
        }
        sets |= {key for key, value in keys.items() if not isinstance(value, dict)}
        left = ", ".join(sorted(sets - set(standing))) or "nothing"
        logger.warning(
            "preset: %s gives way to the config's own %s; it sets %s.",
            name,
            ", ".join(standing),
            left,
        )
    return keys


def make_room(from_file: dict[str, Any], overrides: Sequence[str]) -> None:
    """Takes what a preset sets out of a config file's keys where the command line names the preset: it comes later.

    Of the file's ``loss`` its penalties and its correction stay; the rest is another objective's.
    """
    name = next((o.partition("=")[2] for o in reversed(overrides) if o.startswith("preset=")), None)
    for key, value in PRESETS[name].config.items() if name in PRESETS else ():
        given = from_file.get(key)
        if key == "loss" and isinstance(given, dict):
            from_file[key] = {k: v for k, v in given.items() if k in _BESIDE}
        elif key == "loss" or not isinstance(given, dict):
            from_file.pop(key, None)
        else:
            from_file[key] = {k: v for k, v in given.items() if k not in value}
