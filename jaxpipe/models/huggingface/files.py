"""Reads and writes the safetensors of a folder: one file, or several with an index.

    model.safetensors                              or    model-00001-of-00003.safetensors, ...
                                                         model.safetensors.index.json

A file is a header (name, dtype, shape and place of each tensor) and then the values, so that a part
of one tensor can be read alone.

References:
  The format: huggingface.co/docs/safetensors. Nothing in it is executed, unlike pickles (`.bin`,
  `.pt`), which run whatever they hold when they are loaded.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save_file

Shape = tuple[int, ...]

_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class WeightFiles:
  """The tensors in the files of a folder, of which only headers have been read.

  Attributes:
    folder: the folder.
    slices: name of a tensor -> safetensors' handle, from which parts of the tensor are read.
  """

  folder: pathlib.Path
  slices: Mapping[str, Any]

  @classmethod
  def open(cls, folder: str | os.PathLike[str]) -> WeightFiles:
    """Opens all files of a folder.

    Raises:
      ValueError: a folder without files or with pickles alone, a damaged file, or weights that are
        quantized.
    """
    at = pathlib.Path(folder)
    slices: dict[str, Any] = {}
    for path in _find(at):
      try:
        file = safetensors.safe_open(path, framework="np")
        slices |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no dict
      except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); fetch the file again") from None
    kinds = {name: str(found.get_dtype()) for name, found in slices.items()}
    if strange := [f"{name} ({kind})" for name, kind in kinds.items() if kind not in _FLOATS]:
      # Masks of old GPT-2 files; no weight of a model is an integer.
      slices = {name: s for name, s in slices.items() if kinds[name] in _FLOATS}
      if any(name.endswith(".weight") for name in kinds.keys() - slices.keys()):
        raise ValueError(f"{at}: {strange[0]} is quantized; give float32, float16 or bfloat16")
    return cls(at, slices)

  def shape(self, name: str) -> Shape:
    """Returns the shape of a tensor."""
    return tuple(self.slices[name].get_shape())

  def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """Reads a part of a tensor, in its own dtype; `index` is a slice for each of its dims."""
    part: np.ndarray = self.slices[name][index]
    return part


def _find(folder: pathlib.Path) -> list[pathlib.Path]:
  """The paths of a model's files, as its index names them where it has one."""
  if (folder / _INDEX).is_file():
    try:
      names = sorted(set(json.loads((folder / _INDEX).read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise ValueError(f"{folder / _INDEX}: damaged ({error}); fetch the file again") from None
    # An index is text from elsewhere: it may name files beside it, and no others.
    if strange := [name for name in names if pathlib.Path(name).name != name]:
      raise ValueError(f"{folder / _INDEX}: {strange[0]!r} is not a file beside it")
    if missing := [name for name in names if not (folder / name).is_file()]:
      raise ValueError(f"{folder}: {missing[0]} is missing, one of {len(names)}; fetch it, too")
    return [folder / name for name in names]
  if (folder / _ONE).is_file():
    return [folder / _ONE]
  pickles = sorted(p.name for p in folder.glob("*") if p.suffix in _PICKLES)
  if pickles:
    raise ValueError(
      f"{folder / pickles[0]}: a pickle runs code when it is loaded, and is not; convert it to"
      " safetensors where you trust it, or fetch the model's *.safetensors"
    )
  raise ValueError(f"{folder}: holds neither {_ONE} nor {_INDEX}")


def write_files(
  folder: pathlib.Path,
  tensors: Iterator[tuple[str, np.ndarray]],
  sizes: Mapping[str, int],
  limit: int,
) -> None:
  """Writes a model's files, of which one is in memory at a time.

  Args:
    folder: an existing folder.
    tensors: yields name and values of each tensor, in the order of `sizes`.
    sizes: name of a tensor -> its bytes. Known beforehand, because a file's name holds how many
      files there are.
    limit: bytes of a file; a larger tensor has a file to itself.
  """
  groups: list[list[str]] = [[]]
  held = 0
  for name, size in sizes.items():
    if groups[-1] and held + size > limit:
      groups.append([])
      held = 0
    groups[-1].append(name)
    held += size
  where: dict[str, str] = {}
  for i, names in enumerate(groups, 1):
    file = _ONE if len(groups) == 1 else f"model-{i:05}-of-{len(groups):05}.safetensors"
    found = dict(next(tensors) for _ in names)
    # `format` is what transformers asks for before it reads a file.
    save_file(found, folder / file, metadata={"format": "pt"})
    where |= dict.fromkeys(names, file)
  if len(groups) > 1:
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def bytes_of(shape: Shape, dtype: Any) -> int:
  """Returns the bytes of a tensor of this shape and dtype."""
  return math.prod(shape) * np.dtype(dtype).itemsize
