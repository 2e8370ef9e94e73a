"""Two well-known ways to write a pipeline in JAX, which `bench_step.py` compares jaxpipe with.

Both run the embedding and the head for all microbatches at once, outside the pipeline and shared
out over the devices, and the layers in M+P-1 iterations of a `lax.scan` that `jax.grad`
differentiates. In every iteration every device runs its stage, and so P-1 of them are wasted:

    iteration    0     1     2     3    (P=2, M=3; -- runs, and its result is dropped)
    device 0    m=0   m=1   m=2   --
    device 1    --    m=0   m=1   m=2

  vmap_roll   automatic sharding: `vmap` of the stage over a sharded leading dim, then `jnp.roll`,
              which the partitioner turns into a collective-permute. This is how the SPMD trainers
              do it (GSPMD, Xu et al., 2021, arXiv:2105.04663, section 3.3).
  scan_gpipe  GPipe (Huang et al., 2019, arXiv:1811.06965) written with `shard_map` and `ppermute`.

Dims: P stages, one a device; M microbatches; T = M+P-1 iterations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

import jaxpipe
from jaxpipe.parallel.mesh import STAGE
from jaxpipe.parallel.placing import shardings
from jaxpipe.pipeline.batch import microbatches as cut_batch
from jaxpipe.pipeline.layer.residuals import residual_policy

# The policy of jax.checkpoint_policies that `dots` stands for.
_DOTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable

Tree = Any
Step = Callable[..., tuple[tuple[jax.Array, Tree], Tree]]
# stage(layers, x, s, m, batch_M, key) -> x: stage s on microbatch m.
Stage = Callable[..., Tree]
# body(layers, x_M, batch_M, key) -> x_M: all layers, all microbatches.
Body = Callable[..., Tree]


def vmap_roll_value_and_grad(
  stack: Any,
  devices: int,
  microbatches: int,
  mesh: Mesh,
  residuals: str = "dots",
  *,
  blind_policy: bool = False,
) -> Step:
  """Returns a pipelined `value_and_grad` by `vmap` over stages and a rolled buffer.

  Args:
    stack: a `LayerStack` whose layers fill the stages evenly.
    devices: P, also the number of stages.
    microbatches: M.
    mesh: `stage` of size P and nothing else.
    residuals: as for `jaxpipe.pipeline_value_and_grad`.
    blind_policy: give `dots` the usual `dots_with_no_batch_dims_saveable`, which `vmap` blinds:
      every matmul has a batch dim then, so nothing is kept but layer inputs. Otherwise the policy
      looks past the stages' dim and keeps what everybody else keeps.

  Returns:
    `step(params, batch, key=None) -> ((loss, metrics), grads)`, jitted: what
    `jaxpipe.reference_value_and_grad` returns. Params and grads lie as `jaxpipe.place` puts them
    for a schedule of one chunk, which is in canonical order.

  Raises:
    ValueError: layers that do not fill the stages, another mesh, or an unknown policy.
  """
  _check(stack, devices, mesh)
  P, M = devices, microbatches
  dots = _DOTS if blind_policy else _dots_beside_stages
  stage = rematerialized_stage(stack, stack.depth // P, residuals, dots)
  over_stages = jax.vmap(stage, in_axes=(0, 0, 0, 0, None, None), spmd_axis_name=STAGE)

  def body(layers: Tree, x_M: Tree, batch_M: Tree, key: jax.Array | None) -> Tree:
    s_P = jnp.arange(P, dtype=jnp.int32)
    layers_P = _sharded(_map(lambda p: p.reshape(P, -1, *p.shape[1:]), layers), mesh)

    def iteration(state_P: Tree, at: Any) -> tuple[Tree, Tree]:
      t, x_P = at
      state_P = _map(lambda a, b: jnp.where(_like(s_P == 0, a), b, a), state_P, x_P)
      m_P = jnp.clip(t - s_P, 0, M - 1)
      y_P = _sharded(over_stages(layers_P, state_P, s_P, m_P, batch_M, key), mesh)
      return _sharded(_map(lambda a: jnp.roll(a, 1, axis=0), y_P), mesh), y_P

    def spread(x: jax.Array) -> jax.Array:
      return jnp.broadcast_to(x[:, None], (x.shape[0], P, *x.shape[1:]))

    start_P = _sharded(_map(lambda x: jnp.zeros((P, *x.shape[1:]), x.dtype), x_M), mesh)
    t_T, x_T = _iterations(x_M, P)
    # Stage 0's input is spread over the stages before the loop, and the last stage's output taken
    # after it: inside, they would cost an all-reduce and a broadcast in every iteration.
    _, y_TP = lax.scan(iteration, start_P, (t_T, _sharded(_map(spread, x_T), mesh, 1)))
    return _map(lambda y: y[P - 1 :, -1], y_TP)

  return _value_and_grad(stack, P, M, mesh, body)


def scan_gpipe_value_and_grad(
  stack: Any, devices: int, microbatches: int, mesh: Mesh, residuals: str = "dots"
) -> Step:
  """Returns GPipe, as autodiff through a `shard_map`, `ppermute` and scan.

  Args:
    stack: a `LayerStack` whose layers fill the stages evenly.
    devices: P, also the number of stages.
    microbatches: M.
    mesh: `stage` of size P and nothing else.
    residuals: as for `jaxpipe.pipeline_value_and_grad`.

  Returns:
    `step(params, batch, key=None) -> ((loss, metrics), grads)`, jitted, which takes and returns
    what that of `vmap_roll_value_and_grad` does.

  Raises:
    ValueError: layers that do not fill the stages, another mesh, or an unknown policy.
  """
  _check(stack, devices, mesh)
  P, M = devices, microbatches
  stage = rematerialized_stage(stack, stack.depth // P, residuals)
  ring = [(d, (d + 1) % P) for d in range(P)]

  def local(layers: Tree, x_M: Tree, batch_M: Tree, key: jax.Array | None) -> Tree:
    d = lax.axis_index(STAGE)
    # Cast once, before the loop, so that the cotangent of x_M is summed over devices once as well.
    x_M = _map(lambda x: lax.pcast(x, STAGE, to="varying"), x_M)

    def iteration(received: Tree, at: Any) -> tuple[Tree, Tree]:
      t, x = at
      x = _map(lambda a, b: jnp.where(d == 0, a, b), x, received)
      y = stage(layers, x, d, jnp.clip(t - d, 0, M - 1), batch_M, key)
      return _map(lambda a: lax.ppermute(a, STAGE, ring), y), y

    start = _map(lambda x: jnp.zeros_like(x[0]), x_M)
    _, y_T = lax.scan(iteration, start, _iterations(x_M, P))
    return _map(lambda y: y[None, P - 1 :], y_T)

  def body(layers: Tree, x_M: Tree, batch_M: Tree, key: jax.Array | None) -> Tree:
    run = jax.shard_map(
      local, mesh=mesh, in_specs=(Spec(STAGE), Spec(), Spec(), Spec()), out_specs=Spec(STAGE)
    )
    return _map(lambda y: y[-1], run(layers, x_M, batch_M, key))

  return _value_and_grad(stack, P, M, mesh, body)


def _value_and_grad(stack: Any, P: int, M: int, mesh: Mesh, body: Body) -> Step:
  """Returns the step that differentiates embedding, `body` and head as one function.

  Like the executor, it takes gradients of the sum of losses, and divides them once, at the end.
  """

  # A leading dim of microbatches is shared out over the devices where that is even.
  def shared(tree_M: Tree) -> Tree:
    return _sharded(tree_M, mesh) if M % P == 0 else tree_M

  def loss_of(params: Tree, batch_M: Tree, key: jax.Array | None) -> Any:
    head = stack.head_params(params)
    each_M = shared(batch_M)
    x_M = shared(jax.vmap(stack.apply_embed, in_axes=(None, 0))(params["embed"], each_M))
    y_M = shared(body(params["layers"], x_M, batch_M, key))
    sums_M = jax.vmap(stack.apply_head, in_axes=(None, 0, 0))(head, y_M, each_M)
    return _map(lambda a: a.sum(0), sums_M)

  @jax.jit
  def step(params: Tree, batch: Tree, key: jax.Array | None = None) -> Any:
    value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
    (loss, (weight, metrics)), grads = value_and_grad(params, cut_batch(batch, M, 1), key)
    grads = _map(lambda g: g / weight.astype(g.dtype), grads)
    gpipe = jaxpipe.make_schedule("gpipe", devices=P, microbatches=M)
    places = shardings(grads, stack, gpipe, mesh)
    return (loss / weight, metrics), lax.with_sharding_constraint(grads, places)

  return step


def rematerialized_stage(
  stack: Any, each: int, residuals: str, dots: Callable[..., bool] = _DOTS
) -> Stage:
  """Returns a stage of `each` layers as `jax.grad` may differentiate it.

  Args:
    stack: a `LayerStack`.
    each: layers in a stage.
    residuals: as for `jaxpipe.pipeline_value_and_grad`.
    dots: what `dots` stands for.

  Returns:
    `stage(params, x, s, m, batch_M, key) -> x`: `params` the stage's layers, stacked; `s` and `m`
    int32 numbers of stage and microbatch; `batch_M` the batch, leaves `[M, rows, ...]`.
  """
  policy = residual_policy(residuals)
  keep = dots if policy.layer is residual_policy("dots").layer else policy.layer

  def stage(params: Tree, x: Tree, s: jax.Array, m: jax.Array, batch_M: Tree, key: Any) -> Tree:
    rows = jnp.arange(jax.tree.leaves(x)[0].shape[0], dtype=jnp.int32)
    batch = _map(lambda leaf: leaf[m], batch_M)

    def layer(x: Tree, at: Any) -> tuple[Tree, None]:
      layer_params, i = at
      inputs = dict(batch=batch, key=key, layer=s * each + i, microbatch=m, rows=rows)
      return stack.apply_layer(layer_params, x, True, inputs), None

    # prevent_cse=False: forward and backward lie in different loops, so nothing can be merged.
    if keep is not None:
      layer = jax.checkpoint(layer, policy=keep, prevent_cse=False)

    def layers(x: Tree, params: Tree) -> Tree:
      return lax.scan(layer, x, (params, jnp.arange(each)))[0]

    if policy.stage_input:
      layers = jax.checkpoint(layers, prevent_cse=False)
    return layers(x, params)

  return stage


def _dots_beside_stages(primitive: Any, *_: Any, **params: Any) -> bool:
  """Saves matmuls with no batch dim, not counting the dim of stages that `vmap` adds."""
  if primitive is not lax.dot_general_p:
    return False
  _, (batch_dims, _) = params["dimension_numbers"]
  return len(batch_dims) <= 1


def _iterations(x_M: Tree, P: int) -> tuple[jax.Array, Tree]:
  """Returns what the scan runs over: t, and the first stage's input, zeros after microbatch M-1."""
  M = jax.tree.leaves(x_M)[0].shape[0]

  def pad(x: jax.Array) -> jax.Array:
    return jnp.concatenate([x, jnp.zeros_like(x, shape=(P - 1, *x.shape[1:]))])

  return jnp.arange(M + P - 1, dtype=jnp.int32), _map(pad, x_M)


def _sharded(tree: Tree, mesh: Mesh, dim: int = 0) -> Tree:
  """Asks for one dim of every leaf to be sharded over the stages."""
  sharding = NamedSharding(mesh, Spec(*(None,) * dim, STAGE))
  return _map(lambda leaf: lax.with_sharding_constraint(leaf, sharding), tree)


def _like(flags: jax.Array, leaf: jax.Array) -> jax.Array:
  """Reshapes flags [P] to broadcast over a leaf [P, ...]."""
  return flags.reshape(flags.shape + (1,) * (leaf.ndim - flags.ndim))


def _map(function: Callable[..., Any], *trees: Tree) -> Tree:
  return jax.tree.map(function, *trees)


def _check(stack: Any, devices: int, mesh: Mesh) -> None:
  """Raises ValueError for layers that do not fill the stages evenly, or a mesh with other axes."""
  if stack.depth % devices:
    raise ValueError(
      f"{stack.depth} layers cannot fill {devices} stages evenly; use a multiple of {devices}"
    )
  sizes = {name: size for name, size in mesh.shape.items() if size > 1 or name == STAGE}
  if sizes != {STAGE: devices}:
    raise ValueError(f"the mesh is {dict(mesh.shape)}; a baseline wants stage:{devices} alone")
