"""How many layers each stage of a stack has, and which modules that makes.

A partition such as `(2, 3)` gives the numbers of layers, first stage to last. The embedding stands
before the first stage's layers and the head behind the last's:

    partition (2, 3):   embed layers/0 layers/1 | layers/2 layers/3 layers/4 head
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence

from jaxpipe.stack.errors import StackError

Sizes = tuple[int, ...]


def checked_partition(partition: Sequence[int], depth: int) -> Sizes:
  """A partition that a user gave, as whole numbers.

  Args:
    partition: layers of each stage, anything that counts as an integer.
    depth: L, the number of layers.

  Raises:
    StackError: entries that are no whole numbers or below 0, or that do not add up to L.
  """
  # `index` takes the integers of NumPy, and refuses 2.0.
  try:
    sizes = tuple(map(operator.index, partition))
  except TypeError:
    raise StackError(
      f"partition={partition!r} is no list of whole numbers; give how many layers each stage"
      " has, or let jaxpipe.partitioned(stack, schedule, batch, METHOD) choose"
    ) from None
  if min(sizes, default=0) < 0:
    raise StackError(f"partition {list(sizes)} has a stage of less than 0 layers")
  if sum(sizes) != depth:
    raise StackError(
      f"partition {list(sizes)} has {sum(sizes)} layers and the stack"
      f" {depth}; give every stage its number of layers, 0 or more"
    )
  return sizes


def stage_sizes(partition: Sequence[int] | None, depth: int, stages: int) -> Sizes:
  """How many layers each of the stages has: [S].

  Args:
    partition: as `checked_partition` returns it; None makes them as even as can be, the first
      stages one layer larger where L does not divide.
    depth: L, the number of layers.
    stages: S, the schedule's.

  Raises:
    StackError: the partition is for another number of stages.
  """
  if partition is None:
    least, more = divmod(depth, stages)
    return tuple(least + (s < more) for s in range(stages))
  if len(partition) != stages:
    raise StackError(
      f"partition {list(partition)} is for {len(partition)} stages and the schedule has"
      f" {stages}; give {stages} numbers that add up to {depth}"
    )
  return tuple(partition)


def modules_of_stages(names: Sequence[str], sizes: Sizes) -> tuple[tuple[str, ...], ...]:
  """Names of the modules of each stage.

  Args:
    names: of all modules in order, the embedding first and the head last.
    sizes: layers of each stage, [S].
  """
  embed, *layers, head = names
  bounds = [0, *itertools.accumulate(sizes)]
  stages = [layers[start:end] for start, end in itertools.pairwise(bounds)]
  stages[0] = [embed, *stages[0]]
  stages[-1] = [*stages[-1], head]
  return tuple(map(tuple, stages))
