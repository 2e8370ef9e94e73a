"""CompleteP: learning rates that were found on a small model, for a wider and deeper one.

CompleteP multiplies initial values, activations and the optimizer's settings by factors, so that
the best learning rate stays the same when the model grows. With m_N = width / base width and m_L =
layers / base layers, and a factor of 1 where the table is empty:

                           init variance   forward   learning rate   decay   Adam's epsilon
    tables, final norm                                                       1 / m_N
    matrices of layers     1 / m_N                   1 / m_N         m_N     1 / (m_N m_L)
    their biases, norms                                              0       1 / (m_N m_L)
    what a branch adds                     1 / m_L
    logits                                 1 / m_N

The method is a family: rates of layers have another factor m_L^(alpha - 1), and branches
m_L^(-alpha); CompleteP is alpha = 1. Heads keep their width: a wider model has more of them.

References:
  Dey et al., Don't be lazy: CompleteP enables compute-efficient deep transformers (table 1, as two
  independent implementations have it; the paper itself was not at hand), arXiv 2505.01618.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Factors:
  """The factors of one parameter in the optimizer.

  Attributes:
    rate: multiplies the learning rate.
    decay: multiplies the weight decay.
    epsilon: multiplies Adam's epsilon.
  """

  rate: float
  decay: float
  epsilon: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompleteP:
  """The rules between one model and its base model.

  Attributes:
    width: m_N, the model's width over the base's.
    depth: m_L, the model's number of layers over the base's.
  """

  width: float
  depth: float

  @classmethod
  def parse(cls, base: str, width: int, layers: int) -> CompleteP:
    """Reads the base model's size as a flag gives it.

    Args:
      base: WIDTHxLAYERS of the base, such as 256x4.
      width: width of the model.
      layers: layers of the model.

    Raises:
      ValueError: not two counts.
    """
    numbers = base.split("x")
    if len(numbers) != 2 or not all(n.isdecimal() and int(n) for n in numbers):
      raise ValueError(f"{base!r} is not WIDTHxLAYERS of a base model; use one like 256x4")
    return cls(width=width / int(numbers[0]), depth=layers / int(numbers[1]))

  @property
  def branch(self) -> float:
    """Factor of what a layer's branches add to the residual stream."""
    return 1 / self.depth

  @property
  def logits(self) -> float:
    """Factor of the logits."""
    return 1 / self.width

  @property
  def deviation(self) -> float:
    """Factor of the standard deviation of fresh matrices in layers."""
    return self.width**-0.5

  def factors(self, path: str, rank: int) -> Factors:
    """Returns the optimizer's factors for one parameter.

    Args:
      path: of the parameter, such as `layers/query/kernel`.
      rank: number of its dims, without that of the layers.
    """
    matrix = rank >= 2
    if not path.startswith("layers/"):
      return Factors(rate=1, decay=float(matrix), epsilon=1 / self.width)
    epsilon = 1 / (self.width * self.depth)
    if matrix:
      return Factors(rate=1 / self.width, decay=self.width, epsilon=epsilon)
    return Factors(rate=1, decay=0, epsilon=epsilon)
