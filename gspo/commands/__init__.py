"""The commands of ``python -m gspo``, one module each."""
