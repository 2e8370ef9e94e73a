"""Optimizers on placed trees do what optax does on one leaf per variable; no pipeline is compiled.

The other side of every comparison is optax itself, on trees that are made of the canonical one by
hand: `plain`.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding

import jaxpipe
from jaxpipe.models.transformer import TransformerConfig, transformer
from jaxpipe.pipeline import check as check_module
from jaxpipe.pipeline.pipelined import Pipelined
from jaxpipe.pipeline.update import program

D = 8


class Layer(nnx.Module):
  def __init__(self, rngs):
    self.inner = nnx.Linear(D, D, rngs=rngs)

  def __call__(self, x, context):
    return x + jnp.tanh(self.inner(x))


class Wide(nnx.Module):
  """Unlike `Layer`, with oblong matrices and a scalar."""

  def __init__(self, rngs):
    self.up = nnx.Linear(D, 12, use_bias=False, rngs=rngs)
    self.down = nnx.Linear(12, D, use_bias=False, rngs=rngs)
    self.scale = nnx.Param(jnp.ones(()))

  def __call__(self, x, context):
    return self.scale * self.down(self.up(x))


class Embed(nnx.Module):
  def __init__(self, rngs):
    self.inner = nnx.Linear(4, D, use_bias=False, rngs=rngs)

  def __call__(self, batch):
    return self.inner(batch["x"])


class Head(nnx.Module):
  def __init__(self, rngs):
    self.inner = nnx.Linear(D, 2, use_bias=False, rngs=rngs)

  def __call__(self, x, batch):
    return jnp.sum((self.inner(x)[:, 0] - batch["y"]) ** 2), 1.0 * len(batch["y"]), {}


BATCH = {"x": jnp.ones((8, 4)), "y": jnp.ones(8)}
STACKS = {
  "stacked": [Layer] * 8,
  "packed": [Layer, Layer, Wide, Layer],
}


@functools.cache
def pipelined(kind: str, mesh: str, name: str = "1f1b") -> Pipelined:
  stack = jaxpipe.LayerStack(embed=Embed, layers=STACKS[kind], head=Head)
  made = jaxpipe.make_mesh(mesh)
  schedule = jaxpipe.make_schedule(name, devices=made.shape["stage"], microbatches=4)
  return Pipelined(stack=stack, schedule=schedule, mesh=made, options={})


def some_values(pipe: Pipelined, seed: int) -> Any:
  """A canonical tree of random values."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), pipe.stack.param_shapes()
  )


def plain(pipe: Pipelined, tree: Any) -> Any:
  """A canonical tree as nested dicts with one leaf per variable, taken apart by hand."""
  runs = tree["layers"] if isinstance(tree["layers"], tuple) else (tree["layers"],)
  layers: list[Any] = []
  for run in runs:
    for i in range(jax.tree.leaves(run)[0].shape[0]):
      layers.append(jax.tree.map(lambda leaf, i=i: leaf[i], run))
  numbered = {str(i): layer for i, layer in enumerate(layers)}
  return {"embed": tree["embed"], "head": tree["head"], "layers": numbered}


def path_of(keys: Any) -> str:
  return jax.tree_util.keystr(keys, simple=True, separator="/")


def matrices(tree: Any) -> Any:
  return jax.tree.map(lambda leaf: leaf.ndim > 1, tree)


def by_shape(tree: Any) -> Any:
  return jax.tree.map(lambda leaf: "square" if leaf.shape == (D, D) else "rest", tree)


def third_layer(tree: Any) -> Any:
  return jax.tree.map_with_path(lambda keys, _: path_of(keys).startswith("layers/3/"), tree)


def chained(*head: Any, tail: Any = None) -> Any:
  return optax.chain(*head, tail or optax.sgd(1e-2, momentum=0.9))


OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
  "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4),
  "adaptive_grad_clip": lambda: chained(optax.adaptive_grad_clip(1e-3)),
  "adamw of matrices": lambda: optax.adamw(1e-2, weight_decay=10.0, mask=matrices),
  "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(1e-2), 3),
  "centralize": lambda: chained(optax.centralize()),
  "clip_by_block_rms": lambda: chained(optax.clip_by_block_rms(1e-3)),
  "clip_by_global_norm": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.lamb(1e-2)),
  "fromage": lambda: optax.fromage(1e-2),
  "gradient noise": lambda: chained(optax.add_noise(0.1, 0.5, 0)),
  "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(
    optax.linear_schedule(1e-2, 0.0, 10)
  ),
  "lamb": lambda: optax.lamb(1e-2),
  "lars": lambda: optax.lars(1e-2),
  "lion": lambda: optax.lion(1e-2),
  "masked by path": lambda: optax.masked(optax.lamb(1e-2), third_layer),
  "muon": lambda: optax.contrib.muon(1e-2),
  "MultiSteps": lambda: optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
  "novograd": lambda: optax.novograd(1e-2),
  "partition by shape": lambda: optax.partition(
    {"square": chained(optax.clip_by_global_norm(0.1)), "rest": optax.lamb(1e-2)}, by_shape
  ),
  "prodigy": lambda: optax.contrib.prodigy(1.0),
  "schedule_free": lambda: optax.contrib.schedule_free_adamw(1e-2),
  # Optax's own fails on variables without dims.
  "sm3": lambda: optax.masked(
    optax.sm3(1e-2), lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 0, tree)
  ),
}
GRID = list(itertools.product(OPTIMIZERS, STACKS, ["stage:4", "stage:2,fsdp:2"]))


def largest(got: Any, want: Any) -> float:
  """Largest difference of any leaf, of arrays of any dtype; keys are compared bit for bit."""

  def one(a: Any, b: Any) -> float:
    if jnp.issubdtype(b.dtype, jax.dtypes.prng_key):
      a, b = jax.random.key_data(a), jax.random.key_data(b)
    return float(np.abs(np.asarray(a, float) - np.asarray(b, float)).max(initial=0))

  assert jax.tree.structure(got) == jax.tree.structure(want)
  return max(jax.tree.leaves(jax.tree.map(one, got, want)), default=0.0)


def three_steps(pipe: Pipelined, tx: optax.GradientTransformation) -> tuple[float, Any, Any]:
  """How far parameters are apart after three steps; the placed state, and optax's own."""
  first, *grads = (some_values(pipe, seed) for seed in range(4))
  placed, tree = pipe.place(first), plain(pipe, first)
  ours = pipe.optimizer(tx)
  state, theirs = ours.init(placed), tx.init(tree)

  @jax.jit
  def step(grads: Any, state: Any, params: Any) -> Any:
    updates, state = ours.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  for grad in grads:
    placed, state = step(pipe.place(grad), state, placed)
    updates, theirs = tx.update(plain(pipe, grad), theirs, tree)
    tree = optax.apply_updates(tree, updates)
  return largest(plain(pipe, pipe.unplace(placed)), tree), state, theirs


@pytest.mark.sampled("optimizer, kind, mesh", GRID, 3)
def test_three_steps_are_those_of_optax(optimizer: str, kind: str, mesh: str) -> None:
  pipe = pipelined(kind, mesh)
  error, state, theirs = three_steps(pipe, OPTIMIZERS[optimizer]())
  assert error < 1e-6
  canonical = pipe.unplace(state)
  # Sums of squares of up to a hundred elements are among the states.
  assert largest(canonical, theirs) < 1e-4
  again = pipe.place(canonical)
  assert largest(again, state) == 0
  for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
    assert a.dtype == b.dtype and a.sharding.is_equivalent_to(b.sharding, b.ndim)


@pytest.mark.sampled(
  "optimizer, kind, mesh", [case for case in GRID if case[0] in ("adafactor", "lamb", "sm3")], 1
)
def test_results_of_large_variables_one_at_a_time_are_the_same(
  optimizer: str, kind: str, mesh: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(program, "LARGE", 1)
  assert three_steps(pipelined(kind, mesh), OPTIMIZERS[optimizer]())[0] < 1e-6


@pytest.mark.sampled(
  "kind, mesh, schedule",
  [
    ("stacked", "stage:4", "chimera"),
    ("packed", "stage:2", "chimera"),
    ("stacked", "stage:2,fsdp:2,data:2", "zb-v"),
  ],
  1,
)
def test_a_norm_counts_replicas_and_ends_once(kind: str, mesh: str, schedule: str) -> None:
  tx = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(1.0))
  assert three_steps(pipelined(kind, mesh, schedule), tx)[0] < 1e-6


