"""The program of one device: loops over the variables that it holds, and the numbers between them.

Variables whose local programs are the same are one *group*, and one loop goes over those of them
that lie on this device: its body reads one variable, computes, and writes the results in place.
Nothing as large as the model is made beside arguments and results, whatever the number of layers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpipe.parallel import axes as axis
from jaxpipe.parallel.mesh import STAGE
from jaxpipe.pipeline.update.cuts import BlockCut, Cut, SpanCut
from jaxpipe.pipeline.update.dataflow import Constant
from jaxpipe.pipeline.update.division import Division, Local
from jaxpipe.pipeline.update.lots import apart, in_order, needed, small_values
from jaxpipe.pipeline.update.pieces import Piece, evaluate, piece, whole
from jaxpipe.pipeline.update.slots import Slot, SlotsLayout
from jaxpipe.pipeline.update.variables import Variable, Variables

Tree = Any
# Role of an array of a variable: ("tree", name of the placed tree) or ("slot", part, number).
Role = tuple[Any, ...]
UPDATES: Role = ("tree", "updates")
# Results of a variable of so many elements are computed one at a time, those of a smaller one at
# once, which is less to compile.
LARGE = 1 << 10


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
  """Variables of one array with one local program.

  Attributes:
    locals: the program of each.
    numbers: which of them a device holds, int32 [P, n], filled up with 0.
    counts: how many, int32 [P].
  """

  locals: tuple[Local, ...]
  numbers: np.ndarray
  counts: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Update:
  """A transformation over the variables of a stack, ready to run inside `shard_map`.

  Attributes:
    variables: of the stack.
    layouts: of each placed part of the state.
    division: the transformation's operations.
    roles: for each variable, the numbers of its slots in each part: ("slot", part, n) -> slot.
  """

  variables: Variables
  layouts: tuple[SlotsLayout, ...]
  division: Division
  roles: tuple[Mapping[Role, Slot], ...]

  def __call__(
    self,
    trees: Mapping[str, Mapping[str, jax.Array]],
    parts: Sequence[Mapping[str, jax.Array]],
    values: Mapping[int, jax.Array],
  ) -> tuple[dict[str, jax.Array], list[dict[str, jax.Array]], list[jax.Array]]:
    """Runs the transformation on this device's arrays.

    Args:
      trees: name of a placed tree -> name of an array -> this device's part. That of `updates` is
        where updates are written.
      parts: for each placed part of the state, name of an array -> this device's part.
      values: the inputs that belong to no variable, by their numbers.

    Returns:
      Updates and parts of the state, in place of the given ones; and the other results.
    """
    shared = {**self.division.flow.given, **values}
    self._run_shared(shared)
    for locals_, exports in zip(self.division.passes, self.division.exports, strict=False):
      self._export(locals_, exports, trees, parts, shared)
      self._run_shared(shared)
    written = {"updates": dict(trees.get("updates", {}))}
    state = [dict(part) for part in parts]
    for group in self._groups(self.division.passes[-1]):
      self._write(group, {**trees, **written}, state, shared)
    results = [
      jnp.asarray(ref.value) if isinstance(ref, Constant) else shared[ref]
      for ref in self.division.results
    ]
    return written["updates"], state, results

  # The shared program

  def _run_shared(self, shared: dict[int, Any]) -> None:
    """Runs what of the shared program can run by now."""
    for operation in self.division.shared:
      refs = [ref for ref in operation.ins if not isinstance(ref, Constant)]
      if operation.outs[0] in shared or any(ref not in shared for ref in refs):
        continue
      args = [ref.value if isinstance(ref, Constant) else shared[ref] for ref in operation.ins]
      shared.update(zip(operation.outs, operation.run(*args), strict=True))

  # Groups

  def _groups(self, locals_: Sequence[Local]) -> list[Group]:
    """The local programs of a pass, those alike together."""
    alike: dict[Any, list[Local]] = {}
    for one in locals_:
      variable = self.variables.each[one.variable]
      lies = [
        (role, slot.array, slot.shape, slot.like)
        for role, slot in self.roles[one.variable].items()
        if role in one.reads or role in dict(one.outs)
      ]
      key = (variable.array, variable.shape, tuple(lies), one.text)
      alike.setdefault(key, []).append(one)
    return [self._group(members) for members in alike.values()]

  def _group(self, members: list[Local]) -> Group:
    """One group, with the table of which device holds which members."""
    held: list[list[int]] = [[] for _ in range(self.variables.devices)]
    for i, one in enumerate(members):
      variable = self.variables.each[one.variable]
      if variable.row is not None:
        home = variable.row // self.variables.rows
        for members_here in held if variable.everywhere else held[home : home + 1]:
          members_here.append(i)
    width = max(1, *map(len, held))
    numbers = np.array([row + [0] * (width - len(row)) for row in held], np.int32)
    return Group(tuple(members), numbers, np.array([len(row) for row in held], np.int32))

  def _first(self, group: Group) -> Variable:
    return self.variables.each[group.locals[0].variable]

  def _loop(self, group: Group, body: Any, carry: Any) -> Any:
    """Runs `body(member, carry)` for the members on this device; a member is int32 []."""
    if self._first(group).row is None:
      return body(jnp.int32(0), carry)
    here = axis.index(STAGE)
    numbers, counts = jnp.asarray(group.numbers), jnp.asarray(group.counts)
    if (group.counts == 1).all():
      return body(numbers[here, 0], carry)
    count = counts[here]
    return lax.fori_loop(0, count, lambda i, carry: body(numbers[here, i], carry), carry)

  # One variable

  def _cut(self, variable: Variable, row: Any, offset: Any) -> Cut:
    """How a variable lies, as it stands in this row of this device."""
    spec = self.variables.spec(variable)
    if variable.offset is None:
      return BlockCut(variable.shape, spec, row)
    width = self.variables.arrays[variable.array].shape[-1]
    n = math.prod(axis.size(name) for name in SpanCut((), spec, 0, 0, 0).axes)
    return SpanCut(variable.shape, spec, width // n, row, offset)

  def _slot_cut(self, variable: Variable, role: Role, slot: Slot, row: Any, offset: Any) -> Cut:
    """How a slot lies that has not the variable's shape."""
    layout = self.layouts[role[1]]
    spec = layout.specs[slot.array]
    if variable.row is not None:
      spec = jax.sharding.PartitionSpec(*spec[1:])
    if slot.offset is None:
      return BlockCut(slot.shape, spec, row)
    width = layout.arrays[slot.array].shape[-1]
    n = math.prod(axis.size(name) for name in SpanCut((), spec, 0, 0, 0).axes)
    return SpanCut(slot.shape, spec, width // n, row, offset)

  def _cuts(self, group: Group, member: Any) -> tuple[Cut, dict[Role, Cut]]:
    """How the variable of a member lies, and its slots of other shapes."""
    variables = [self.variables.each[one.variable] for one in group.locals]
    first = variables[0]

    def of_member(numbers: Sequence[int | None]) -> Any:
      if numbers[0] is None:
        return None
      return jnp.asarray(np.array(numbers, np.int32))[member]

    row = of_member(
      [v.row if v.row is None or v.everywhere else v.row % self.variables.rows for v in variables]
    )
    cut = self._cut(first, row, of_member([v.offset for v in variables]))
    slots = {}
    for role, slot in self.roles[group.locals[0].variable].items():
      if not slot.like:
        offsets = [self.roles[one.variable][role].offset for one in group.locals]
        slots[role] = self._slot_cut(first, role, slot, row, of_member(offsets))
    return cut, slots

  def _compute(
    self,
    group: Group,
    member: Any,
    cuts: tuple[Cut, dict[Role, Cut]],
    array_of: Any,
    shared: Mapping[int, Any],
    refs: Sequence[Any],
    known: Mapping[int, jax.Array] | None = None,
  ) -> list[Any]:
    """Values of a member's local program.

    Args:
      group: the member's.
      member: int32 [].
      cuts: how its variable lies, and its slots of other shapes.
      array_of: role -> the array that it stands for.
      shared: values of the shared program.
      refs: values or constants of the local program.
      known: values that have been computed before.
    """
    one, variable = group.locals[0], self._first(group)
    operations, used = needed(one, refs, known or {})
    cut, slots = cuts
    split = math.prod(variable.shape) > 1
    values: dict[int, Any] = dict(known or {})
    for role, number in one.reads.items():
      if number in used:
        own = slots.get(role, cut)
        read = own.read(array_of(role))
        whole_read = role in slots or not split
        values[number] = own.gather(read) if whole_read else Piece(read, variable.shape)
    for i, number in enumerate(one.imports):
      numbers = [other.imports[i] for other in group.locals]
      if all(n == number for n in numbers):
        values[number] = shared[number]
      else:
        values[number] = jnp.stack([jnp.asarray(shared[n]) for n in numbers])[member]
    evaluate(operations, values, cut, variable.shape, self.division.flow.avals)
    return [ref.value if isinstance(ref, Constant) else values[ref] for ref in refs]

  def _array_name(self, variable: int, role: Role) -> str:
    """Name of the placed array that holds what a role means for a variable."""
    if role[0] == "tree":
      return self.variables.each[variable].array
    return self.roles[variable][role].array

  # Passes

  def _export(
    self,
    locals_: Sequence[Local],
    exports: Sequence[tuple[int, int]],
    trees: Mapping[str, Mapping[str, jax.Array]],
    parts: Sequence[Mapping[str, jax.Array]],
    shared: dict[int, Any],
  ) -> None:
    """Computes the numbers that a pass exports, and hands them to all devices."""
    avals = self.division.flow.avals
    places: list[tuple[str, int]] = []
    counts: dict[str, int] = {}
    for _, v in exports:
      dtype = str(_summed(avals[v].dtype))
      places.append((dtype, counts.get(dtype, 0)))
      counts[dtype] = counts.get(dtype, 0) + 1
    totals = {dtype: jnp.zeros(n, dtype) for dtype, n in counts.items()}
    for group in self._groups(locals_):
      variable = self._first(group)
      # What lies on every device along `stage` is counted once.
      mine = axis.index(STAGE) == 0 if variable.everywhere else True

      def body(member: Any, totals: Any, group: Group = group, mine: Any = mine) -> Any:
        def array_of(role: Role) -> jax.Array:
          name = self._array_name(group.locals[0].variable, role)
          return trees[role[1]][name] if role[0] == "tree" else parts[role[1]][name]

        cuts = self._cuts(group, member)
        refs = [ref for _, ref in group.locals[0].outs]
        outs = self._compute(group, member, cuts, array_of, shared, refs)
        totals = dict(totals)
        for i, out in enumerate(outs):
          dtype, _ = places[group.locals[0].outs[i][0]]
          at = jnp.asarray([places[one.outs[i][0]][1] for one in group.locals])[member]
          number = jnp.reshape(whole(out, cuts[0]), ()).astype(dtype)
          totals[dtype] = totals[dtype].at[at].set(jnp.where(mine, number, 0))
        return totals

      totals = self._loop(group, body, totals)
    summed = {dtype: axis.total(total, STAGE) for dtype, total in totals.items()}
    for (_, v), (dtype, i) in zip(exports, places, strict=True):
      shared[v] = summed[dtype][i].astype(avals[v].dtype).reshape(avals[v].shape)

  def _write(
    self,
    group: Group,
    trees: Mapping[str, Any],
    state: list[dict[str, jax.Array]],
    shared: Mapping[int, Any],
  ) -> None:
    """Computes the results of a group's variables and writes them where they lie."""
    first, shape = group.locals[0].variable, self._first(group).shape
    slots = self.roles[first]
    targets = [_target(role, self._array_name(first, role)) for role, _ in group.locals[0].outs]
    names = list(dict.fromkeys(targets))

    def arrays_of(part: int) -> dict[str, jax.Array]:
      return trees["updates"] if part < 0 else state[part]

    def body(member: Any, carry: Sequence[jax.Array]) -> list[jax.Array]:
      now = dict(zip(names, carry, strict=True))
      cut, others = self._cuts(group, member)

      def array_of(role: Role) -> jax.Array:
        name = self._array_name(first, role)
        if role[0] == "tree":
          return trees[role[1]][name]
        return now.get((role[1], name), arrays_of(role[1])[name])

      def pieces(wanted: Sequence[int]) -> list[jax.Array]:
        """What is written of some results, in the dtypes of their arrays."""
        refs = [group.locals[0].outs[i][1] for i in wanted]
        outs = self._compute(group, member, (cut, others), array_of, shared, refs, known)
        found = []
        for i, out in zip(wanted, outs, strict=True):
          role = group.locals[0].outs[i][0]
          if role in others:
            own = others[role].cut(jnp.broadcast_to(whole(out, cut), slots[role].shape))
          else:
            own = piece(out, shape, cut)
          own_cut = others.get(role, cut)
          found.append(own_cut.merged(now[targets[i]], own))
        return found

      def small(value: int) -> list[jax.Array]:
        """A value of the local program that is smaller than the variable."""
        outs = self._compute(group, member, (cut, others), array_of, shared, [value], known)
        return [whole(out, cut) for out in outs]

      ticket: Any = axis.index(STAGE)
      known: dict[int, jax.Array] = {}
      one = group.locals[0]
      large = math.prod(shape) >= LARGE
      for value in small_values(one, self.division.flow.avals) if large else ():
        outs, ticket = apart(ticket, functools.partial(small, value))
        known[value] = outs[0]
      for wanted in in_order(one) if large else [range(len(one.outs))]:
        if self._first(group).row is None:
          outs = pieces(wanted)
        else:
          outs, ticket = apart(ticket, functools.partial(pieces, wanted))
        for i, out in zip(wanted, outs, strict=True):
          own_cut = others.get(group.locals[0].outs[i][0], cut)
          now[targets[i]] = own_cut.write(now[targets[i]], out)
      return [now[target] for target in names]

    done = self._loop(group, body, [arrays_of(part)[name] for part, name in names])
    for (part, name), array in zip(names, done, strict=True):
      arrays_of(part)[name] = array


def _target(role: Role, name: str) -> tuple[int, str]:
  """Where the array of a result is: number of the part of the state, or -1; and its name."""
  return (role[1] if role[0] == "slot" else -1), name


def _summed(dtype: Any) -> Any:
  """The dtype in which numbers of a dtype are added up over devices."""
  return jnp.dtype(jnp.int32) if dtype == jnp.bool else dtype
