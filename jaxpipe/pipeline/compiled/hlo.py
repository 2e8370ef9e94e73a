"""Reads XLA's text of an optimized program: computations, instructions, who calls whom.

A compiled program says everything about itself in `compiled.as_text()` and almost nothing through
an API. Only what `compiled.py` asks for is read; the text has no promised format, so whatever is
not understood is left out rather than guessed.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_BITS = re.compile(r"[a-z]+(\d+)")
_NAME = re.compile(r"%([\w.\-]+)")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"?(\d+)')
_INDEX = re.compile(r"\bindex=(\d+)")
_CALLED = re.compile(
  r"\b(body|condition|to_apply|calls|true_computation|false_computation|branch_computations)="
  r"(\{[^}]*\}|%[\w.\-]+)"
)
# What the TPU compiler writes where its cost model knows nothing.
_NO_ESTIMATE = 2**62

# The roles under which an instruction runs scheduled instructions. What a fusion `calls`, or what a
# reduction is `to_apply`, is no program of its own.
_RUNS = {
  "while": ("condition", "body"),
  "conditional": ("branch_computations", "true_computation", "false_computation"),
  "call": ("to_apply", "calls"),
  "call-start": ("to_apply", "calls"),
  "async-start": ("calls", "to_apply"),
}


@dataclasses.dataclass(frozen=True)
class Shape:
  """Type of one array, in XLA's words.

  Attributes:
    dtype: such as `bf16`, `f32`, `s32`, `pred`.
    dims: without the layout.
  """

  dtype: str
  dims: tuple[int, ...]

  @classmethod
  def of(cls, dtype: object, dims: tuple[int, ...]) -> Shape:
    """The shape of a NumPy or JAX array."""
    return cls(_dtype_name(np.dtype(dtype)), tuple(dims))  # type: ignore[call-overload]

  @property
  def size(self) -> int:
    """Number of elements."""
    return math.prod(self.dims)

  @property
  def bytes(self) -> int:
    """What it holds, without what tiles add; nothing for what is no array, such as a token."""
    bits = _BITS.match(self.dtype)
    width = int(bits[1]) if bits else 8 * (self.dtype == "pred")
    return -(-self.size * width // 8)

  def __str__(self) -> str:
    return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name, opcode: as in the text.
    shapes: of the result; of a tuple, one for each array in it.
    layout: of the result's first array, with its type: dims from minor to major, tiles, memory.
    operands: names of its operands.
    literal: what stands in the parentheses, such as the value of a constant.
    called: computations that it runs, by attribute (`body`, `calls`, ...), in order.
    op_name: where it came from: the path of JAX's name scopes; empty if the compiler made it.
    cycles: the compiler's estimate, None if it gives none.
    trips: iterations of a loop, where the text says so.
    index: of a `get-tuple-element`.
    target: of a custom call.
    attributes: what stands behind the operands, as in the text.
    root: whether it is the computation's result.
  """

  name: str
  opcode: str
  shapes: tuple[Shape, ...]
  layout: str
  operands: tuple[str, ...]
  literal: str
  called: tuple[tuple[str, str], ...]
  op_name: str
  cycles: int | None
  trips: int | None
  index: int | None
  target: str
  attributes: str
  root: bool

  @property
  def runs(self) -> tuple[str, ...]:
    """Names of the computations whose instructions it executes one by one."""
    roles = _RUNS.get(self.opcode, ())
    return tuple(name for role, name in self.called if role in roles)

  @property
  def holds(self) -> tuple[str, ...]:
    """The same, and of a fusion what it fuses."""
    if self.opcode == "fusion":
      return tuple(name for role, name in self.called if role == "calls")
    return self.runs


@dataclasses.dataclass(frozen=True)
class Computation:
  """Instructions in the order in which they were scheduled.

  Attributes:
    name: as in the text.
    instructions: by name, in order.
  """

  name: str
  instructions: Mapping[str, Instruction]

  def __iter__(self) -> Iterator[Instruction]:
    return iter(self.instructions.values())

  @property
  def root(self) -> Instruction:
    """Its result."""
    return next(i for i in self if i.root)


@dataclasses.dataclass(frozen=True)
class Module:
  """A whole program.

  Attributes:
    computations: by name.
    entry: name of the one that runs first.
  """

  computations: Mapping[str, Computation]
  entry: str

  def __getitem__(self, name: str) -> Computation:
    return self.computations[name]


@dataclasses.dataclass(frozen=True)
class Visit:
  """An instruction that runs, and what it stands in.

  Attributes:
    instruction, computation: the instruction, and where it is scheduled.
    loops: number of loops round it.
    conditional: name of the outermost conditional round it, if any.
  """

  instruction: Instruction
  computation: Computation
  loops: int
  conditional: str | None