@pytest.mark.parametrize(
  ("head", "mesh"), [("last", "stage:2,tensor:2"), ("sharded", "stage:2,fsdp:2")]
)
def test_tables_cut_over_other_axes_are_whole_to_the_optimizer(head: str, mesh: str) -> None:
  config = TransformerConfig(
    vocabulary_size=16, layers=4, width=8, heads=2, kv_heads=2, mlp_width=16
  )
  schedule = jaxpipe.make_schedule("1f1b", devices=2, microbatches=4, head=head)
  made = jaxpipe.make_mesh(mesh)
  pipe = Pipelined(stack=transformer(config), schedule=schedule, mesh=made, options={})
  tx = chained(optax.clip_by_block_rms(0.1), optax.scale_by_trust_ratio(), optax.centralize())
  assert three_steps(pipe, tx)[0] < 1e-6


def test_joined_tensors_and_unknown_arguments_are_refused_by_name() -> None:
  pipe = pipelined("packed", "stage:4")
  params = pipe.place(some_values(pipe, 0))
  flat = pipe.optimizer(optax.flatten(optax.adam(1e-2)))
  with pytest.raises(ValueError, match=r"joins the whole tensor of embed/inner/kernel"):
    flat.update(params, flat.init(params), params)
  plain_adam = pipe.optimizer(optax.adam(1e-2))
  with pytest.raises(ValueError, match=r"takes no further arguments, and value was given"):
    pipe.optimizer(optax.scale(1.0)).update(params, optax.EmptyState(), value=1.0)
  search = pipe.optimizer(optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(3)))
  with pytest.raises(ValueError, match=r"argument value_fn is a function"):
    state = search.init(params)
    search.update(params, state, params, value=1.0, grad=params, value_fn=lambda p: 0.0)
  with pytest.raises(ValueError, match=r"place it first"):
    plain_adam.init(some_values(pipe, 0))


def test_further_arguments_reach_the_transformation() -> None:
  def update(updates: Any, state: Any, params: Any = None, *, value: Any, other: Any) -> Any:
    return jax.tree.map(lambda u, o: u * value + jnp.sum(o), updates, other), state

  tx = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
  pipe = pipelined("packed", "stage:2,fsdp:2")
  grads, other = some_values(pipe, 0), some_values(pipe, 1)
  got, _ = pipe.optimizer(tx).update(
    pipe.place(grads), optax.EmptyState(), value=2.0, other=pipe.place(other)
  )
  want, _ = update(plain(pipe, grads), None, value=2.0, other=plain(pipe, other))
  assert largest(plain(pipe, pipe.unplace(got)), want) < 1e-5


def test_hyperparameters_of_a_placed_state_can_be_replaced() -> None:
  pipe = pipelined("stacked", "stage:2")
  tx = pipe.optimizer(optax.inject_hyperparams(optax.sgd)(1e-2))
  grads = pipe.place(some_values(pipe, 0))
  state = tx.init(grads)
  state.hyperparams["learning_rate"] = 0.5
  updates, after = tx.update(grads, state, grads)
  assert largest(updates, jax.tree.map(lambda leaf: -0.5 * leaf, grads)) == 0
  assert after.hyperparams["learning_rate"] == 0.5


def test_a_state_goes_through_orbax_as_it_is(tmp_path: Any) -> None:
  ocp = pytest.importorskip("orbax.checkpoint")
  pipe = pipelined("packed", "stage:2,fsdp:2")
  tx = pipe.optimizer(
    optax.chain(OPTIMIZERS["adafactor"](), optax.inject_hyperparams(optax.sgd)(1e-2, momentum=0.9))
  )
  state = tx.init(pipe.place(some_values(pipe, 0)))
  with ocp.StandardCheckpointer() as saver:
    saver.save(tmp_path / "state", state)
  with ocp.StandardCheckpointer() as saver:
    found = saver.restore(tmp_path / "state", jax.tree.map(ocp.utils.to_shape_dtype_struct, state))
  assert largest(found, state) == 0
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
    assert a.sharding == b.sharding


