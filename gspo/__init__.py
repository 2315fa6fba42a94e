"""GSPO and GRPO fine-tuning of language models, as a torchtune recipe pack."""

__version__ = "0.1.0"
