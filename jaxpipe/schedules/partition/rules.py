"""Rules that cut layers into stages by the layers alone, not by the schedule; all are exact.

  uniform      counts as even as possible
  balanced     the largest stage time is least, and of such cuts the variance
  variance     the variance of the stage times is least (GPipe: Huang et al., 2019,
               arXiv:1811.06965, section 2.2)
  parameters   the largest stage's parameters are fewest
  type:REGEX   as many layers whose name matches in each stage (DeepSpeed's spelling)

All but the first and the last are dynamic programs over (stage, first layer), after which nothing
but the layers that are left matters.
"""

import functools
import itertools
import re
from collections.abc import Callable, Sequence

from jaxpipe.schedules.partition.layer import LayerCost
from jaxpipe.schedules.partition.partition import Partition

# The price of a stage of some weight; infinite where it must not be.
_Price = Callable[[float], float]


def cut(layers: Sequence[LayerCost], stages: int, method: str, *, empty: bool = False) -> Partition:
  """Cuts by the name of a rule.

  Args:
    layers: the layers in model order.
    stages: number of stages, S.
    method: `uniform`, `balanced`, `variance`, `parameters`, or `type:` and a regular expression.
    empty: whether stages may be empty where there are fewer layers than stages.

  Returns:
    The partition.

  Raises:
    ValueError: no such rule, or too few layers for the stages.
  """
  if method.startswith("type:"):
    return by_pattern(layers, stages, method)
  if method not in RULES:
    known = f"{', '.join(RULES)}, type:REGEX and, for a schedule, best"
    raise ValueError(f"unknown partition {method!r}; known: {known}")
  return RULES[method](layers, stages, empty=empty)


def uniform(layers: Sequence[LayerCost], stages: int, *, empty: bool = False) -> Partition:
  """Cuts so that counts are as even as possible: the first L mod S stages have one layer more.

  Args:
    layers: the L layers in model order.
    stages: number of stages, S.
    empty: whether stages may be empty where there are fewer layers than stages.

  Raises:
    ValueError: there are too few layers for the stages.

  >>> uniform([LayerCost("block")] * 10, 4).sizes
  (3, 3, 2, 2)
  """
  least_size(len(layers), stages, empty)
  each, more = divmod(len(layers), stages)
  sizes = [each + (s < more) for s in range(stages)]
  return Partition(layers=tuple(layers), sizes=tuple(sizes), method="uniform")


def balanced(layers: Sequence[LayerCost], stages: int, *, empty: bool = False) -> Partition:
  """Cuts so that the largest stage time is least, and of such cuts the variance.

  Args:
    layers: the layers in model order.
    stages: number of stages, S.
    empty: whether stages may be empty where there are fewer layers than stages.

  Raises:
    ValueError: there are too few layers for the stages.

  >>> balanced([LayerCost(str(t), forward=t) for t in (1, 2, 3, 4, 5)], 3).sizes
  (3, 1, 1)
  """
  return _evened([layer.time for layer in layers], layers, stages, empty, "balanced")


def by_variance(layers: Sequence[LayerCost], stages: int, *, empty: bool = False) -> Partition:
  """Cuts so that the variance of the stage times is least, as GPipe does.

  Args:
    layers: the layers in model order.
    stages: number of stages, S.
    empty: whether stages may be empty where there are fewer layers than stages.

  Raises:
    ValueError: there are too few layers for the stages.
  """
  least = least_size(len(layers), stages, empty)
  # The mean is the same for all cuts, so the sum of squares decides.
  _, sizes = _dynamic([x.time for x in layers], stages, least, lambda t: t * t, sum)
  return Partition(layers=tuple(layers), sizes=sizes, method="variance")


def by_parameters(layers: Sequence[LayerCost], stages: int, *, empty: bool = False) -> Partition:
  """Cuts so that the most parameters of a stage are fewest, and of such cuts the variance least.

  Args:
    layers: the layers in model order.
    stages: number of stages, S.
    empty: whether stages may be empty where there are fewer layers than stages.

  Raises:
    ValueError: there are too few layers for the stages.
  """
  return _evened([layer.parameters for layer in layers], layers, stages, empty, "parameters")


