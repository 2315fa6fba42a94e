"""The commands of ``python -m gspo``, each a module with a ``main(arguments)``."""
