"""Tells the modules inside a module whether they train, by the attributes that they have for it.

Flax NNX modules keep their mode as attributes, `deterministic` of a dropout and
`use_running_average` of a batch norm, and people's own modules do likewise under the names of
`MODE_FLAGS`. A module that was made, or set by `model.eval()`, to evaluate is a frozen norm or a
dropout that is switched off: it stays so while the rest trains.

    as found         in training      in evaluation
    trains           trains           evaluates
    evaluates        evaluates        evaluates
    None             None             None            told by an argument of its call
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from flax import nnx

from jaxpipe.stack.module.signature import MODE_FLAGS

# A mode flag of modules of ours, under a name that no module of a user can have.
TRAINS = "/trains"
_FLAGS = {**MODE_FLAGS, TRAINS: True}


def set_mode(module: nnx.Module, training: bool) -> None:
  """Sets the mode of every inner module that was not found switched off.

  Args:
    module: as it was found; it is changed in place.
    training: False sets all of them to evaluate.
  """
  for inner, name, trains in _flags(module):
    if trains and not training:
      # Past NNX's own `__setattr__` and its `eval` method, both of which a variable of this name
      # in a Linen module may hide.
      object.__setattr__(inner, name, not _FLAGS[name])


def count_switched_off(module: nnx.Module) -> int:
  """The number of inner modules that were found in evaluation mode, and stay so."""
  return len({id(inner) for inner, _, trains in _flags(module) if not trains})


def flags_set_when_made(module: nnx.Module) -> frozenset[str]:
  """Names of the mode flags that the module itself keeps as attributes with a value."""
  return frozenset(name for name in MODE_FLAGS if vars(module).get(name) is not None)


def switched_off_statistics(module: nnx.Module) -> frozenset[tuple[Any, ...]]:
  """Paths of the statistics of norms that were found switched off, which no forward changes."""
  return frozenset(
    (*path, name)
    for path, inner in nnx.iter_graph(module)
    if isinstance(inner, nnx.Module) and vars(inner).get("use_running_average") is True
    for name, value in vars(inner).items()
    if isinstance(value, nnx.BatchStat)
  )


def _flags(module: nnx.Module) -> Iterator[tuple[Any, str, bool]]:
  """Yields each inner module with the name of a flag that it has, and whether it says to train."""
  for _, inner in nnx.iter_graph(module):
    if isinstance(inner, nnx.Module):
      for name, value in _FLAGS.items():
        found = vars(inner).get(name)
        if isinstance(found, (bool, np.bool_)):
          yield inner, name, bool(found) is value