def by_pattern(layers: Sequence[LayerCost], stages: int, pattern: str) -> Partition:
  """Cuts so that all stages have equally many matching layers, the first few of them one more.

  Every stage but the first begins with a matching layer.

  Args:
    layers: the layers in model order.
    stages: number of stages, S.
    pattern: `type:` and a regular expression, looked for anywhere in a layer's name, in any case.

  Raises:
    ValueError: the pattern is none, or fewer layers match than there are stages.

  >>> names = ["embed", "block", "norm", "block", "block", "norm", "head"]
  >>> by_pattern([LayerCost(name) for name in names], 2, "type:block").sizes
  (4, 3)
  """
  kind, _, regex = pattern.partition(":")
  if kind != "type" or not regex:
    raise ValueError(f'{pattern!r} is no pattern of layers; use "type:REGEX" such as "type:block"')
  try:
    matches = re.compile(regex, re.IGNORECASE).search
  except re.error as error:
    raise ValueError(f"{pattern!r} is no regular expression ({error}); mend it") from None
  found = [i for i, layer in enumerate(layers) if matches(layer.name)]
  if not 1 <= stages <= len(found):
    fewer = f"use stages={len(found)} or fewer (fewer devices or chunks), or " if found else "use "
    raise ValueError(
      f"{len(found)} layers match {pattern!r}, too few for {stages} stages; {fewer}another pattern"
    )
  each, more = divmod(len(found), stages)
  firsts = itertools.accumulate([each + (s < more) for s in range(stages - 1)], initial=0)
  # What stands before the first match belongs to the first stage.
  boundaries = [0, *[found[first] for first in firsts][1:], len(layers)]
  sizes = tuple(end - start for start, end in itertools.pairwise(boundaries))
  return Partition(layers=tuple(layers), sizes=sizes, method=pattern)


RULES: dict[str, Callable[..., Partition]] = {
  "uniform": uniform,
  "balanced": balanced,
  "variance": by_variance,
  "parameters": by_parameters,
}


def least_size(layers: int, stages: int, empty: bool) -> int:
  """Returns the fewest layers that a stage may have.

  Args:
    layers: number of layers, L.
    stages: number of stages, S.
    empty: whether stages may be empty where there are fewer layers than stages.

  Returns:
    1, or 0 where there are too few layers and stages may be empty.

  Raises:
    ValueError: there are no stages, or too few layers and `empty` does not hold.
  """
  if stages < 1:
    raise ValueError(f"{layers} layers cannot be cut into {stages} stages; use stages=1 or more")
  if layers >= stages:
    return 1
  if not empty or not layers:
    raise ValueError(
      f"{layers} layers cannot fill {stages} stages; use stages={max(layers, 1)} or fewer (fewer"
      " devices or chunks), more layers, or empty=True"
    )
  return 0


def _evened(
  weights: Sequence[float], layers: Sequence[LayerCost], stages: int, empty: bool, method: str
) -> Partition:
  """Cuts so that the largest sum of weights is least, and of such cuts the variance."""
  least = least_size(len(layers), stages, empty)
  largest, _ = _dynamic(weights, stages, least, lambda w: w, max)
  _, sizes = _dynamic(
    weights, stages, least, lambda w: w * w if w <= largest else float("inf"), sum
  )
  return Partition(layers=tuple(layers), sizes=sizes, method=method)


def _dynamic(
  weights: Sequence[float],
  stages: int,
  least: int,
  price: _Price,
  merge: Callable[[tuple[float, float]], float],
) -> tuple[float, tuple[int, ...]]:
  """Cuts so that the stages' prices, merged from the last to the first, come to the least.

  Args:
    weights: one per layer; a stage's is their sum.
    stages: number of stages, S.
    least: the fewest layers of a stage.
    price: the price of a stage by its weight, ascending.
    merge: `sum` or `max`, of a stage's price and of the merged price of the stages after it.

  Returns:
    The merged price of the best cut, and its sizes; of equals the one with smaller first stages.
  """
  L = len(weights)
  up_to = list(itertools.accumulate(weights, initial=0))

  @functools.cache
  def stage_price(start: int, end: int) -> float:
    """Returns the price of a stage of the layers from `start` up to `end`."""
    return price(up_to[end] - up_to[start])

  inf = float("inf")
  # The merged price of the stages after the present one, by their first layer. `choices` holds the
  # end of the best first stage by its first layer, for the last stage, the last two, and so on.
  rest = [inf] * L + [0.0]
  choices: list[list[int]] = []
  for _ in range(stages):
    least_from, choice = [inf] * (L + 1), [L] * (L + 1)
    for start in range(L + 1):
      for end in range(start + least, L + 1):
        value = merge((stage_price(start, end), rest[end]))
        if value < least_from[start]:
          least_from[start], choice[start] = value, end
    rest = least_from
    choices.append(choice)
  boundaries = [0]
  for choice in reversed(choices):
    boundaries.append(choice[boundaries[-1]])
  return rest[0], tuple(end - start for start, end in itertools.pairwise(boundaries))
