"""Any causal language model of ``transformers`` as the policy: ``pip install 'gspo[hf]'``."""

from gspo.models.huggingface.causal_lm import as_decoder, causal_lm
from gspo.models.huggingface.checkpointer import Checkpointer, write_model
from gspo.models.huggingface.lora import lora_causal_lm
from gspo.models.huggingface.tokenizer import HuggingFaceTokenizer, stop_tokens, tokenizer

__all__ = [
    "Checkpointer",
    "HuggingFaceTokenizer",
    "as_decoder",
    "causal_lm",
    "lora_causal_lm",
    "stop_tokens",
    "tokenizer",
    "write_model",
]
