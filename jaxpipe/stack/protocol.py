"""Protocols of a stack that lies on devices: all that placing, executor and costs ask of one.

A stack lies on devices in one of two ways, and `LayerStack.laid_out(schedule)` says in which:

    protocol       class       leaves of `layers`         what a stage computes
    UniformStack   LayerStack  [L, ...], layers stacked   a loop over `apply_layer`
    PackedStack    Packed      [S, width], one per dtype  `run_stage`, a function of its own

`LaidOutStack` is what both offer, and all that most code needs. mypy compares each class with its
protocol at the end of `stack.py` and of `packed.py`: a member that a class lacks is an error there
that names both.

Letters of shapes: L layers, S stages, V stages that a device holds. `depth` is L or S.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import jax

from jaxpipe.parallel.flat import Flat
from jaxpipe.parallel.protocol import PlaceableStack, ScheduleLike
from jaxpipe.stack.context import LayerInputs, MicrobatchInputs
from jaxpipe.stack.network import Network
from jaxpipe.stack.vocabulary import VocabularyEnds

if TYPE_CHECKING:
  from typing_extensions import TypeIs

Tree = Any
# Module name, such as `layers/3` -> the module's tree.
ModuleTrees = Mapping[str, Tree]
# The result of a head as `jax.value_and_grad(has_aux=True)` wants it: loss_sum [], (weight [],
# metrics), sums over the rows of one microbatch.
HeadSums = tuple[jax.Array, tuple[jax.Array, Tree]]


class LaidOutStack(PlaceableStack, Protocol):
  """A stack as it lies on the devices of a schedule."""

  @property
  def network(self) -> Network:
    """The modules as data."""

  @property
  def has_state(self) -> bool:
    """Whether any module has model state, that is variables which are not trained."""

  def laid_out(self, schedule: ScheduleLike, /) -> UniformStack | PackedStack:
    """The stack as it lies on the devices of a schedule; one that is laid out returns itself."""

  def head_params(self, params: Tree, /) -> Tree:
    """The parameters that the head reads.

    Args:
      params: a tree with the parts `embed` and `head`.

    Returns:
      The part `head` and, at their paths in it, the leaves that the embedding owns.
    """

  def untie(self, grads: Tree, /) -> Tree:
    """Adds the gradients of shared leaves to their owners' gradients, and takes them out.

    Args:
      grads: sums of the parts `embed`, `layers` and `head` on one device, `head` with a leaf for
        every parameter that the head reads; of a packed stack also `shared`, path -> gradient.

    Returns:
      A tree with the structure of the parameters.
    """

  def renewed(
    self, rows: Tree, means: Sequence[jax.Array], vary: Callable[[Tree], Tree], /
  ) -> Tree:
    """The model state of this device's rows after a step; inside `shard_map`.

    Args:
      rows: the part `layers` of the state before the step, leaves [owned, ...].
      means: the state that changes, as the step has made it, in the order in which F sums it: of
        floats the mean over microbatches and shards of rows, of whole numbers the largest.
      vary: marks a tree as differing between stages.
    """

  def changing_specs(self, specs: Tree, /) -> list[Any]:
    """Partition specs of the arrays in which F sums what it makes of the state, without `fsdp`.

    Args:
      specs: of the part `layers` of the state.
    """


class UniformStack(LaidOutStack, Protocol):
  """A stack of layers of one kind that return what they take, as functions of its three parts."""

  def apply_embed(
    self, params: Tree, batch: Tree, training: bool = True, state: Tree | None = None
  ) -> Tree:
    """Embeds a microbatch.

    Args:
      params: the embedding's own, the part `embed`.
      batch: the microbatch's own inputs, leaves [rows, ...].
      training: False in evaluation.
      state: its frozen variables; None where it has none.

    Returns:
      x, the first layer's input: any pytree, leaves [rows, ...].
    """

  def apply_layer(self, params: Tree, x: Tree, training: bool, inputs: LayerInputs) -> Tree:
    """Runs one layer.

    Args:
      params: one layer's, leaves without a layer dim.
      x: its input, leaves [rows, ...].
      training: False in evaluation, where dropout is the identity.
      inputs: the microbatch's own inputs, its and the layer's number, the step's key, the layer's
        model state.

    Returns:
      A tree of the structure, shapes and dtypes of x.
    """

  def run_layer(
    self, params: Tree, x: Tree, training: bool, inputs: LayerInputs
  ) -> tuple[Tree, list[Any]]:
    """Runs one layer; arguments as for `apply_layer`.

    Returns:
      What `apply_layer` returns, and the leaves of the layer's state that a forward in training
      changes, after the call; none in evaluation.
    """

  def apply_head(
    self, params: Tree, x: Tree, batch: Tree, training: bool = True, state: Tree | None = None
  ) -> HeadSums:
    """Runs the head on what the last layer returned.

    Args:
      params: all that the head reads, `head_params(...)`.
      x: leaves [rows, ...].
      batch: the microbatch's own inputs, leaves [rows, ...].
      training: False in evaluation.
      state: its frozen variables; None where it has none.
    """

  def head_state(self, state: Tree, /) -> Tree:
    """The frozen variables that the head reads.

    Args:
      state: frozen variables of the parts `embed` and `head`.

    Returns:
      The part `head` and, at their paths in it, the leaves that the embedding owns.
    """

  @property
  def vocabulary_ends(self) -> VocabularyEnds:
    """Embedding and head in parts, for schedules that cut their tables over the stages.

    Raises:
      StackError: the stack does not say where its tables are.
    """


class PackedStack(LaidOutStack, Protocol):
  """A stack cut into stages that are not alike: each a row of parameters and a function."""

  @property
  def stages(self) -> Sequence[Sequence[str]]:
    """Names of each stage's modules, in order: [S][...]."""

  @property
  def params(self) -> Sequence[Flat]:
    """How each stage's own parameters lie in its row: [S]."""

  @property
  def state(self) -> Sequence[Flat]:
    """How each stage's model state lies in its row: [S]."""

  @property
  def changing(self) -> Sequence[Flat]:
    """How the state that a forward changes lies in a row of its own: [S]."""

  @property
  def widths(self) -> Mapping[str, int]:
    """Dtype -> elements of a row of parameters."""

  @property
  def state_widths(self) -> Mapping[str, int]:
    """Dtype -> elements of a row of model state."""

  @property
  def changing_widths(self) -> Mapping[str, int]:
    """Dtype -> elements of a row of the state that a forward changes."""

  @property
  def borrowed(self) -> Sequence[Mapping[str, str]]:
    """For each stage, the parameters it reads that another stage owns: path -> the owner's path."""

  def shared(self, rows: Mapping[str, jax.Array], /) -> Mapping[str, jax.Array]:
    """All leaves that several stages read, brought to every device; inside `shard_map`.

    Args:
      rows: dtype -> [V, width], the parameters of this device's stages.

    Returns:
      The owner's path -> the leaf, in its own shape.
    """

  def run_stage(
    self,
    s: int,
    params: tuple[ModuleTrees, Mapping[str, jax.Array]],
    state: ModuleTrees,
    x: Tree,
    training: bool,
    inputs: MicrobatchInputs,
    head: bool = True,
  ) -> tuple[Tree, list[jax.Array]]:
    """Runs a stage's modules one after the other.

    Args:
      s: number of the stage.
      params: its modules' own parameters; and what it borrows, by the paths of `borrowed[s]`.
      state: its modules' model state.
      x: what the stage before returned; the first stage does not read it.
      training: False in evaluation.
      inputs: of the microbatch.
      head: False leaves out the head, so that the last stage returns what the last layer does.

    Returns:
      x for the next stage, or of the last stage its `HeadSums`; and the leaves of the stage's state
      that a forward changes, after the call, in the order of `changing[s]`.
    """


def is_packed(stack: UniformStack | PackedStack) -> TypeIs[PackedStack]:
  """Whether a stack, as it is laid out, lies packed; tells mypy as well."""
  return not stack.uniform
