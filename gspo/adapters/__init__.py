"""Adapters: LoRA, DoRA and QLoRA of torchtune's decoders and of transformers'.

Not here: which model is built, and with which adapters (the config's ``model``).
"""

from gspo.adapters.form import Adapter, Adapters, check_peft_configs
from gspo.adapters.peft_format import (
    ADAPTER_PREFIX,
    AdapterCheckpointer,
    PeftFormat,
    starting_adapters,
)
from gspo.adapters.plain import build_replica, remove_adapters

__all__ = [
    "ADAPTER_PREFIX",
    "Adapter",
    "AdapterCheckpointer",
    "Adapters",
    "PeftFormat",
    "build_replica",
    "check_peft_configs",
    "remove_adapters",
    "starting_adapters",
]
