"""Rows of Hugging Face datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gspo.data.readers.rows import readable, require_rows
from gspo.errors import InputError, did_you_mean, require


class HuggingFaceRows:
    """A split of a dataset: a name on the hub, or a local folder of files or ``save_to_disk``."""

    def __init__(self, source: str, split: str = "train", subset: str | None = None) -> None:
        dataset = _load(source, split, subset)
        if isinstance(dataset, dict):
            if split not in dataset:
                hint = did_you_mean(split, dataset)
                raise InputError("split", must=f"{source!r} has no {split!r}", remedy=hint)
            dataset = dataset[split]
        self._dataset = dataset
        self._stem = f"{source}/{split}" if subset is None else f"{source}/{subset}/{split}"
        require_rows(self, source)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with readable(self, index):
            return dict(self._dataset[index])

    def name(self, index: int) -> str:
        """Return the source and the row, from 0."""
        return f"{self._stem}:{index}"


def _load(source: str, split: str, subset: str | None) -> Any:
    """Load a dataset, or a dictionary of its splits."""
    import datasets

    is_text = isinstance(source, str) and source != ""
    require(is_text, "source", source, "must be a text", "name a dataset or a folder")
    folder = Path(source)
    is_saved = (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()
    try:
        if is_saved:
            return datasets.load_from_disk(source)
        return datasets.load_dataset(source, subset, split=split)
    except Exception as error:  # its own errors, the hub's, fsspec's and the parsers'
        raise InputError(
            "source",
            source,
            f"(split {split!r}, subset {subset!r}) does not load as a Hugging Face dataset: "
            f"{type(error).__name__}: {error}",
        ) from error
