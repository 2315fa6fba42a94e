"""The data graph: one torchdata node per file, composed in :mod:`gspo.data.graph`."""
