"""The parts of a first visit to a GPU, in their order, and how long each measurement may take."""

from __future__ import annotations

from dataclasses import dataclass

LIMIT_FACTOR = 3.0  # a measurement that takes so many times what was expected is ended
SHORTEST_LIMIT = 60.0  # seconds
REHEARSAL_SECONDS = 5.0  # expected of a measurement with the sizes of a rehearsal
REHEARSAL_LIMIT = 180.0  # on a machine that other work may share


@dataclass(frozen=True)
class Measurement:
    """A function ``module.name(visit)`` that returns plain values.

    Args:
        name: Of the function.
        module: Of this package.
        expected: Seconds on an H100; a guess until it has run on one.
    """

    name: str
    module: str
    expected: float

    def seconds(self, *, is_rehearsal: bool) -> float:
        """Return the seconds that must be left for it to begin."""
        return REHEARSAL_SECONDS if is_rehearsal else self.expected

    def limit(self, *, is_rehearsal: bool) -> float:
        """Return the seconds after which it is ended."""
        if is_rehearsal:
            return REHEARSAL_LIMIT
        return max(LIMIT_FACTOR * self.expected, SHORTEST_LIMIT)


@dataclass(frozen=True)
class Part:
    """Measurements that run one after another in a process of their own.

    Args:
        name: For the command line and the results.
        measurements: In their order.
        prepares: The process sets torch's flags as a run does, by the pack's own function.
    """

    name: str
    measurements: tuple[Measurement, ...]
    prepares: bool = True

    @property
    def names(self) -> list[str]:
        """The names of the measurements."""
        return [measurement.name for measurement in self.measurements]

    def measurement(self, name: str) -> Measurement:
        """Return the measurement of a name."""
        by_name = dict(zip(self.names, self.measurements, strict=True))
        return by_name[name]


PARTS = (
    Part(
        "wheels",
        (Measurement("versions", "wheels", 10), Measurement("packages", "wheels", 5)),
        prepares=False,
    ),
    Part(
        "probes",
        (
            Measurement("rates", "probes", 10),
            Measurement("products", "probes", 15),
            Measurement("attention", "probes", 60),
            Measurement("decode_attention", "pack_probes", 15),
            Measurement("block_masks", "pack_probes", 10),
            Measurement("draw", "pack_probes", 5),
        ),
    ),
    Part(
        "tests",
        (
            Measurement("suite", "checks", 120),
            Measurement("exact", "checks", 45),
            Measurement("gradient_bits", "checks", 15),
        ),
    ),
    Part(
        "head",
        (Measurement("first_shape", "head", 120), Measurement("second_shape", "head", 150)),
        prepares=False,
    ),
    Part(
        "real_shape",
        (
            Measurement("plan", "real_shape", 25),
            Measurement("steps", "real_shape", 100),
            Measurement("split_sums", "real_shape", 30),
            Measurement("cudnn", "real_shape", 60),
            Measurement("cuda_graphs", "real_shape", 30),
            Measurement("rollout", "real_shape", 120),
            Measurement("update_compiled", "real_shape", 60),
            Measurement("update_eager", "real_shape", 60),
        ),
    ),
    Part(
        "profile",
        (
            Measurement("update", "profiles", 90),
            Measurement("decode", "profiles", 40),
            Measurement("memory", "profiles", 10),
        ),
    ),
)


def find_part(name: str) -> Part:
    """Return the part of a name."""
    for part in PARTS:
        if part.name == name:
            return part
    raise KeyError(name)
