"""Rows of Hugging Face datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gspo.data.readers.rows import _require_rows
from gspo.errors import InputError, did_you_mean


class HuggingFaceRows:
    """A split of a dataset: a name on the hub, or a local directory of data files or of ``save_to_disk``."""

    def __init__(self, source: str, split: str = "train", subset: str | None = None) -> None:
        import datasets

        directory = Path(source)
        saved = (directory / "state.json").exists() or (directory / "dataset_dict.json").exists()
        try:
            found = (
                datasets.load_from_disk(source)
                if saved
                else datasets.load_dataset(source, subset, split=split)
            )
        except (
            Exception
        ) as error:  # the library raises its own, the hub's, fsspec's and the parsers' errors
            raise InputError(
                f"source: {source!r} (split {split!r}, subset {subset!r}) does not load as a Hugging Face dataset: "
                f"{type(error).__name__}: {error}"
            ) from error
        if isinstance(found, dict):
            if split not in found:
                raise InputError(f"split: {source!r} has no {split!r}.{did_you_mean(split, found)}")
            found = found[split]
        self._dataset = found
        self._stem = f"{source}/{split}" if subset is None else f"{source}/{subset}/{split}"
        _require_rows(self, source)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self._dataset[index])

    def name(self, index: int) -> str:
        """The source and the row, from 0."""
        return f"{self._stem}:{index}"
