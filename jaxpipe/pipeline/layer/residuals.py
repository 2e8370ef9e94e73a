"""Residual policies: which values F keeps for the backward pass; the rest is computed again.

A residual is an intermediate value of the forward pass that the backward pass reads. A schedule
holds the residuals of every microbatch in flight, so they are most of a pipeline's memory, and the
policy trades them for arithmetic. It is, as for `jax.checkpoint`, a predicate that is asked about
every equation of a layer's forward: whether its outputs may be kept. These can be asked for:

    full                         the stage's input alone
    dots                         results of matmuls with weights, and of sums and exchanges over
                                 the mesh; never attention scores
    selective                    all but attention's scores, what is computed of them at their
                                 size, and what was gathered (Korthikanti et al., arXiv:2205.05198)
    all                          whatever `jax.vjp` keeps
    nothing_saveable, ...        a policy of `jax.checkpoint_policies`; this one keeps each layer's
                                 input
    names:attention,mlp_up       values named with `jax.ad_checkpoint.checkpoint_name`
    a function                   `policy(primitive, *avals, **params) -> bool`
    auto                         `dots` for layers that are alike, `full` for unlike stages
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

# A matmul with a weight has no batch dims; attention's products have those of rows and heads.
_WEIGHTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
# Sums and exchanges over the mesh are kept, so that none is done twice. What was gathered is larger
# than the shards that it was made of, and is gathered again.
_SENT = ("psum", "psum_invariant", "reduce_scatter", "all_to_all")
_NAMES = "names:"
# The default: `dots`, or `full` for stages that are not alike (`device/build.py`).
AUTO = "auto"


def _dots(primitive: Any, *avals: Any, **params: Any) -> Any:
  """The policy `dots`: keeps matmuls with weights, and sums and exchanges over the mesh."""
  return primitive.name in _SENT or _WEIGHTS(primitive, *avals, **params)


class _Selective:
  """The policy `selective`: keeps all but attention's scores, values of their size, and gathers.

  A product counts as attention scores if it has at least two batch dims (rows and heads) and is
  larger than either of its factors. Which sizes scores have is found out while a layer is traced:
  JAX asks about equations in their order, so scores are met before anything that reads them. An
  object is therefore good for one layer only.

  Attributes:
    _scores: dims of the scores met so far, as `_dims` gives them.
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
    # Softmax, masks and dropout read something of the scores' size, whatever its order of dims.
    read = {_dims(aval.shape) for aval in avals if hasattr(aval, "shape")}
    return primitive.name != "all_gather" and not read & self._scores


def _dims(shape: tuple[int, ...]) -> tuple[int, ...]:
  """Returns the dims of a shape larger than 1 in ascending order, equal for all transposes."""
  return tuple(sorted(n for n in shape if n > 1))


def _product(
  a: tuple[int, ...], b: tuple[int, ...], *, dimension_numbers: Any, **_: Any
) -> tuple[int, ...]:
  """Returns the shape of a `dot_general` of two arrays of these shapes."""
  (of_a, of_b), (batch_a, batch_b) = dimension_numbers
  rest_a = [n for i, n in enumerate(a) if i not in (*of_a, *batch_a)]
  rest_b = [n for i, n in enumerate(b) if i not in (*of_b, *batch_b)]
  return (*(a[i] for i in batch_a), *rest_a, *rest_b)


