"""Packs and unpacks the trees of a stack of unlike layers, compiled once for each stack.

`PlaceableStack.pack` and `unpack` are functions of arrays that are worth compiling. But
`stack.laid_out(schedule)` makes a new packed stack at every call, and `jax.jit` of a bound method
finds its programs by the method's object: each call would compile anew. Here two functions are kept
for each stack, with the placement as a static argument:

    stack (weak key)  ->  pack, unpack  ->  JAX's own cache: placement, shapes, dtypes -> program

Nothing outlives the stack: the table holds it weakly, a program refers to it weakly, and JAX drops
a program together with the function that it was compiled from.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxpipe.parallel.protocol import PlaceableStack, PlacementLike

Tree = Any


@dataclasses.dataclass(frozen=True)
class _Layout:
  """How a stack is packed, as the static argument of a compiled function.

  JAX keeps static arguments as long as the program, and compares them to find it.

  Attributes:
    placement: which device holds which stage. A stack is packed alike for equal placements, so that
      layouts of one stack are equal where their placements are.
    laid_out: the packed stack, read while the function is traced. A strong reference would keep the
      user's stack, with the weights of the modules that it was made from, as long as the program.
  """

  placement: PlacementLike
  laid_out: weakref.ref[PlaceableStack] = dataclasses.field(compare=False)

  def stack(self) -> PlaceableStack:
    """Returns the packed stack, which its caller holds while the function is traced."""
    laid = self.laid_out()
    assert laid is not None
    return laid


class _Compiled(NamedTuple):
  """The two compiled functions of one stack.

  Attributes:
    pack: `(layout, canonical tree) -> packed tree`.
    unpack: `(layout, packed tree) -> canonical tree`.
  """

  pack: Callable[[_Layout, Tree], Tree]
  unpack: Callable[[_Layout, Tree], Tree]


_COMPILED: weakref.WeakKeyDictionary[PlaceableStack, _Compiled] = weakref.WeakKeyDictionary()


def pack(tree: Tree, laid: PlaceableStack, stack: PlaceableStack, placement: PlacementLike) -> Tree:
  """Returns the packed tree of a canonical one, rows in the order of the stages.

  Args:
    tree: parameters, or what has their structure (gradients, moments), or model state.
    laid: the packed stack, `stack.laid_out(schedule)`.
    stack: the user's stack.
    placement: the placement that it was laid out for.
  """
  return _compiled(stack).pack(_Layout(placement, weakref.ref(laid)), tree)


def unpack(
  tree: Tree, laid: PlaceableStack, stack: PlaceableStack, placement: PlacementLike
) -> Tree:
  """Returns the canonical tree of a packed one, rows in the order of the stages.

  Args:
    tree: packed parameters, gradients, moments or model state.
    laid: the packed stack, `stack.laid_out(schedule)`.
    stack: the user's stack.
    placement: the placement that it was laid out for.
  """
  return _compiled(stack).unpack(_Layout(placement, weakref.ref(laid)), tree)


def _compiled(stack: PlaceableStack) -> _Compiled:
  """The compiled functions of a stack, made when it is first seen."""
  if stack not in _COMPILED:
    # New functions for each stack: JAX would keep the programs of one that all stacks share.
    def pack(layout: _Layout, tree: Tree) -> Tree:
      return layout.stack().pack(tree)

    def unpack(layout: _Layout, tree: Tree) -> Tree:
      return layout.stack().unpack(tree)

    _COMPILED[stack] = _Compiled(*(jax.jit(fn, static_argnums=0) for fn in (pack, unpack)))
  return _COMPILED[stack]
