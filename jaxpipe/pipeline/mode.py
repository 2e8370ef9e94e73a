"""How a stack's stages are executed: as loops over layers that are alike, or behind a switch.

This is the one place of the pipeline that asks whether a stack is `uniform`; others ask for what
follows from it:

    uniform stack: layers of one kind        packed stack: stages that are not alike
    --------------------------------------   ---------------------------------------
    a stage is a loop over one split layer   every stage is split whole
    embedding and head stand outside         they are part of the first and last stage
    `residuals="auto"` is `dots`             `residuals="auto"` is `full`
    `unroll="auto"` weighs program shapes    `unroll="auto"` is one loop
"""

from __future__ import annotations

import dataclasses
from typing import Protocol


class _HasUniform(Protocol):
  """A `LayerStack`, or a stack as it is laid out."""

  @property
  def uniform(self) -> bool:
    """Whether the layers are of one kind and lie stacked."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExecutionMode:
  """How a stack's stages are executed, as far as it is decided before anything is traced.

  Attributes:
    looped: whether a stage is a loop over layers that are alike, whose placed parameters have a
      leaf for every parameter of a layer.
    auto_residuals: the residual policy that `auto` stands for.
    loss_gradient_waits: whether the loss's gradient is taken at the end of the last stage's F and
      waits in the ring `gradients` for that stage's backward. A last stage that has the head inside
      returns the loss, and its backward begins with 1.
    unrolls: whether `unroll="auto"` may choose straight lines of ticks. With unlike stages every
      tick of a straight line would hold the code of every stage.
  """

  looped: bool
  auto_residuals: str
  loss_gradient_waits: bool
  unrolls: bool


_LOOPED = ExecutionMode(looped=True, auto_residuals="dots", loss_gradient_waits=True, unrolls=True)
_SWITCHED = ExecutionMode(
  looped=False, auto_residuals="full", loss_gradient_waits=False, unrolls=False
)


def mode_of(stack: _HasUniform) -> ExecutionMode:
  """Returns how the stages of a stack are executed; a `LayerStack` or one that is laid out."""
  return _LOOPED if stack.uniform else _SWITCHED
