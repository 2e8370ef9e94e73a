"""Parses the text of an optimized HLO module, the only full record of what XLA compiled.

A compiled program says everything about itself in `compiled.as_text()` and almost nothing through
an API. The text lists computations, and a computation lists its instructions in the order in which
they were scheduled. Loops, conditionals, calls and fusions name the computations that they run:

    %body (arg: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
      %x = f32[4,8]{1,0:T(8,128)} get-tuple-element(%arg), index=1
      ROOT %out = (s32[], f32[4,8]{1,0}) tuple(%i, %x), metadata={op_name="jit(step)/F/add"}
    }

    ENTRY %main (p: f32[4,8]) -> f32[4,8] {
      %loop = (s32[], f32[4,8]{1,0}) while(%init), condition=%more, body=%body
    }

`parse` returns it as an `HloModule` of `Computation`s of `Instruction`s; `walk.py` goes through the
instructions that run. The format of the text is not promised. Only the fields that this folder uses
are read, and a line that is not understood is left out rather than guessed at.

Reference: XLA's operation semantics, https://openxla.org/xla/operation_semantics.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.typing import DTypeLike

# The first line of a computation. XLA can print names with or without the `%`.
#     %body (arg: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
#     ENTRY %main (p: f32[4,8]) -> f32[4,8] {
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")

# An instruction, up to the type of its result; ROOT marks the result of the computation.
#     %x = f32[4,8]{1,0} ...
#     ROOT %out = (s32[], f32[4,8]{1,0}) ...
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")

# The opcode, which follows the result's type and precedes the operands.
#     get-tuple-element(%arg), index=1
#     add(%a, %b)
_OPCODE = re.compile(r"\s*([\w\-]+)\(")

# One array in a type: dtype and dims. The layout in braces that may follow is skipped.
#     bf16[4,8]{1,0:T(8,128)(2,1)S(1)}     -> bf16, "4,8"
#     (s32[], /*index=1*/f32[6]{0})        -> s32, "" and f32, "6"
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")

# The width of an element: 16 in bf16, 8 in f8e4m3fn; `pred` and `token` have none.
_BITS = re.compile(r"[a-z]+(\d+)")

# A reference to an instruction or a computation.
_NAME = re.compile(r"%([\w.\-]+)")

# Where JAX traced the instruction, as the path of its name scopes; quotes inside are escaped.
#     metadata={op_name="jit(step)/while/body/F/cond/branch_1_fun/dot_general" stack_frame_id=3}
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')

# The TPU compiler's estimate, and the length of a loop. Both numbers may stand in quotes or not.
#     backend_config={"window_config":{"estimated_cycles":"100"}}
#     backend_config={"known_trip_count":{"n":"6"}}
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"?(\d+)')

# The computations that an instruction runs, each with its role.
#     while(%init), condition=%more, body=%body
#     conditional(%index, %a, %b), branch_computations={%idle, %work}
_CALLED = re.compile(
  r"\b(body|condition|to_apply|calls|true_computation|false_computation|branch_computations)="
  r"(\{[^}]*\}|%[\w.\-]+)"
)

# The kernel or library function that a custom call stands for.
#     custom-call(), custom_call_target="AllocateBuffer"
_TARGET = re.compile(r'custom_call_target="([^"]*)"')

# The TPU compiler writes the largest int64 for an instruction that its cost model does not know.
_NO_ESTIMATE = 2**62

# The roles of the computations whose instructions are scheduled one by one: not what a fusion
# `calls`, since a fusion is scheduled whole, nor a reduction's operator (`to_apply`).
_RUNS = {
  "while": ("condition", "body"),
  "conditional": ("branch_computations", "true_computation", "false_computation"),
  "call": ("to_apply", "calls"),
  "call-start": ("to_apply", "calls"),
  "async-start": ("calls", "to_apply"),
}


@dataclasses.dataclass(frozen=True)
class Shape:
  """Dtype and dims of one array, as XLA names them.

  Attributes:
    dtype: XLA's name of the element type, such as `bf16`, `f32`, `s32`, `pred`.
    dims: sizes of the dims, major to minor as JAX sees them; empty for a scalar.
  """

  dtype: str
  dims: tuple[int, ...]

  @classmethod
  def of(cls, dtype: DTypeLike, dims: tuple[int, ...]) -> Shape:
    """Returns the shape of a NumPy or JAX array with this dtype and these dims."""
    return cls(_dtype_name(np.dtype(dtype)), tuple(dims))

  @property
  def size(self) -> int:
    """Number of elements."""
    return math.prod(self.dims)

  @property
  def bytes(self) -> int:
    """Bytes of the elements, without the padding of tiles; 0 for a type that is no array."""
    bits = _BITS.match(self.dtype)
    width = int(bits[1]) if bits else 8 * (self.dtype == "pred")
    return -(-self.size * width // 8)  # rounded up: elements may be narrower than a byte

  def __str__(self) -> str:
    return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name: unique in its computation, without the `%`.
    opcode: such as `fusion`, `while`, `all-reduce-start`.
    shapes: the result's array; for a tuple, one shape for each array in it, nested ones included.
    layout: type of the result's first array as it is written, with its layout: `f32[4,8]{1,0}`
      says that dim 1 is the most minor; tiles (`T(8,128)`) and memory space (`S(1)`) may follow.
    operands: names of the instructions that it reads, in order.
    literal: the text in the parentheses, which for a constant is its value.
    called: (role, computation) for each computation that it names, in order; roles are attributes
      such as `body`, `condition`, `calls`.
    op_name: path of the JAX name scopes that it was traced under; empty if the compiler made it.
    cycles: the compiler's estimate of one execution; None if it gives none, as on CPU.
    trips: number of iterations of a `while`; None where the text does not say.
    target: of a custom call, the function that it calls; else empty.
    attributes: the text after the operands.
    root: whether it is the result of its computation.
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
  target: str
  attributes: str
  root: bool

  @property
  def runs(self) -> tuple[str, ...]:
    """Names of the computations that it runs whose instructions are scheduled one by one."""
    roles = _RUNS.get(self.opcode, ())
    return tuple(name for role, name in self.called if role in roles)

  @property
  def holds(self) -> tuple[str, ...]:
    """Names of all computations that it runs: those of `runs`, or the one that it fuses."""
    if self.opcode == "fusion":
      return tuple(name for role, name in self.called if role == "calls")
    return self.runs


@dataclasses.dataclass(frozen=True)
class Computation:
  """A named list of instructions, in the order in which they were scheduled.

  Attributes:
    name: unique in the module, without the `%`.
    instructions: name -> instruction, in that order.
  """

  name: str
  instructions: Mapping[str, Instruction]

  def __iter__(self) -> Iterator[Instruction]:
    return iter(self.instructions.values())

  @property
  def root(self) -> Instruction:
    """The instruction whose result is the computation's."""
    return next(i for i in self if i.root)


