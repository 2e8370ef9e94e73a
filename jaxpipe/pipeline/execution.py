"""What runs where: a stack, a schedule and a mesh, assembled once for all who need the assembly.

`Execution.of` lays the stack out over the schedule's devices, resolves the residual policy, lowers
the schedule to its tick table, and checks that all of them fit one another. The executor runs what
it returns; reports of memory, packing and time trace the same thing without running it.

    LayerStack ──laid_out──▶ stack ─┐
    residuals ──────────────▶ policy ├─▶ Execution ──▶ executor, costs/, timeline, choose
    Schedule ───lower───────▶ program┘
    Mesh ───────────────────▶ specs
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec

from jaxpipe.parallel import axes, replicas
from jaxpipe.parallel.mesh import FSDP, ROWS, row_shards
from jaxpipe.parallel.placing import (
  check_mesh,
  gather_fsdp,
  layers_per_stage,
  map_rows,
  param_specs,
)
from jaxpipe.pipeline.batch import batch_specs, microbatches
from jaxpipe.pipeline.device.context import DeviceContext
from jaxpipe.pipeline.device.device import Device
from jaxpipe.pipeline.device.order import blocks
from jaxpipe.pipeline.device.probe import Probe
from jaxpipe.pipeline.layer.residuals import AUTO, Policy, Residuals, residual_policy
from jaxpipe.pipeline.layer.varying import vary
from jaxpipe.pipeline.mode import mode_of
from jaxpipe.pipeline.table.lower import lower
from jaxpipe.pipeline.table.program import Program
from jaxpipe.pipeline.table.segment import Segment
from jaxpipe.pipeline.table.unroll import segments
from jaxpipe.schedules import Schedule
from jaxpipe.stack.context import leaves_of_rows
from jaxpipe.stack.protocol import PackedStack, UniformStack, is_packed
from jaxpipe.stack.stack import LayerStack

Tree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
  """A stack, a schedule and a mesh that fit one another, ready to be traced.

  Attributes:
    stack: the stack as it is laid out on the schedule's devices.
    schedule: the whole schedule, which says where the parameters lie.
    program: the tick table: of the schedule, or of its forwards alone.
    mesh: where it runs.
    policy: what F keeps; None where only forwards run.
    predicts: whether the outputs of the last layer are wanted, and the head does not run.
    poison: whether to fill with NaN whatever no action has written; for tests.
    probe: reads the clock round every action; None for a program that reads none.

  Raises:
    ValueError: the mesh is of another size, the layers do not fill the stages, devices cannot own
      equally many of them, or the stack lacks what a vocabulary cut over the stages needs.
  """

  stack: UniformStack | PackedStack
  schedule: Schedule
  program: Program
  mesh: Mesh
  policy: Residuals | None
  predicts: bool = False
  poison: bool = False
  probe: Probe | None = None

  @classmethod
  def of(
    cls,
    stack: LayerStack,
    schedule: Schedule,
    mesh: Mesh,
    *,
    residuals: str | Policy = AUTO,
    slack: int = 0,
    poison: bool = False,
    probe: Probe | None = None,
  ) -> Self:
    """Assembles a training step; arguments and errors as of `pipeline_value_and_grad`."""
    check_mesh(schedule, mesh)
    laid_out = stack.laid_out(schedule)
    mode = mode_of(laid_out)
    policy = residual_policy(residuals, mode.auto_residuals)
    program = lower(
      schedule.check(),
      keeps_input=policy.stage_input,
      slack=slack,
      gathers=dict(mesh.shape).get(FSDP, 1) > 1,
      loss_gradient_waits=mode.loss_gradient_waits,
    )
    return cls(
      stack=laid_out,
      schedule=schedule,
      program=program,
      mesh=mesh,
      policy=policy,
      poison=poison,
      probe=probe,
    )

  @classmethod
  def of_forwards(
    cls,
    stack: LayerStack,
    schedule: Schedule,
    mesh: Mesh,
    *,
    predicts: bool = False,
    poison: bool = False,
  ) -> Self:
    """Assembles an evaluation, or a prediction; arguments and errors as of `pipeline_forward`.

    Weights that `fsdp` cuts are gathered before the first tick: forwards alone have no G.
    """
    check_mesh(schedule, mesh)
    return cls(
      stack=stack.laid_out(schedule),
      schedule=schedule,
      program=lower(schedule.check().forward_only()),
      mesh=mesh,
      policy=None,
      predicts=predicts,
      poison=poison,
    )

  def __post_init__(self) -> None:
    layers_per_stage(self.stack.depth, self.schedule)
    replicas.owned(self.schedule.placement)
    _ = self.specs  # raises where the parameters do not fit the mesh

  @property
  def axes(self) -> tuple[str, ...]:
    """Names of the mesh axes."""
    return tuple(self.mesh.axis_names)

  @property
  def shards(self) -> int:
    """Number of devices that hold different rows of a microbatch."""
    return row_shards(self.mesh)

  @property
  def layers(self) -> int:
    """Entries of the parameters' leading dim that belong to one stage: layers, or packed rows."""
    return layers_per_stage(self.stack.depth, self.schedule)

  @functools.cached_property
  def specs(self) -> Tree:
    """Partition specs of the parameters."""
    return param_specs(self.stack.param_shapes(), self.stack, self.schedule, self.mesh)

  @functools.cached_property
  def state_shapes(self) -> Tree:
    """Shapes of the model state; an empty dict where the stack has none."""
    return self.stack.state_shapes() if self.stack.has_state else {}

  @functools.cached_property
  def state_specs(self) -> Tree:
    """Partition specs of the model state."""
    return param_specs(self.state_shapes, self.stack, self.schedule, self.mesh)

  def segments(self, unroll: str) -> tuple[Segment, ...]:
    """Divides the ticks into loops and straight lines; `unroll` as of `pipeline_value_and_grad`."""
    if unroll == "auto" and not mode_of(self.stack).unrolls:
      unroll = "none"
    return segments(self.program, unroll)

  def over_mesh(self, local: Callable[..., Any], out_specs: Any) -> Callable[..., Any]:
    """Returns `run(params, state, batch, key, *more)`, which runs `local` on every device's part.

    Args:
      local: called inside `shard_map` with this device's part of placed parameters and state, and
        its rows of the batch in microbatches, leaves `[M, rows, ...]`.
      out_specs: how what it returns lies over the mesh.

    Returns:
      A function of placed `params` and `state`, of a `batch` with leaves `[B, ...]`, and of `key`
      and further arguments, which every device has whole.
    """

    def run(params: Tree, state: Tree, batch: Tree, key: jax.Array | None, *more: Any) -> Any:
      divided = microbatches(batch, self.schedule.microbatches, self.shards)
      sharded = jax.shard_map(
        local,
        mesh=self.mesh,
        in_specs=(
          *(self.specs, self.state_specs, batch_specs(divided, self.mesh), Spec()),
          *(Spec() for _ in more),
        ),
        out_specs=out_specs,
      )
      return sharded(params, state, divided, key, *more)

    return run

  def inspect(self, batch: Tree, look: Callable[[Device], Any]) -> Any:
    """Traces the step up to its first tick and returns `look(device)`; nothing is compiled.

    Args:
      batch: a batch or its shapes, leaves `[B, ...]`.
      look: called once, inside `shard_map`; what it returns must hold no traced arrays.
    """
    found: list[Any] = []

    def local(params: Tree, state: Tree, batch: Tree, key: jax.Array) -> tuple[()]:
      found.append(look(self.build(params, state, batch, key)))
      return ()

    key = jax.eval_shape(jax.random.key, 0)
    shapes = self.stack.param_shapes()
    jax.eval_shape(self.over_mesh(local, ()), shapes, self.state_shapes, batch, key)
    # JAX may trace more than once; each trace finds the same.
    return found[-1]

  def build(
    self, params: Tree, state: Tree, batch: Tree, key: Any, loss_scale: jax.Array | None = None
  ) -> Device:
    """Builds the device that runs this code; called inside `over_mesh`, with its arguments."""
    gather = functools.partial(
      replicas.gather, placement=self.schedule.placement, layers=self.layers
    )
    layers = vary(map_rows(gather, params["layers"], self.stack.shared_rows), self.axes)
    ends = {part: gather_fsdp(self.specs[part], params[part]) for part in ("embed", "head")}
    ends = vary({**ends, "head": self.stack.head_params(ends)}, self.axes)
    rows = jnp.arange(leaves_of_rows(batch)[0][1].shape[1], dtype=jnp.int32)
    rows += axes.index(ROWS) * len(rows)
    batch, key, rows = vary((batch, key, rows), self.axes)
    context = DeviceContext(
      program=self.program,
      axes=self.axes,
      poison=self.poison,
      blocking=blocks(self.mesh),
      probe=self.probe,
      params=ends,
      batch=batch,
      key=key,
      rows=rows,
      training=self.policy is not None,
      predicts=self.predicts,
      packed_state=self._packed_state(state),
      uniform_state=self._uniform_state(state),
      loss_scale=loss_scale,
    )
    return Device.build(
      self.stack,
      context,
      pieces=layers,
      specs=self.specs["layers"],
      layers=self.layers,
      policy=self.policy,
    )

  def _packed_state(self, state: Tree) -> Tree:
    """Rows of the model state of all stages that a device holds, dtype -> [V, width]."""
    if not state or not is_packed(self.stack):
      return {}
    whole = gather_fsdp(self.state_specs, state)["layers"]["state"]
    return vary(replicas.gather(whole, self.schedule.placement, self.layers), self.axes)

  def _uniform_state(self, state: Tree) -> Tree:
    """Model state of a uniform stack, of the layers that a device holds and of the ends."""
    if not state or is_packed(self.stack):
      return {}
    whole = gather_fsdp(self.state_specs, state)
    layers = replicas.gather(whole["layers"], self.schedule.placement, self.layers)
    head = self.stack.head_state(whole)
    return vary({"embed": whole["embed"], "layers": layers, "head": head}, self.axes)