def visits(module: Module) -> Iterator[Visit]:
  """Yields every instruction that is scheduled by itself, once for each kind of surroundings."""
  seen: set[tuple[str, bool, str | None]] = set()
  todo: list[tuple[str, int, str | None]] = [(module.entry, 0, None)]
  while todo:
    name, loops, conditional = todo.pop()
    if (name, loops > 0, conditional) in seen:
      continue
    seen.add((name, loops > 0, conditional))
    for one in module[name]:
      yield Visit(one, module[name], loops, conditional)
      outer = conditional or (one.name if one.opcode == "conditional" else None)
      todo += [(inner, loops + (one.opcode == "while"), outer) for inner in one.runs]


@dataclasses.dataclass(frozen=True)
class Entered:
  """One step on the way from the entry computation down to an instruction.

  Attributes:
    instruction: a loop, a conditional, a call or a fusion.
    where: name of the computation that it stands in.
    into: name of the computation that it runs.
  """

  instruction: Instruction
  where: str
  into: str


def walk(
  module: Module, name: str = "", way: tuple[Entered, ...] = ()
) -> Iterator[tuple[Instruction, Computation, tuple[Entered, ...]]]:
  """Yields every instruction that runs, those inside fusions too, where it stands, and the way.

  Unlike `visits`, once for every way there is: a computation that stands in several places runs in
  all of them.

  Args:
    module: the program.
    name, way: the computation to begin with, and the way there; default, the entry.
  """
  here = module[name or module.entry]
  for one in here:
    yield one, here, way
    for into in one.holds:
      if into in module.computations:
        yield from walk(module, into, (*way, Entered(one, here.name, into)))


def parse(text: str) -> Module:
  """Returns the program that `compiled.as_text()` describes.

  Raises:
    ValueError: the text has no entry computation.
  """
  computations: dict[str, dict[str, Instruction]] = {}
  entry, inside = "", None
  for line in text.splitlines():
    if header := _COMPUTATION.match(line):
      inside = computations.setdefault(header[2], {})
      entry = header[2] if header[1] else entry
    elif line.startswith("}"):
      inside = None
    elif inside is not None and (found := _instruction(line)):
      inside[found.name] = found
  if not entry:
    raise ValueError("no ENTRY computation in the text; pass compiled.as_text()")
  return Module({name: Computation(name, body) for name, body in computations.items()}, entry)


def _instruction(line: str) -> Instruction | None:
  head = _INSTRUCTION.match(line)
  if not head:
    return None
  kind, rest = _type(line[head.end() :])
  opcode = _OPCODE.match(rest)
  if not opcode:
    return None
  end = _closing(rest, opcode.end() - 1)
  inner, attributes = rest[opcode.end() : end], rest[end + 1 :]
  cycles = _number(_CYCLES, attributes)
  target = re.search(r'custom_call_target="([^"]*)"', attributes)
  name = _OP_NAME.search(attributes)
  return Instruction(
    name=head[2],
    opcode=opcode[1],
    shapes=_shapes(kind),
    layout=kind.lstrip("(").split(" ")[0].rstrip(","),
    operands=tuple(_NAME.findall(inner)),
    literal=inner,
    called=tuple(
      (role, one) for role, names in _CALLED.findall(attributes) for one in _NAME.findall(names)
    ),
    op_name=name[1] if name else "",
    cycles=None if cycles is None or cycles >= _NO_ESTIMATE else cycles,
    trips=_number(_TRIPS, attributes),
    index=_number(_INDEX, attributes),
    target=target[1] if target else "",
    attributes=attributes,
    root=bool(head[1]),
  )


def _shapes(text: str) -> tuple[Shape, ...]:
  arrays = _ARRAY.findall(text)
  return tuple(Shape(dtype, tuple(map(int, filter(None, d.split(","))))) for dtype, d in arrays)


def _type(text: str) -> tuple[str, str]:
  """The result's type, which is an array or a tuple in parentheses, and what follows it."""
  end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
  return text[:end], text[end:]


def _closing(text: str, start: int) -> int:
  """Where the parenthesis that opens at `start` closes: layouts have some of their own."""
  depth = 0
  for at in range(start, len(text)):
    depth += (text[at] == "(") - (text[at] == ")")
    if not depth:
      return at
  return len(text)


def _number(pattern: re.Pattern[str], text: str) -> int | None:
  found = pattern.search(text)
  return int(found[1]) if found else None


def _dtype_name(dtype: np.dtype) -> str:
  short = {"bool": "pred", "bfloat16": "bf16"}
  if dtype.name in short:
    return short[dtype.name]
  if dtype.name.startswith("float8"):
    return "f8" + dtype.name.removeprefix("float8_")
  letter = {"f": "f", "i": "s", "u": "u", "c": "c"}[dtype.kind]
  return f"{letter}{dtype.itemsize * 8}"
