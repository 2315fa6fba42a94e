"""The data graph: torchdata nodes that turn prompts into microbatches, one in each file.

A recipe composes them: ``Sample``, ``Score``, ``Advantage``, ``Segment``, ``Record``, ``Pack``,
``prefetched``, ``ShareOverContext``, ``FetchSteps``. All obey one law: a node interrupted anywhere
and restored from its state yields the same remaining items, as long as the sampler holds the same
weights. Prompts come from :mod:`gspo.data.readers`.
"""

from gspo.data.advantage import Advantage, log_quarantine
from gspo.data.broadcast import ShareOverContext
from gspo.data.layout import Document, build_batch, group_documents, pack_documents
from gspo.data.node import TransformNode
from gspo.data.pack import Pack, check_bin_length
from gspo.data.prefetch import prefetched
from gspo.data.record import Record
from gspo.data.sample import Sample, check_completion, check_params
from gspo.data.score import Score
from gspo.data.segments import AtDelimiter, Segment, Splitter
from gspo.data.steps import FetchSteps, StepBatches

__all__ = [
    "Advantage",
    "AtDelimiter",
    "Document",
    "FetchSteps",
    "Pack",
    "Record",
    "Sample",
    "Score",
    "Segment",
    "ShareOverContext",
    "Splitter",
    "StepBatches",
    "TransformNode",
    "build_batch",
    "check_bin_length",
    "check_completion",
    "check_params",
    "group_documents",
    "log_quarantine",
    "pack_documents",
    "prefetched",
]
