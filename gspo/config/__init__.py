"""The settings of a recipe, and how a config becomes them."""

from gspo.config.checks import build, build_loss, check, refusals
from gspo.config.command_line import parse, read_command_line, show_errors
from gspo.config.settings import BaseSettings, Section, Settings
from gspo.config.value_types import Given

__all__ = [
    "BaseSettings",
    "Given",
    "Section",
    "Settings",
    "build",
    "build_loss",
    "check",
    "parse",
    "read_command_line",
    "refusals",
    "show_errors",
]
