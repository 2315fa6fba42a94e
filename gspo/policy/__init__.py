"""The policy: a decoder and the loss head in one module, sharded with FSDP2."""
