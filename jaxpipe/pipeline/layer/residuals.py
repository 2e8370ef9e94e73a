"""Residual policies: what F keeps for the backward pass, and what is computed again instead.

`auto` is `dots`, and for unlike stages `full`. Four have names of their own, and everything that
`jax.checkpoint` understands is one too:

    full                         the stage's input alone
    dots                         matmuls with weights and what was summed or exchanged over the
                                 mesh, never attention scores
    selective                    all but attention's scores, what is made of them at their size,
                                 and what was gathered (Korthikanti et al., arXiv:2205.05198)
    all                          whatever `jax.vjp` does
    nothing_saveable, ...        a policy of `jax.checkpoint_policies`; this one keeps each layer's
                                 input
    names:attention,mlp_up       values named with `jax.ad_checkpoint.checkpoint_name`
    a function                   `policy(primitive, *avals, **params) -> bool`
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax

Out = TypeVar("Out")
Policy = Callable[..., Any]

_WEIGHTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
# Nothing is sent twice; but what was gathered is larger than what is kept, and gathered again.
_SENT = ("psum", "psum_invariant", "reduce_scatter", "all_to_all")
_NAMES = "names:"
# In place of a policy's name: what suits the stack.
AUTO = "auto"


def _dots(primitive: Any, *avals: Any, **params: Any) -> Any:
  return primitive.name in _SENT or _WEIGHTS(primitive, *avals, **params)


class _Selective:
  """Keeps all but what was gathered and what attention computes of its scores, at their size.

  Scores are products with two batch dims at least, of rows and of heads, that are larger than
  either of their factors. Their sizes are learnt while a layer is traced, whose equations are asked
  about in their order.
  """

  def __init__(self) -> None:
    self._scores: set[tuple[int, ...]] = set()

  def __call__(self, primitive: Any, *avals: Any, **params: Any) -> bool:
    if primitive.name == "dot_general":
      shape, factors = _product(*(aval.shape for aval in avals[:2]), **params), avals[:2]
      _, batch_dims = params["dimension_numbers"]
      if len(batch_dims[0]) > 1 and math.prod(shape) > max(factor.size for factor in factors):
        self._scores.add(_dims(shape))
        return False
      return True
    read = {_dims(aval.shape) for aval in avals if hasattr(aval, "shape")}
    return primitive.name != "all_gather" and not read & self._scores


def _dims(shape: tuple[int, ...]) -> tuple[int, ...]:
  """A shape, whichever way it is transposed."""
  return tuple(sorted(n for n in shape if n > 1))


def _product(
  a: tuple[int, ...], b: tuple[int, ...], *, dimension_numbers: Any, **_: Any
) -> tuple[int, ...]:
  """The shape of a dot_general."""
  (of_a, of_b), (batch_a, batch_b) = dimension_numbers
  rest_a = [n for i, n in enumerate(a) if i not in (*of_a, *batch_a)]
  rest_b = [n for i, n in enumerate(b) if i not in (*of_b, *batch_b)]
  return (*(a[i] for i in batch_a), *rest_a, *rest_b)


@dataclasses.dataclass(frozen=True)
class Residuals:
  """A residual policy.

  Attributes:
    name: of the policy.
    layer: the `jax.checkpoint` policy under which each layer is differentiated; None keeps all that
      `jax.vjp` does.
    learns: makes the policy anew for every layer that is traced, where it learns from the layer's
      equations; `layer` then stands for it where layers are many (the reference).
    stage_input: keep the stage's input alone; the stage's forward runs again before its backward.
    names: of the values to keep, where they are given by name.
  """

  name: str
  layer: Policy | None
  learns: Callable[[], Policy] | None = None
  stage_input: bool = False
  names: tuple[str, ...] = ()

  def traced(self, trace: Callable[[Policy | None], Out]) -> Out:
    """Returns `trace(layer)`, having seen to it that the policy means something there.

    Args:
      trace: traces the derivative of a layer under the policy that it is given.

    Raises:
      ValueError: nothing that is differentiated bears one of the names, or a value is to go to
        another memory.
    """
    if self.layer is None:
      return trace(None)
    met: set[str] = set()
    out = trace(_watched(self.learns() if self.learns else self.layer, met))
    for name in self.names:
      if name not in met:
        there = f"there are {', '.join(sorted(met))}" if met else "there are none"
        raise ValueError(
          f"residuals {self.name!r}: no checkpoint_name in the layer is {name!r}; {there}"
          f"{_near(name, met)}"
        )
    return out


POLICIES = {
  # Matmuls with weights are kept; attention scores, which dwarf everything, have batch dims.
  "dots": Residuals("dots", _dots),
  "selective": Residuals("selective", _dots, learns=_Selective),
  "all": Residuals("all", None),
  # What the second forward keeps for the moment is `dots` again: under `all`, one microbatch's
  # attention scores would cost more than keeping every microbatch's matmuls.
  "full": Residuals("full", _dots, stage_input=True),
}


def residual_policy(residuals: str | Policy, uniform: bool = True) -> Residuals:
  """Returns the policy that a name or a function stands for.

  Args:
    residuals: as this module's docstring lists them.
    uniform: whether it is for layers that are alike, or for unlike stages.

  Raises:
    ValueError: an unknown name, `names:` without names, or what is no policy.
  """
  if not isinstance(residuals, str):
    return _of_function(residuals)
  if residuals.startswith(_NAMES):
    return _of_names(residuals)
  if residuals == AUTO:
    residuals = "dots" if uniform else "full"
  policies = jax_policies()
  if residuals in policies:
    return Residuals(residuals, policies[residuals])
  if residuals in POLICIES:
    return POLICIES[residuals]
  known = [AUTO, *sorted(POLICIES), *sorted(policies)]
  raise ValueError(
    f"residuals {residuals!r} is unknown; use one of {', '.join(known)},"
    f" or {_NAMES}A,B{_near(residuals, known)}"
  )


def jax_policies() -> dict[str, Policy]:
  """The policies of `jax.checkpoint_policies`, without the functions that only make some."""
  return {k: v for k, v in vars(jax.checkpoint_policies).items() if _is_policy(v)}


def _is_policy(function: Any) -> bool:
  """A policy is asked about every primitive, and so takes parameters of any name."""
  if not callable(function):
    return False
  parameters = inspect.signature(function).parameters.values()
  return any(p.kind is p.VAR_KEYWORD for p in parameters)


def _of_function(policy: Any) -> Residuals:
  name = getattr(policy, "__name__", type(policy).__name__)
  if not _is_policy(policy):
    raise ValueError(
      f"residuals {name} is no policy (primitive, *avals, **params) -> bool; what makes one, in"
      " jax.checkpoint_policies, must be called first"
    )
  return Residuals(name, policy)


def _of_names(residuals: str) -> Residuals:
  names = tuple(name.strip() for name in residuals.removeprefix(_NAMES).split(","))
  if not all(names):
    raise ValueError(f"residuals {residuals!r} has an empty name; write {_NAMES}A,B")
  policy = jax.checkpoint_policies.save_only_these_names(*names)
  return Residuals(residuals, policy, names=names)


def _watched(policy: Policy, met: set[str]) -> Policy:
  """The policy; names that it is asked about are added to `met`."""

  def watched(primitive: Any, *avals: Any, **params: Any) -> Any:
    if primitive.name == "name":
      met.add(params["name"])
    answer = policy(primitive, *avals, **params)
    # Saved values lie in rings on the device, whatever a policy says.
    if hasattr(answer, "dst"):
      raise ValueError(
        f"the residual policy moves {primitive.name} to {answer.dst}; use one that only keeps"
      )
    return answer

  return watched


def _near(name: str, known: Iterable[str]) -> str:
  near = difflib.get_close_matches(name, list(known), n=1)
  return f"; did you mean {near[0]}?" if near else ""
