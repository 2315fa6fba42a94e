"""Policy objectives, as components that a config names under ``loss``."""

from gspo.losses.components import (
    CISPOLoss,
    FSPOLoss,
    GRPOLoss,
    GSPOLoss,
    GSPOTokenLoss,
    MultiScaleLoss,
    SegmentLoss,
)

__all__ = [
    "CISPOLoss",
    "FSPOLoss",
    "GRPOLoss",
    "GSPOLoss",
    "GSPOTokenLoss",
    "MultiScaleLoss",
    "SegmentLoss",
]
