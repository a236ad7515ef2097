"""Checkpoints: folders that are whole or not there, and that tell when a byte of theirs has changed.

step_NNNNNNNN/
  state.safetensors   tensors
  state.json          the rest
  manifest.json       the SHA-256 of both
"""

import hashlib
import json
import os
import shlex
import shutil
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitrail.errors import VitrailError, VitrailWarning

KEPT = 2
FILES = ("state.safetensors", "state.json")
# No file of a run here was ever near these sizes; larger ones are not read.
MAX_JSON_BYTES, MAX_TENSOR_BYTES = 2**26, 2**34


def list_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints in `folder`, oldest first."""
    return sorted(folder.glob("step_????????"))


def save_checkpoint(folder: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Write a checkpoint at `values["step"]` beside its place, then rename it there; drop all but the newest two.

    A step's state is the same whenever it is reached, so one that is there already and sound is left alone.

    Raises:
        VitrailError: if it cannot be written; those before it are untouched then.
    """
    final = folder / f"step_{values['step']:08d}"
    partial = folder / f".{final.name}.partial"
    with writing(final, folder):
        if final.exists():
            if find_damage(final) is None:
                return
            _drop(final)
        for left_over in folder.glob(".step_*"):
            shutil.rmtree(left_over)
        # Not its parents: a run folder that has vanished must not come back as a hollow one.
        folder.mkdir(exist_ok=True)
        partial.mkdir()
        save_tensors(tensors, partial / FILES[0])
        write_text(partial / FILES[1], json.dumps(dict(values), indent=1))
        write_text(partial / "manifest.json", json.dumps({name: _sha256(partial / name) for name in FILES}, indent=1))
        sync(partial)
        partial.rename(final)
        sync(folder)
        for old in list_checkpoints(folder)[:-KEPT]:
            _drop(old)


def _drop(path: Path) -> None:
    """Hide a checkpoint in one move, then delete it: killed in between, no half of one stays under a good name."""
    hidden = path.rename(path.with_name(f".{path.name}.dropped"))
    shutil.rmtree(hidden)


@contextmanager
def writing(path: Path, checkpoints: Path) -> Generator[None]:
    """Turn a failure to write `path` into a VitrailError that tells up to which checkpoint the run is safe."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        kept = list_checkpoints(checkpoints)
        safe = f"the run is safe up to {kept[-1].name}" if kept else "there is no checkpoint yet"
        reason = getattr(error, "strerror", None) or error
        raise VitrailError(f"cannot write {path}: {reason}; {safe}; mend that, then go on with --resume") from error


def load_newest_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and values of the newest sound checkpoint, or None if there never was one.

    Warns of each damaged one that is passed over. Raises VitrailError if none is sound.
    """
    found = list_checkpoints(folder)
    for path in reversed(found):
        damage = find_damage(path)
        if damage is None:
            return load_tensors(path / FILES[0]), read_json(path / FILES[1])
        warnings.warn(f"{damage}; going back to the checkpoint before it", VitrailWarning, stacklevel=2)
    if found:
        raise VitrailError(f"no checkpoint in {folder} is sound; train again with another --out")
    return None


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file, or None if its files have the hashes they were saved with."""
    try:
        manifest = read_json(path / "manifest.json")
        expected = {name: str(manifest[name]) for name in FILES}
    except (VitrailError, KeyError, TypeError):
        return f"{path / 'manifest.json'} is missing or not what vitrail writes"
    for name in FILES:
        try:
            found = _sha256(path / name)
        except OSError as error:
            return f"{path / name} cannot be read ({error.strerror})"
        if found != expected[name]:
            return (
                f"{path / name} has changed since it was saved (SHA-256 {found[:12]}…, saved as {expected[name][:12]}…)"
            )
    return None


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file and wait until it is on the disk."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    sync(path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raises VitrailError if it is none."""
    try:
        _check_size(path, MAX_TENSOR_BYTES)
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise VitrailError(f"cannot read {path}: {error}") from error


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises VitrailError if it holds none."""
    try:
        _check_size(path, MAX_JSON_BYTES)
        return json.loads(path.read_text())
    except OSError as error:
        raise VitrailError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # no JSON, no text, or nested without end
        raise VitrailError(f"{path} is not valid JSON: {error}") from error


def _check_size(path: Path, limit: int) -> None:
    size = path.stat().st_size
    if size > limit:
        raise VitrailError(f"{path} has {size / 2**20:.0f} MiB; at most {limit / 2**20:g} are read")


# Files of these kinds hold, or may hold, pickles: programs that run when they are read.
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".npy", ".tar")


def refuse_pickle(path: Path) -> None:
    """Raise VitrailError if `path` is named as pickled weights are; it is not opened."""
    if path.suffix.lower() in PICKLES:
        names = shlex.join([str(path), str(path.with_suffix(".safetensors"))])
        raise VitrailError(
            f"{path} is a pickle, which can run any code when it is read, and is never opened; if you trust who made "
            'it (weights_only has been got round), convert it: python -c "import sys, torch, safetensors.torch as s; '
            f's.save_file(torch.load(sys.argv[1], weights_only=True), sys.argv[2])" {names}'
        )


def write_text(path: Path, text: str) -> None:
    """Replace a text file, whole or not at all, and wait until it is on the disk."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    sync(partial)
    partial.rename(path)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
