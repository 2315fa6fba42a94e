"""The folder that a run writes, and the state that it has reached."""

from gspo.run.folder import RunFolder
from gspo.run.progress import Progress, build_profiler
from gspo.run.state import TrainState

__all__ = ["Progress", "RunFolder", "TrainState", "build_profiler"]
