"""Train a model from a script or a notebook, without a config file and a run folder.

The loop and its parts are the recipe's. Not here: files of a run, held-out schedules, context
parallelism, log-probabilities recomputed by the trainer (``old_logps: recompute``), and reward
workers with their time limits: take the recipe for these.
"""

from gspo.trainer.settings import GSPOConfig
from gspo.trainer.trainer import GSPOTrainer

__all__ = ["GSPOConfig", "GSPOTrainer"]
