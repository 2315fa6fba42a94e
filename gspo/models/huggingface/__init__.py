"""Any causal language model of ``transformers`` as the policy: ``pip install 'gspo[hf]'``."""

from gspo.models.huggingface.causal_lm import causal_lm
from gspo.models.huggingface.checkpointer import Checkpointer
from gspo.models.huggingface.tokenizer import tokenizer

__all__ = ["Checkpointer", "causal_lm", "tokenizer"]
