"""The folder that a run writes, and the state that it has reached."""

from gspo.plugin import hide_torchao_note

hide_torchao_note()  # before torchtune is imported: `python -m gspo.run.plot` begins here

from gspo.run.folder import RunFolder  # noqa: E402
from gspo.run.progress import Progress, build_profiler  # noqa: E402
from gspo.run.state import TrainState  # noqa: E402

__all__ = ["Progress", "RunFolder", "TrainState", "build_profiler"]