@dataclasses.dataclass(frozen=True)
class Residuals:
  """A residual policy, as this module's docstring lists them.

  Attributes:
    name: the policy's name, or the name of the function that was given.
    layer: the `jax.checkpoint` policy under which each layer is differentiated; None keeps all that
      `jax.vjp` keeps.
    factory: makes a fresh policy for each layer that is traced, where the policy remembers what it
      was asked (`_Selective`); None where `layer` itself is used. `layer` is then the policy for
      whoever differentiates many layers under one policy, which is the reference.
    stage_input: keep the stage's input alone and run the stage's forward again before its backward.
      `layer` then says what this second forward keeps.
    names: the `checkpoint_name`s of the values to keep; empty for a policy that does not go by
      names.
  """

  name: str
  layer: Policy | None
  factory: Callable[[], Policy] | None = None
  stage_input: bool = False
  names: tuple[str, ...] = ()

  def traced(self, trace: Callable[[Policy | None], Out]) -> Out:
    """Traces a derivative under this policy, and refuses names that no value there bears.

    Args:
      trace: traces the derivative of a layer, or of several, under the `jax.checkpoint` policy that
        it is given; None keeps all.

    Returns:
      `trace`'s own result.

    Raises:
      ValueError: nothing that is differentiated bears one of `names`, or the policy would move a
        value to another memory.
    """
    if self.layer is None:
      return trace(None)
    seen: set[str] = set()
    out = trace(_watched(self.factory() if self.factory else self.layer, seen))
    # A misspelt name would keep nothing and only be slow, so it is an error.
    for name in self.names:
      if name not in seen:
        there = f"there are {', '.join(sorted(seen))}" if seen else "there are none"
        raise ValueError(
          f"residuals {self.name!r}: no checkpoint_name in the layer is {name!r}; {there}"
          f"{_near(name, seen)}"
        )
    return out


POLICIES = {
  "dots": Residuals("dots", _dots),
  "selective": Residuals("selective", _dots, factory=_Selective),
  "all": Residuals("all", None),
  # The second forward keeps `dots`, in cells that live inside one action. Under `all`, the
  # attention scores of all the stage's layers could need more than keeping every microbatch's
  # matmuls does.
  "full": Residuals("full", _dots, stage_input=True),
}


def residual_policy(residuals: str | Policy, auto: str = "dots") -> Residuals:
  """Returns the policy that a name or a function stands for.

  Args:
    residuals: a name or a function of the list in this module's docstring.
    auto: the policy that `auto` stands for: `dots` for layers that are alike, `full` for stages
      that are not.

  Raises:
    ValueError: an unknown name, `names:` without names, or an object that is not a policy.
  """
  if not isinstance(residuals, str):
    return _of_function(residuals)
  if residuals.startswith(_NAMES):
    return _of_names(residuals)
  if residuals == AUTO:
    residuals = auto
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
  """Returns the policies of `jax.checkpoint_policies` by name, without what only makes policies."""
  return {k: v for k, v in vars(jax.checkpoint_policies).items() if _is_policy(v)}


def _is_policy(function: Any) -> bool:
  """Tells a policy from a function that makes one: a policy takes parameters of any name."""
  if not callable(function):
    return False
  parameters = inspect.signature(function).parameters.values()
  return any(p.kind is p.VAR_KEYWORD for p in parameters)


def _of_function(policy: Any) -> Residuals:
  """Returns the policy that a function is, or raises ValueError if it cannot be one."""
  name = getattr(policy, "__name__", type(policy).__name__)
  if not _is_policy(policy):
    raise ValueError(
      f"residuals {name} is no policy (primitive, *avals, **params) -> bool; what makes one, in"
      " jax.checkpoint_policies, must be called first"
    )
  return Residuals(name, policy)


def _of_names(residuals: str) -> Residuals:
  """Returns the policy that `names:A,B` stands for."""
  names = tuple(name.strip() for name in residuals.removeprefix(_NAMES).split(","))
  if not all(names):
    raise ValueError(f"residuals {residuals!r} has an empty name; write {_NAMES}A,B")
  policy = jax.checkpoint_policies.save_only_these_names(*names)
  return Residuals(residuals, policy, names=names)


def _watched(policy: Policy, seen: set[str]) -> Policy:
  """Returns the policy, wrapped so that every `checkpoint_name` it is asked about joins `seen`."""

  def watched(primitive: Any, *avals: Any, **params: Any) -> Any:
    if primitive.name == "name":
      seen.add(params["name"])
    answer = policy(primitive, *avals, **params)
    # Saved values lie in pools on the device; a policy that offloads them would be ignored.
    if hasattr(answer, "dst"):
      raise ValueError(
        f"the residual policy moves {primitive.name} to {answer.dst}; use one that only keeps"
      )
    return answer

  return watched


def _near(name: str, known: Iterable[str]) -> str:
  """Returns "; did you mean ...?" for the closest of the known names, or nothing."""
  near = difflib.get_close_matches(name, list(known), n=1)
  return f"; did you mean {near[0]}?" if near else ""
