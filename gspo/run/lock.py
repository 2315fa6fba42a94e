"""The lock of a run's folder: two runs in one would mix their rows."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from torchtune import utils

from gspo.config import refusals
from gspo.errors import InputError

log = utils.get_logger("INFO")

_NAME = ".lock"


class FolderLock:
    """A lock that the system takes back when the process ends, however it ends.

    The file that stays behind is no lock. A record lock is of the process, so that reward workers
    do not inherit it.

    Args:
        folder: is there.

    Raises:
        InputError: Another run holds it, or the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._file: IO[str] | None = None
        path = folder / _NAME
        with refusals("output_dir", "choose a folder that can be written"):
            file = path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # either says that it is held
            file.seek(0)
            holder = file.read().strip() or "a process that does not say its name"
            file.close()
            raise InputError(
                "output_dir",
                str(folder),
                f"is in use by another run: {holder}",
                "wait for it, end it, or set another output_dir",
            ) from error
        except OSError as error:  # some network file systems have no locks
            log.warning("%s cannot be locked: %s. Start no second run there.", folder, error)
            file.close()
            return
        self._file = file
        self._write_holder(file)

    def release(self) -> None:
        """Give the folder free; twice is as once."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write_holder(self, file: IO[str]) -> None:
        """Name this process for the message of another one."""
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        except OSError as error:  # a full disk; the lock holds all the same
            log.warning("%s cannot be written: %s.", file.name, error)
