"""What ``gpu_first.py`` measures, a module for each kind; ``parts`` names and orders it all.

``parts`` and ``progress`` import the standard library alone, so that the driver runs where a package
of the pack is missing.
"""
