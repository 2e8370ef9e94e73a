"""The cost of one layer, the unit that models are cut into stages by.

Whoever measures a layer (a profile on a device, a count of FLOPs, a guess) fills these in; it makes
no difference where the numbers come from. Times are of one microbatch, in any one unit; bytes may
be any one unit of memory as well.
"""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class LayerCost:
  """The cost of one layer, or of a run of them.

  Attributes:
    name: name in reports, in which `by_pattern` looks for its pattern.
    forward: time of its forward pass for one microbatch.
    input_grad: time of the gradient of its input.
    weight_grad: time of the gradient of its weights.
    parameters: bytes that its device holds all the time: weights, and as much of gradients and
      optimizer state as the caller counts.
    activations: bytes that it keeps per microbatch, from its forward to its weight gradient.
    output: bytes of its output for one microbatch, which a stage that ends with it sends.
  """

  name: str
  forward: float = 0
  input_grad: float = 0
  weight_grad: float = 0
  parameters: float = 0
  activations: float = 0
  output: float = 0

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self)[1:]:
      # Written so that a NaN is refused as well.
      if not 0 <= getattr(self, field.name) < float("inf"):
        raise ValueError(
          f"{field.name}={getattr(self, field.name)} of layer {self.name!r} is no cost; use 0 or"
          " more"
        )

  @property
  def time(self) -> float:
    """Time of all its passes for one microbatch."""
    return self.forward + self.input_grad + self.weight_grad


def total(layers: Sequence[LayerCost], name: str) -> LayerCost:
  """Adds the costs of a run of layers up.

  Args:
    layers: consecutive layers; none of them cost nothing together.
    name: name of the run.

  Returns:
    The run as one layer, with the output of its last.
  """
  return LayerCost(
    name,
    forward=sum(layer.forward for layer in layers),
    input_grad=sum(layer.input_grad for layer in layers),
    weight_grad=sum(layer.weight_grad for layer in layers),
    parameters=sum(layer.parameters for layer in layers),
    activations=sum(layer.activations for layer in layers),
    output=layers[-1].output if layers else 0,
  )
