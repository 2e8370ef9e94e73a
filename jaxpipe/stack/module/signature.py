"""Matches the parameters of a module's call with what a stack can give them.

People write the calls of their modules in many ways. A stack gives each parameter what its name
says, and refuses a parameter that it cannot serve instead of passing something else in its place:

    def __call__(self, x, mask, train=False):
                       |    |     |
                       |    |     whether the step trains: a mode flag, defaulted or not
                       |    an entry of the batch, by `jaxpipe.layer(module, mask="mask")`
                       what the module before returned
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from jaxpipe.stack.errors import StackError

Tree = Any

# Names by which modules take their mode -> the value that means training.
MODE_FLAGS = {
  "train": True,
  "training": True,
  "is_training": True,
  "deterministic": False,
  "use_running_average": False,
}

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclasses.dataclass(frozen=True)
class _Source:
  """Where the value of one parameter comes from.

  Attributes:
    kind: `stack` (what the stack passes in a row, such as x), `context`, `flag`, `entry` of the
      batch, or `default` of the parameter.
    value: the number among the stack's arguments, the flag's value in training, the entry's name,
      or the default.
  """

  kind: str
  value: Any = None


@dataclasses.dataclass(frozen=True)
class CallPlan:
  """Which arguments a module is called with, in terms of what a stack has.

  Attributes:
    positional: sources of the positional arguments, in order. Flags are among them where the
      signature allows it: `nn.remat(Block, static_argnums=(2,))` counts positions.
    keywords: sources of the arguments that are passed by name.
  """

  positional: tuple[_Source, ...]
  keywords: Mapping[str, _Source]

  @property
  def kinds(self) -> tuple[Any, ...]:
    """What every argument is, without the values of defaults, to compare with another plan."""
    named = sorted((name, source.kind, source.value) for name, source in self.keywords.items())
    values = [None if s.kind == "default" else s.value for s in self.positional]
    return (*zip((s.kind for s in self.positional), values, strict=True), *named)

  def arguments(
    self, training: bool, given: Sequence[Tree], context: Any = None, batch: Tree = None
  ) -> tuple[list[Any], dict[str, Any]]:
    """Returns the positional arguments and the keyword arguments of one call.

    Args:
      training: what mode flags say.
      given: the stack's own arguments: `(batch,)`, `(x,)` or `(x, batch)`.
      context: the layer's, for a call that takes one.
      batch: the microbatch's own inputs, of which entries are taken.
    """

    def value(source: _Source) -> Any:
      if source.kind == "stack":
        return given[source.value]
      if source.kind == "flag":
        return training is source.value
      if source.kind == "entry":
        return batch[source.value]
      return context if source.kind == "context" else source.value

    args = [value(source) for source in self.positional]
    return args, {name: value(source) for name, source in self.keywords.items()}


def plan_call(
  where: str,
  call: Callable[..., Any],
  *,
  arguments: int,
  bound: bool,
  entries: Mapping[str, str] | None = None,
  closed_flags: Collection[str] = (),
  context: bool = True,
  by_position: bool = False,
) -> CallPlan:
  """Reads the signature of a module's call.

  Args:
    where: how messages name the module, its place and its class.
    call: the function that is called; of a module its class's `__call__`.
    arguments: how many arguments the stack passes in a row: 1, x or the batch, or 2, x and the
      batch. A call that takes fewer is given fewer.
    bound: False where the first parameter of `call` is `self`.
    entries: name of a parameter -> the entry of the batch that it is given.
    closed_flags: mode flags that were set when the module was made, and are not passed.
    context: whether the module stands where a `Context` can be given, as a layer.
    by_position: whether a second required parameter of another name is the context, too, as in
      `LayerStack(layers=[...])`, which calls `layer(x, context)`; only `c`, `ctx` and names that
      begin with an underscore are taken for it.

  Raises:
    StackError: a required parameter for which the stack has nothing, or an entry for a parameter
      that does not exist; names it and says what to do.
  """
  parameters = _parameters(call, bound)
  wanted = dict(entries or {})
  # What a partial gives by name is given.
  closed_flags = {*closed_flags, *getattr(call, "keywords", {})}
  row = [p for p in parameters if p.kind in _POSITIONAL][:arguments]
  if not row and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
    raise StackError(
      f"{where} takes no argument; a module of a stack is called with what the one"
      " before it returns"
    )
  positional = [_Source("stack", i) for i in range(max(1, len(row)))]
  keywords: dict[str, _Source] = {}
  skipped: list[_Source] = []  # defaults between arguments that are given by position
  for parameter in parameters:
    if parameter in row or parameter.kind in _VARIADIC:
      continue
    source = _source(where, parameter, wanted, closed_flags, context, by_position)
    if parameter.kind in _POSITIONAL:
      skipped.append(source)
      if source.kind != "default":
        positional += skipped
        skipped = []
    elif source.kind != "default":
      keywords[parameter.name] = source
  if wanted and any(p.kind is p.VAR_KEYWORD for p in parameters):
    keywords |= {name: _Source("entry", entry) for name, entry in wanted.items()}
  elif wanted:
    name = next(iter(wanted))
    if any(p.name == name for p in row):
      raise StackError(f"{where}: {name} is what the module before returns, and no entry")
    known = ", ".join(p.name for p in parameters if p.kind not in _VARIADIC)
    raise StackError(f"{where} has no parameter {name}; it takes {known}")
  return CallPlan(tuple(positional), keywords)


def _source(
  where: str,
  parameter: inspect.Parameter,
  wanted: dict[str, str],
  closed_flags: Collection[str],
  context: bool,
  by_position: bool,
) -> _Source:
  """Where the value of a parameter behind the stack's own arguments comes from.

  Raises:
    StackError: it has no default, and a stack has nothing of its name.
  """
  name = parameter.name
  required = parameter.default is parameter.empty
  if name in wanted:
    return _Source("entry", wanted.pop(name))
  shortened = by_position and required and (name in ("c", "ctx") or name.startswith("_"))
  if context and (name == "context" or shortened):
    return _Source("context")
  if name in MODE_FLAGS and name not in closed_flags:
    return _Source("flag", MODE_FLAGS[name])
  if not required:
    return _Source("default", parameter.default)
  if name in MODE_FLAGS:  # set when the module was made, and required by its call all the same
    return _Source("flag", MODE_FLAGS[name])
  if not context:
    raise StackError(f"{where} needs {name}, which a stack does not give; give it a default")
  raise StackError(
    f"{where} needs {name}, which a stack does not give: jaxpipe.layer(module, {name}=ENTRY) takes"
    f" it from the batch, and a parameter named context is given the layer's Context"
  )


def _parameters(call: Callable[..., Any], bound: bool) -> list[inspect.Parameter]:
  """The parameters of a call without `self`; of a function that does not say, x alone."""
  try:
    parameters = list(inspect.signature(call).parameters.values())
  except (TypeError, ValueError):  # some built-in functions have no signature
    return [inspect.Parameter("x", inspect.Parameter.POSITIONAL_ONLY)]
  if not bound and parameters and parameters[0].kind in _POSITIONAL:
    return parameters[1:]
  return parameters
