"""The parts that a device is made of, as protocols: a stage's actions and the network's two ends.

`device.py` walks a tick knowing these protocols only; `build.py` chooses the classes behind them:

    protocol       class                      for
    StageActions   LoopedStage                stages of layers of one kind, run in a loop
                   SwitchedStages             stages that are not alike, behind a switch
    Ends           WholeEnds                  embedding and head on the ends' own devices
                   InnerEnds                  both inside the first and last stage of a packed stack
                   ShardedEnds                tables cut over the stages, a shard on every device

mypy checks each class against its protocol where `build.py` returns it. Letters of shapes: V chunks
of a device, P devices of the stage axis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from jaxpipe.pipeline.device.carry import Carry
from jaxpipe.pipeline.device.now import Now
from jaxpipe.pipeline.layer.slices import LayerSplit
from jaxpipe.pipeline.storage.pools import PoolLayout, Pools, SavedLayout, Storage
from jaxpipe.pipeline.storage.rings import Index, Tree
from jaxpipe.pipeline.table.program import Program
from jaxpipe.schedules import Kind

# Leaves of a pytree, whose structure is that of `DeviceContext.x` or of a layer's split.
Leaves = list[jax.Array]
# Reads something of a stage's i-th layer, i counted within the stage.
LayerReader = Callable[[Index], Tree]


@dataclasses.dataclass(frozen=True)
class ActionArguments:
  """What an action is given besides the activations: parameters and further inputs of its stage.

  Attributes:
    params: reads the parameters of the stage's i-th layer, leaves without a layer dim.
    first_layer: where the stage's first layer lies among all layers of this device, int32.
    rows: for the stage's i-th layer, where it lies in each leaf of the parameters of `weights`.
    inputs: makes the further inputs of the stage's i-th layer, a `LayerInputs`: the microbatch's
      own data, the step's key, the number of the layer in the model and of the microbatch.
    weights: the device's parameters of all its chunks, leaves `[V * layers, ...]`, for an action
      that reads several layers at once.
  """

  params: LayerReader
  first_layer: Index
  rows: Callable[[Index], Sequence[Index]]
  inputs: LayerReader
  weights: Tree

  def given(self, i: Index) -> Leaves:
    """Leaves of the i-th layer's parameters and further inputs, in the order of a layer's split."""
    return jax.tree.leaves((self.params(i), self.inputs(i)))


@dataclasses.dataclass(frozen=True)
class Scratch:
  """Small pools of one action's own, so that no conditional both reads and returns a large pool.

  XLA copies a buffer whole that a conditional both reads and returns. An action that reads saved
  values and leaves others therefore does one of the two outside its own branch: what it reads is
  fetched into the scratch before, or what it makes is moved from the scratch to the pools after.

  Attributes:
    layout: which values the scratch holds, each with one cell of its own.
    before: True where the scratch holds what the action reads, False where what it makes.
  """

  layout: PoolLayout
  before: bool


class StageActions(Protocol):
  """The actions of a stage: what F, R, B, I and W do for the stage that a tick names.

  Activations and cotangents are passed as leaves: of the activation that travels between stages,
  and of its float leaves. All methods that take `ActionArguments` are traced inside `shard_map`,
  inside the conditional of their action.
  """

  @property
  def layers(self) -> int:
    """Entries of the parameters' leading dim that belong to one stage."""

  @property
  def layout(self) -> SavedLayout:
    """Where saved values lie between actions."""

  @property
  def splits(self) -> Sequence[LayerSplit]:
    """What actions run, for estimates of memory: one split layer, or every stage's split."""

  @property
  def sums(self) -> Sequence[str]:
    """Names of the entries of `Carry.grads` that B and W add to."""

  @property
  def scratch(self) -> Mapping[Kind, Scratch]:
    """For each kind of action that reads pools and writes pools, how it keeps the two apart."""

  @property
  def rerun_layout(self) -> PoolLayout | None:
    """Pools for what a second forward inside B or I makes; None where they run none."""

  @property
  def recomputes(self) -> bool:
    """Whether R has values to recompute where F kept part of each layer."""

  @property
  def rereads_input(self) -> bool:
    """Whether B and I run the forward again and need the stage's input for it."""

  def cells(self, program: Program) -> tuple[np.ndarray, tuple[int, ...]]:
    """Gives every saved value of every stage and microbatch a place.

    Returns:
      int32 [ticks, P, values], the cells that a tick's action reads and writes; and how many cells
      each pool has.
    """

  def allocate(self, layout: SavedLayout, lengths: Sequence[int]) -> Pools:
    """Makes pools of these numbers of cells, their contents undefined; sums begin at nothing."""

  def counted(self, pools: Pools) -> Sequence[jax.Array]:
    """Sums over microbatches of the model state that F has made: one array for each of the sums."""

  def saved_bytes(self) -> tuple[int, int]:
    """Bytes that F keeps of one stage and microbatch, and bytes that wait for its W."""

  def primal(self, arguments: ActionArguments, x: Leaves) -> Leaves:
    """Runs the stage on its input x and keeps nothing; returns the output's leaves."""

  def output(self, y: Leaves) -> Tree:
    """What the last layer returns, as it returns it, of the leaves that travel."""

  def forward(
    self, arguments: ActionArguments, x: Leaves, storage: Storage
  ) -> tuple[Leaves, Storage]:
    """F: runs the stage; returns its output, and the storage with what the backward wants."""

  def recompute_from_input(
    self, arguments: ActionArguments, x: Leaves, storage: Storage
  ) -> Storage:
    """R where F kept the stage's input alone: runs the forward again, and keeps all of it.

    Called where the program keeps stage inputs (`Program.keeps_input`).
    """

  def recompute_from_kept(
    self, arguments: ActionArguments, storage: Storage, made: Storage
  ) -> Storage:
    """R where F kept something of every layer: makes the rest from it.

    Args:
      arguments: parameters and further inputs.
      storage: what F has kept; read only.
      made: where the rest is written.
    """

  def backward(
    self, arguments: ActionArguments, storage: Storage, x: Leaves, dy: Leaves, grads: Tree
  ) -> tuple[Leaves, Tree]:
    """B: the input's cotangents, and the gradient sums with this microbatch's added.

    Args:
      arguments: parameters and further inputs.
      storage: what F or R has left; read only.
      x: the stage's input where `rereads_input`, else an empty list.
      dy: cotangents of the output's float leaves.
      grads: the sums that `sums` names.
    """

  def input_grad(
    self, arguments: ActionArguments, storage: Storage, x: Leaves, dy: Leaves, made: Storage
  ) -> tuple[Leaves, Storage]:
    """I: the input's cotangents, and `made` with what W waits for; arguments as of `backward`."""

  def weight_grad(self, arguments: ActionArguments, storage: Storage, grads: Tree) -> Tree:
    """W: the gradient sums with this microbatch's added, from what F, R and I left in `storage`."""


class Ends(Protocol):
  """Embedding and head: what enters the first stage, and what becomes of the last stage's output.

  Methods that take a `Carry` return it with what they have changed.
  """

  def held(self) -> Mapping[str, Tree]:
    """Shapes of one slot of the ring `vocabulary`; empty where nothing of the head waits."""

  def heaviest(self) -> Any:
    """The jaxpr of the ends' work that holds most memory at once, for estimates."""

  def enter(self, carry: Carry, now: Now) -> Carry:
    """Before F: whatever all devices must do together to embed a microbatch."""

  def input(self, carry: Carry, now: Now) -> Leaves:
    """The input of this tick's stage: the embedding's output at the first, else what arrived."""

  def leave(self, carry: Carry, now: Now, y: Leaves) -> Carry:
    """After F: at the last stage, the loss of this microbatch, and what its backward needs."""

  def passes(self, carry: Carry, now: Now) -> Carry:
    """The passes S and T over a shard of the vocabulary, where the head is cut over the stages."""

  def back_at_input(self, carry: Carry, now: Now, dx: Leaves) -> Carry:
    """After B or I: at the first stage, adds the embedding's gradient, from its cotangents dx."""
