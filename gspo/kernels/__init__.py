"""The loss head: from hidden states and the LM-head weight to log-probabilities, without holding ``T x V``."""

from gspo.kernels.reference import linear_logps

__all__ = ["linear_logps"]
