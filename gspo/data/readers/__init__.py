"""Prompt readers: JSONL, Parquet, Hugging Face datasets and reasoning-gym."""

from gspo.data.readers.components import (
    huggingface_prompts,
    jsonl_prompts,
    parquet_prompts,
    reasoning_gym_mixture_prompts,
    reasoning_gym_prompts,
)
from gspo.data.readers.huggingface import HuggingFaceRows
from gspo.data.readers.jsonl import JsonlRows
from gspo.data.readers.parquet import ParquetRows
from gspo.data.readers.procedural import ReasoningGymMixtureRows, ReasoningGymRows
from gspo.data.readers.reader import PromptReader
from gspo.data.readers.rows import Rows

__all__ = [
    "HuggingFaceRows",
    "JsonlRows",
    "ParquetRows",
    "PromptReader",
    "ReasoningGymMixtureRows",
    "ReasoningGymRows",
    "Rows",
    "huggingface_prompts",
    "jsonl_prompts",
    "parquet_prompts",
    "reasoning_gym_mixture_prompts",
    "reasoning_gym_prompts",
]
