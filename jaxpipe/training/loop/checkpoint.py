"""Writes and reads checkpoints, from which a run may resume on any mesh and under any schedule.

A checkpoint holds the *canonical* tree: layers in model order, whatever placement wrote it. It is
written in the background, from a copy, while training goes on; its name appears only once it is
whole, so that a killed run finds the one before.

    checkpoints/STEP/params      parameters
    checkpoints/STEP/optimizer   the optimizer's moments, and the step
    checkpoints/STEP/state       model state, such as moving averages, if the stack has any
    checkpoints/STEP/average     the moving average of the parameters, if the run keeps one
    checkpoints/STEP/meta        JSON: step, seed, configuration, identity of the data

Parameters stand alone, so that sampling reads them without knowing the optimizer.
"""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, Sharding

from jaxpipe.schedules import Schedule
from jaxpipe.stack.stack import LayerStack
from jaxpipe.training.flags.errors import ConfigError
from jaxpipe.training.plan.state import TrainState, canonical_shardings, to_canonical, to_placed

Tree = Any

_ITEMS = ("params", "optimizer", "state", "average", "meta")
_KEEP = 3  # the newest; older ones are deleted


class Checkpoints:
  """The checkpoints of one run directory.

  Args:
    folder: where they are; made if missing, unless `read_only`.
    read_only: never writes, and cleans up nothing.
    alone: whether this process alone reads, whatever the others do. Otherwise all processes of a
      run must call the same methods in the same order, and each reads and writes its own part.
  """

  def __init__(self, folder: pathlib.Path, *, read_only: bool = False, alone: bool = False) -> None:
    here = jax.process_index()
    own: dict[str, Any] = dict(
      primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"process {here}"
    )
    options = ocp.CheckpointManagerOptions(
      max_to_keep=None if read_only else _KEEP,
      create=not read_only,
      read_only=read_only,
      cleanup_tmp_directories=not read_only,
      multiprocessing_options=ocp.options.MultiprocessingOptions(**own if alone else {}),
    )
    self._folder = folder
    # orbax wants absolute paths.
    self._manager = ocp.CheckpointManager(folder.absolute(), options=options, item_names=_ITEMS)

  @property
  def newest(self) -> int | None:
    """The step of the newest whole checkpoint; None where there is none."""
    step = self._manager.latest_step()
    return None if step is None else int(step)

  def save(
    self,
    state: TrainState,
    stack: LayerStack,
    schedule: Schedule,
    mesh: Mesh,
    meta: dict[str, Any],
  ) -> None:
    """Starts writing a checkpoint; returns once the state has been copied from the devices.

    Args:
      state: as placed on the mesh; it may be donated as soon as this returns.
      stack, schedule, mesh: they decide the order in which the state's layers lie.
      meta: JSON values to keep beside it.
    """
    canonical = to_canonical(state, stack, schedule, mesh)
    step = int(canonical.step)
    # The last step may be due by the interval and by the end; orbax refuses the second.
    if step == self.newest:
      return
    trees = {name: ocp.args.StandardSave(tree) for name, tree in _trees(canonical).items()}
    items = ocp.args.Composite(**trees, meta=ocp.args.JsonSave({**meta, "step": step}))
    self._manager.save(step, args=items)

  def restore(
    self, step: int, shapes: TrainState, stack: LayerStack, schedule: Schedule, mesh: Mesh
  ) -> TrainState:
    """Reads a checkpoint and places it on a mesh.

    Of layers that are alike each device reads its own part; otherwise every device reads the whole
    canonical tree before it is packed.

    Args:
      step: of the checkpoint.
      shapes: the canonical state as shapes, from `canonical_shapes`.
      stack, schedule, mesh: where the state is to lie; they need not be those that it was saved
        from.

    Returns:
      The placed state.

    Raises:
      ConfigError: no such checkpoint, a damaged one, or one of other shapes.
    """
    targets = jax.tree.map(_on, shapes, canonical_shardings(shapes, stack, schedule, mesh))
    trees = {name: ocp.args.StandardRestore(tree) for name, tree in _trees(targets).items()}
    items = self._restore(step, **trees)
    state = TrainState(
      params=items["params"],
      **items["optimizer"],
      model_state=items.get("state") or {},
      average=items.get("average") or {},
    )
    return to_placed(state, stack, schedule, mesh)

  def restore_params(
    self, step: int, shapes: Tree, sharding: Sharding, *, average: bool = False
  ) -> Tree:
    """Reads the canonical parameters alone.

    Args:
      step: of the checkpoint.
      shapes: of the canonical parameters.
      sharding: where every leaf is to lie.
      average: reads their moving average, in the parameters' dtypes.

    Raises:
      ConfigError: no such checkpoint, a damaged one, or one of other shapes.
    """
    return self._restore_item("average" if average else "params", step, shapes, sharding)

  def restore_model_state(self, step: int, shapes: Tree, sharding: Sharding) -> Tree:
    """Reads the canonical model state alone, as `restore_params` reads parameters.

    Returns:
      The state; `{}` for `shapes` of a stack without state, whose checkpoints have no such item.
    """
    return self._restore_item("state", step, shapes, sharding) if shapes else {}

  def _restore_item(self, item: str, step: int, shapes: Tree, sharding: Sharding) -> Tree:
    target = jax.tree.map(lambda leaf: _on(leaf, sharding), shapes)
    return self._restore(step, **{item: ocp.args.StandardRestore(target)})[item]

  def meta(self, step: int) -> dict[str, Any]:
    """The JSON values that a checkpoint was saved with."""
    return dict(self._restore(step, meta=ocp.args.JsonRestore())["meta"])

  def _restore(self, step: int, **items: Any) -> Any:
    try:
      return self._manager.restore(step, args=ocp.args.Composite(**items))
    # orbax passes on whatever its layers raise, and none of it says what the user can do.
    except (ValueError, KeyError, OSError) as error:
      raise ConfigError(
        f"{self._folder / str(step)}: cannot be read ({' '.join(str(error).split())[:80]});"
        " delete that folder to resume from the checkpoint before it"
      ) from error

  def wait(self) -> None:
    """Returns once everything that was saved is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, and stops the background threads."""
    self._manager.close()


def _trees(state: TrainState) -> dict[str, Tree]:
  """Divides a state into the items of a checkpoint, by name."""
  optimizer = {"opt_state": state.opt_state, "step": state.step}
  trees = {"params": state.params, "optimizer": optimizer}
  if state.model_state:
    trees["state"] = state.model_state
  return {**trees, "average": state.average} if state.average else trees


def _on(leaf: Any, sharding: Sharding) -> jax.ShapeDtypeStruct:
  """Returns the shape of a leaf, with the place that orbax is to read it to."""
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