@dataclasses.dataclass(frozen=True)
class HloModule:
  """A whole program.

  Attributes:
    computations: name -> computation, in the order of the text.
    entry: name of the computation that runs first.
  """

  computations: Mapping[str, Computation]
  entry: str

  def __getitem__(self, name: str) -> Computation:
    return self.computations[name]


def module_of(program: str | HloModule | jax.stages.Compiled) -> HloModule:
  """Returns the parsed module of a program in any of its forms.

  Args:
    program: what `jax.jit(f).lower(...).compile()` returns, its `as_text()`, or a parsed module,
      which is returned as it is.

  Raises:
    ValueError: a text that has no entry computation.
  """
  if isinstance(program, HloModule):
    return program
  return parse(program if isinstance(program, str) else program.as_text() or "")


def parse(text: str) -> HloModule:
  """Returns the module that `compiled.as_text()` describes.

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
  return HloModule({name: Computation(name, body) for name, body in computations.items()}, entry)


def _instruction(line: str) -> Instruction | None:
  """Reads `[ROOT] %name = TYPE opcode(operands), attributes`; None for any other line."""
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
  target = _TARGET.search(attributes)
  name = _OP_NAME.search(attributes)
  return Instruction(
    name=head[2],
    opcode=opcode[1],
    shapes=_shapes(kind),
    layout=kind.lstrip("(").split(" ")[0].rstrip(","),
    operands=tuple(_NAME.findall(inner)),
    literal=inner,
    called=tuple(
      (role, callee)
      for role, names in _CALLED.findall(attributes)
      for callee in _NAME.findall(names)
    ),
    op_name=name[1] if name else "",
    cycles=None if cycles is None or cycles >= _NO_ESTIMATE else cycles,
    trips=_number(_TRIPS, attributes),
    target=target[1] if target else "",
    attributes=attributes,
    root=bool(head[1]),
  )


def _shapes(text: str) -> tuple[Shape, ...]:
  """All arrays in the text of a type, in order."""
  arrays = _ARRAY.findall(text)
  return tuple(Shape(dtype, tuple(map(int, filter(None, d.split(","))))) for dtype, d in arrays)


def _type(text: str) -> tuple[str, str]:
  """Divides `TYPE opcode(...)` after the type, which is an array or a tuple in parentheses."""
  # The type of a tuple has spaces inside, that of an array ends at the first one.
  end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
  return text[:end], text[end:]


def _closing(text: str, start: int) -> int:
  """Index of the parenthesis that closes the one at `start`; the length of the text if none does.

  Tiles in layouts, such as `T(8,128)`, have parentheses too, so the first `)` need not be it.
  """
  depth = 0
  for at in range(start, len(text)):
    depth += (text[at] == "(") - (text[at] == ")")
    if not depth:
      return at
  return len(text)


def _number(pattern: re.Pattern[str], text: str) -> int | None:
  """The number in the first match of a pattern, None without a match."""
  found = pattern.search(text)
  return int(found[1]) if found else None


def _dtype_name(dtype: np.dtype) -> str:
  """XLA's name of a NumPy dtype: `f32` for float32, `s32` for int32, `pred` for bool."""
  short = {"bool": "pred", "bfloat16": "bf16"}
  if dtype.name in short:
    return short[dtype.name]
  if dtype.name.startswith("float8"):
    return "f8" + dtype.name.removeprefix("float8_")
  letter = {"f": "f", "i": "s", "u": "u", "c": "c"}[dtype.kind]
  return f"{letter}{dtype.itemsize * 8}"
