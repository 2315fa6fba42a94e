"""GSPO and GRPO fine-tuning of language models, as a torchtune recipe pack.

``__all__`` names what users import. Each is loaded when it is first asked for, so that
``import gspo`` itself loads nothing but the standard library.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Advantage": "gspo.data",
    "BaseSettings": "gspo.config",
    "CISPOLoss": "gspo.losses",
    "Completion": "gspo.types",
    "FSPOLoss": "gspo.losses",
    "FetchSteps": "gspo.data",
    "GRPOLoss": "gspo.losses",
    "GSPOConfig": "gspo.trainer",
    "GSPOLoss": "gspo.losses",
    "GSPOTokenLoss": "gspo.losses",
    "GSPOTrainer": "gspo.trainer",
    "Group": "gspo.types",
    "GroupBatch": "gspo.types",
    "InputError": "gspo.errors",
    "LocalSampler": "gspo.sampling.local",
    "LossInputs": "gspo.losses.inputs",
    "LossOutput": "gspo.losses.inputs",
    "Max": "gspo.metrics",
    "Mean": "gspo.metrics",
    "Microbatch": "gspo.policy",
    "Min": "gspo.metrics",
    "MultiScaleLoss": "gspo.losses",
    "Pack": "gspo.data",
    "PackedBatch": "gspo.types",
    "Policy": "gspo.policy",
    "Prompt": "gspo.types",
    "PromptReader": "gspo.data.readers",
    "Ranks": "gspo.parallel",
    "RewardPool": "gspo.rewards.pool",
    "Sample": "gspo.data",
    "SamplingParams": "gspo.types",
    "Score": "gspo.data",
    "Section": "gspo.config",
    "Segment": "gspo.data",
    "SegmentLoss": "gspo.losses",
    "Settings": "gspo.config",
    "StepMetrics": "gspo.metrics",
    "Sum": "gspo.metrics",
    "build_policy": "gspo.policy",
    "linear_logps": "gspo.kernels",
    "linear_loss": "gspo.kernels",
    "pack_documents": "gspo.data.layout",
    "parse": "gspo.config",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Load a public name from its module."""
    if name not in _HOMES:
        raise AttributeError(f"module 'gspo' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted({*globals(), *_HOMES})
