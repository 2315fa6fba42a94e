"""The function that torch calls at the end of its own import, in every process.

``import torch`` must survive it. It stands outside the package because a file ``gspo.py`` in a
user's folder hides the package from the scripts there; were the entry point inside, their
``import torch`` would fail. What it does is told in ``gspo/plugin.py``.
"""

import logging
import os
import sys

_HIDES_NOTE = "GSPO_HIDES_TORCHAO_NOTE"  # in the environment of processes that tune starts


def register() -> None:
    """Hand over to :func:`gspo.plugin.register` if torchtune is being imported; never raise.

    A process that ``tune`` has started, with torch imported first, hides torchao's note.
    """
    if _HIDES_NOTE in os.environ:
        hide_torchao_note()
    if "torchtune" not in sys.modules:
        return
    try:
        from gspo.plugin import register as register_recipes
    except Exception as error:
        print(f"gspo: not registered with tune: {error!r}", file=sys.stderr)
    else:
        register_recipes()


def hide_torchao_note() -> None:
    """Hide the line that torchao logs when its compiled kernels do not fit torch's version.

    Nothing here uses them. It has to be called before torchao is imported. Processes that this one
    starts, such as the ranks of a run, do the same when they import torch.
    """
    logging.getLogger("torchao").addFilter(_is_no_torchao_note)
    os.environ[_HIDES_NOTE] = "1"


def _is_no_torchao_note(record: logging.LogRecord) -> bool:
    note = "Skipping import of cpp extensions due to incompatible torch version"
    return not record.getMessage().startswith(note)
