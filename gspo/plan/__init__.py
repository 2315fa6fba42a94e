"""``python -m gspo plan``: whether a config fits a machine that is not here, and how long an optimizer step takes.

:mod:`gspo.plan.rehearsal` runs the step on fake tensors, :mod:`gspo.plan.estimate` adds what stands beside it and turns
operations and bytes into time, :mod:`gspo.plan.command` reads the command line and prints. Nothing here is measured.
"""
