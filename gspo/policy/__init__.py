"""The policy: a decoder and the loss head in one module, sharded with FSDP2."""

from gspo.policy.checkpoint_config import check_decoder
from gspo.policy.mask import document_mask
from gspo.policy.microbatch import Microbatch, batch_segments, row_inputs
from gspo.policy.model import Policy, output_weight
from gspo.policy.sharding import PolicyOptions, build_policy, load_weights, shard_policy

__all__ = [
    "Microbatch",
    "Policy",
    "PolicyOptions",
    "batch_segments",
    "build_policy",
    "check_decoder",
    "document_mask",
    "load_weights",
    "output_weight",
    "row_inputs",
    "shard_policy",
]
