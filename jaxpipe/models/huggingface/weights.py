"""Reads a model's parameters from files onto their places on a mesh, and writes them to files.

`names` says which part of which tensor each parameter is. Reading goes from the mesh to the files:
each process asks for what its own devices hold of a parameter, and that part alone is read.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as Spec

from jaxpipe.models.huggingface.config import to_json
from jaxpipe.models.huggingface.files import WeightFiles, bytes_of, write_files
from jaxpipe.models.huggingface.names import Names, Piece, ignored, known_as
from jaxpipe.models.transformer.config import TransformerConfig
from jaxpipe.parallel.placing import Tree, layer_order, shardings
from jaxpipe.parallel.protocol import ScheduleLike
from jaxpipe.parallel.rules import describe
from jaxpipe.stack.stack import LayerStack

_SHOWN = 3  # tensors of each kind that an error names
_LIMIT = 4 * 10**9  # bytes of a file


def check_weights(
  folder: str | os.PathLike[str], config: TransformerConfig, stack: LayerStack
) -> WeightFiles:
  """Compares the tensors in the files with those that the model needs, by headers alone.

  Args:
    folder: a folder with safetensors.
    config: of the model.
    stack: `transformer(config)`.

  Returns:
    The files, opened.

  Raises:
    ValueError: tensors that are missing, left over or of another shape, all in one line; or files
      that cannot be read.
  """
  files = WeightFiles.open(folder)
  names = Names.of(config, stack.param_shapes())
  wanted = {known_as(name, files.slices): names.shape(ps) for name, ps in names.tensors()}
  missing = [f"{name} {list(wanted[name])}" for name in wanted if name not in files.slices]
  extra = [
    f"{name} {list(files.shape(name))}"
    for name in files.slices
    if name not in wanted and not ignored(name)
  ]
  unlike = [
    f"{name} {list(files.shape(name))} for {list(shape)}"
    for name, shape in wanted.items()
    if name in files.slices and files.shape(name) != shape
  ]
  kinds = {"missing": missing, "left over": extra, "of another shape": unlike}
  if found := "; ".join(_show(kind, what) for kind, what in kinds.items() if what):
    raise ValueError(f"{folder}: the weights are not this model's: {found}")
  return files


def _show(kind: str, tensors: list[str]) -> str:
  """A phrase of an error that names some of the tensors."""
  more = len(tensors) - _SHOWN
  return f"{kind}: {', '.join(tensors[:_SHOWN])}{f' and {more} more' if more > 0 else ''}"


def read_params(
  folder: str | os.PathLike[str],
  config: TransformerConfig,
  stack: LayerStack,
  schedule: ScheduleLike | None = None,
  mesh: Mesh | None = None,
) -> Tree:
  """Reads a model's parameters: the canonical tree on one device, or placed over a mesh.

  Every process reads what its own devices hold of each parameter, one parameter at a time.

  Args:
    folder: a folder with *.safetensors.
    config: of the model, from `read_config` or equal in shape.
    stack: `transformer(config)`.
    schedule: with `mesh`, says which device holds which layers; None: all on one device.
    mesh: mesh with a `stage` axis of `schedule.devices`.

  Returns:
    Parameters in the stack's dtypes.

  Raises:
    ValueError: tensors that are not the model's, as `check_weights` finds them.
  """
  files, shapes = check_weights(folder, config, stack), stack.param_shapes()
  names = Names.of(config, shapes)
  if schedule is None:
    order = np.arange(stack.depth)
    here = SingleDeviceSharding(jax.local_devices()[0])
    places = jax.tree.map(lambda _: here, shapes)
  else:
    assert mesh is not None
    order, places = layer_order(stack.depth, schedule), shardings(shapes, stack, schedule, mesh)

  def one(path: Any, leaf: jax.ShapeDtypeStruct, place: Sharding) -> jax.Array:
    """One parameter, of which JAX asks for the part of each device of this process."""
    name = describe(path)

    def block(index: Any) -> np.ndarray:
      return _block(files, names, name, leaf, index, order)

    return jax.make_array_from_callback(leaf.shape, place, block)

  return jax.tree.map_with_path(one, shapes, places)


def _block(
  files: WeightFiles,
  names: Names,
  path: str,
  leaf: Any,
  index: tuple[slice, ...],
  order: np.ndarray,
) -> np.ndarray:
  """Reads a rectangular part of a placed parameter.

  Args:
    files: where to read.
    names: of all parameters.
    path: path of the parameter.
    leaf: its whole shape and its dtype.
    index: the part, a slice for each dim.
    order: canonical number of the layer at each place along the leading dim of `layers`.
  """
  stored, start = names.stored[path], names.start(path)
  spans = [range(*part.indices(n)) for part, n in zip(index, leaf.shape, strict=True)]
  n = stored.leading
  *rest, last = (slice(span.start, span.stop) for span in spans[n:])
  inner = (*rest, slice(last.start + start, last.stop + start))
  found = np.empty([len(span) for span in spans], leaf.dtype)
  # One tensor in the files for each layer, or for each expert of each layer.
  for at in np.ndindex(*found.shape[:n]):
    numbers = [span[i] for span, i in zip(spans, at, strict=False)]
    if n:
      numbers[0] = int(order[numbers[0]])
    name = known_as(stored.name.format(*numbers), files.slices)
    # The part is turned, not the tensor: no more is read than the part.
    part = files.read(name, inner[::-1] if stored.turned else inner)
    found[at] = part.T if stored.turned else part
  return found


def export(
  folder: str | os.PathLike[str],
  params: Tree,
  config: TransformerConfig,
  *,
  length: int,
  order: np.ndarray | None = None,
  limit: int = _LIMIT,
) -> None:
  """Writes a model as Hugging Face's `transformers` reads it: config.json and safetensors.

  All processes of a run call it, and the first writes. Besides the tensors of one file, no process
  holds more of the model than it did before.

  Args:
    folder: the folder to write to, made if missing; must be empty.
    params: canonical parameters, or placed ones.
    config: of the model.
    length: positions of the longest row that the model is for, where its configuration does not
      say.
    order: of placed parameters, `layer_order(depth, schedule)`; None for canonical ones.
    limit: bytes of a file; a larger model is written as several files with an index.

  Raises:
    ValueError: a model that Hugging Face has no name for, or a folder that is not empty.
  """
  at, fields = pathlib.Path(folder), to_json(config, length)
  if at.is_file() or (at.is_dir() and any(at.iterdir())):
    raise ValueError(f"{at}: not an empty folder; give another")
  names = Names.of(config, params)
  tensors = dict(names.tensors())
  leaves = {describe(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
  position = np.argsort(np.arange(config.layers) if order is None else order)

  def values() -> Iterator[tuple[str, np.ndarray]]:
    """Yields each tensor, gathered from all devices when its turn comes."""
    for name, pieces in tensors.items():
      parts = [_whole(leaves[p.path], p, position) for p in pieces]
      joined = np.concatenate(parts, axis=-1)
      turned = names.stored[pieces[0].path].turned
      yield name, np.ascontiguousarray(joined.T if turned else joined)

  if jax.process_index():
    # A gather takes every process, whoever writes.
    for _ in values():
      pass
    return
  at.mkdir(parents=True, exist_ok=True)
  dtype = {name: leaves[pieces[0].path].dtype for name, pieces in tensors.items()}
  sizes = {name: bytes_of(names.shape(ps), dtype[name]) for name, ps in tensors.items()}
  write_files(at, values(), sizes, limit)
  # Last, because a folder with config.json counts as a whole model.
  (at / "config.json").write_text(json.dumps(fields, indent=2) + "\n")


def _whole(leaf: jax.Array, piece: Piece, position: np.ndarray) -> np.ndarray:
  """One piece as a NumPy array, gathered from the devices that hold it.

  Args:
    leaf: the whole parameter, on any devices.
    piece: the layer and the expert to take.
    position: place of each canonical layer along the leading dim of `layers`.
  """
  numbers = piece.numbers and (int(position[piece.numbers[0]]), *piece.numbers[1:])
  sharding = leaf.sharding
  here = NamedSharding(sharding.mesh, Spec()) if isinstance(sharding, NamedSharding) else sharding
  # Taken in the program, so that one layer is gathered and not the whole leaf; replicated, so that
  # this process has it.
  part = jax.jit(_take, out_shardings=here)(leaf, numbers)
  return np.asarray(part.addressable_data(0))


def _take(leaf: jax.Array, numbers: tuple[jax.Array, ...]) -> jax.Array:
  """The entry of a leaf at some numbers of its leading dims."""
  return leaf[numbers]
