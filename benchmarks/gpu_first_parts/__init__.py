"""The measurements of ``gpu_first.py``, a module for each kind; ``parts`` names and orders them.

``parts`` and ``progress`` import the standard library alone, so that the driver runs where a
package of the pack is missing.
"""
