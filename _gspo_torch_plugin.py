"""The function that torch calls at the end of its own import, in every process.

``import torch`` must survive it. It stands outside the package because a file ``gspo.py`` in a
user's folder hides the package from the scripts there; were the entry point inside, their
``import torch`` would fail. What it does is told in ``gspo/plugin.py``.
"""

import os
import sys


def register() -> None:
    """Hand over to :func:`gspo.plugin.register` if torchtune is being imported; never raise.

    A process that ``tune`` has started, with torch imported first, hides torchao's note as well.
    """
    if "torchtune" not in sys.modules and "GSPO_HIDES_TORCHAO_NOTE" not in os.environ:
        return
    try:
        from gspo.plugin import register as register_recipes
    except Exception as error:
        print(f"gspo: not registered with tune: {error!r}", file=sys.stderr)
    else:
        register_recipes()
