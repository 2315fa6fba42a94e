"""Whether a config fits a machine that is not here, and how long an optimizer step takes there.

:mod:`gspo.plan.dry_run` runs the step on fake tensors, which :mod:`gspo.plan.memory_tracker`
follows. :mod:`gspo.plan.estimate` adds what stands beside the step and turns operations into time,
:mod:`gspo.plan.transfers` bytes, and :mod:`gspo.plan.remedies` tries what would save memory.
``python -m gspo plan`` prints the plan. Nothing here is measured.
"""