def test_the_memory_report_counts_a_state_made_by_variable() -> None:
  pipe = pipelined("stacked", "stage:2,fsdp:2")
  for tx in (pipe.optimizer(OPTIMIZERS["adafactor"]()), pipe.optimizer(optax.adam(1e-2))):
    report = jaxpipe.memory_report(pipe.stack, pipe.schedule, pipe.mesh, BATCH, optimizer=tx)
    state = tx.init(pipe.place(some_values(pipe, 0)))
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    assert report.bytes["optimizer"] == held


def test_states_of_plain_optax_are_placed_as_the_parameters() -> None:
  pipe = pipelined("stacked", "stage:4")
  params = some_values(pipe, 0)
  state = optax.adam(1e-2).init(params)
  placed = pipe.place(state)
  kernel = placed[0].mu["layers"]["inner"]["kernel"]
  assert [shard.data.shape for shard in kernel.addressable_shards] == [(2, D, D)] * 4
  assert largest(pipe.unplace(placed), state) == 0


W = 128


class Matrix(nnx.Module):
  def __init__(self, rngs):
    self.up = nnx.Linear(D, W, rngs=rngs)
    self.inner = nnx.Linear(W, W, rngs=rngs)
    self.down = nnx.Linear(W, D, rngs=rngs)

  def __call__(self, x, context):
    return x + self.down(self.inner(self.up(x)))


HEAVY = sorted(set(OPTIMIZERS) - {"MultiSteps", "apply_if_finite", "prodigy", "schedule_free"})
MEMORY = list(itertools.product(HEAVY, [None, [4, 4]], ["stage:2", "stage:2,fsdp:2"]))


@pytest.mark.sampled("optimizer, partition, mesh", MEMORY, 2)
def test_an_update_holds_what_adam_holds_and_two_variables(
  optimizer: str, partition: list[int] | None, mesh: str
) -> None:
  stack = jaxpipe.LayerStack(embed=Embed, layers=[Matrix] * 8, head=Head, partition=partition)
  made = jaxpipe.make_mesh(mesh)
  schedule = jaxpipe.make_schedule("1f1b", devices=2, microbatches=4)
  pipe = Pipelined(stack=stack, schedule=schedule, mesh=made, options={})
  params = pipe.place(some_values(pipe, 0))

  def held(tx: optax.GradientTransformation, state: Any) -> int:
    places = jax.tree.map(lambda leaf: leaf.sharding, (params, state))
    args = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
      (params, state, params),
    )
    memory = jax.jit(tx.update, out_shardings=places).lower(*args).compile().memory_analysis()
    assert memory is not None
    return int(
      memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    )

  adam, ours = optax.adamw(1e-2), pipe.optimizer(OPTIMIZERS[optimizer]())
  moments = jax.tree.map(
    lambda leaf: (
      leaf
      if isinstance(leaf.sharding, NamedSharding)
      else jax.device_put(leaf, NamedSharding(made, jax.sharding.PartitionSpec()))
    ),
    adam.init(params),
  )
  # By optax alone, muon takes eight as large for one matrix; pieces are gathered into one more.
  variables = 9 if optimizer == "muon" else 2
  assert held(ours, ours.init(params)) <= held(adam, moments) + variables * W * W * 4


def test_check_compares_updates_with_those_of_plain_leaves(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  pipe = pipelined("stacked", "stage:2")
  report = jaxpipe.check(
    pipe.stack, pipe.schedule, pipe.mesh, BATCH, unroll="none", optimizer=optax.lamb(1e-2)
  )
  assert report.ok and report.worst < 1e-5
  assert "layers/3/inner/kernel" in report.update_errors
  assert "update of layers/3/inner/kernel" in str(report)
  # What the transformation makes of stacked leaves is something else, and seen.
  monkeypatch.setattr(check_module, "by_variable", lambda tx, *_: tx)
  params, grads = some_values(pipe, 0), some_values(pipe, 1)
  errors = check_module._update_errors(
    optax.lamb(1e-2), pipe.stack, pipe.schedule, pipe.mesh, params, grads
  )
  assert max(errors.values()) > 0.1
