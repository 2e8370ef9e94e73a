"""Residual policies: what F keeps for the backward pass, and what is computed again instead."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax

_DOTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable


@dataclasses.dataclass(frozen=True)
class Residuals:
  """A residual policy.

  Attributes:
    name: of the policy.
    layer: the `jax.checkpoint` policy under which each layer is differentiated; None keeps all that
      `jax.vjp` does.
    stage_input: keep the stage's input alone; the stage's forward runs again before its backward.
  """

  name: str
  layer: Callable[..., bool] | None
  stage_input: bool = False


POLICIES = {
  # Matmuls with weights are kept; attention scores, which dwarf everything, have batch dims.
  "dots": Residuals("dots", _DOTS),
  "all": Residuals("all", None),
  # What the second forward keeps for the moment is `dots` again: under `all`, one microbatch's
  # attention scores would cost more than keeping every microbatch's matmuls.
  "full": Residuals("full", _DOTS, stage_input=True),
}


def residual_policy(name: str) -> Residuals:
  """Returns the policy `full`, `dots` or `all`.

  Raises:
    ValueError: another name.
  """
  if name not in POLICIES:
    raise ValueError(f"residuals {name!r} is unknown; use one of {', '.join(sorted(POLICIES))}")
  return POLICIES[name]
