"""Predictions over the pipeline equal the user's own modules, called one after the other."""

import functools
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec
from networks import lm

import jaxpipe
from jaxpipe.stack.forward import modules, run_layers


def rows(B):
  return {"x": np.random.default_rng(B).normal(size=(B, 6)).astype(np.float32)}


def loss(y, batch):
  return jax.tree.leaves(y)[0].astype(jnp.float32).reshape(len(batch["x"]), -1).sum(-1)


class Add(nnx.Module):
  """One of several alike; in evaluation its dropout does nothing."""

  def __init__(self, rngs):
    self.inner = nnx.Linear(6, 6, rngs=rngs)

  def __call__(self, x, context=None):
    h = self.inner(x)
    return x + (h if context is None else context.dropout(h, 0.5))


def alike(count):
  return [Add(nnx.Rngs(i)) for i in range(count)]


def called(layers, x):
  for layer in layers:
    x = layer(x)
  return x


def made(layers, mesh, name):
  pipe = jaxpipe.pipeline(loss, layers, rows(8), mesh=mesh, schedule=name, microbatches=2)
  return pipe, pipe.init(jax.random.key(0), rows(8))


@pytest.mark.parametrize(
  "mesh, name, sizes",
  [
    ("stage:2,data:2", "gpipe", (8, 5)),
    ("stage:2", "interleaved-1f1b", (1,)),
    ("stage:2", "chimera", (7,)),
    ("stage:2", "skippipe", (4,)),  # all layers, though its microbatches skip some
  ],
)
def test_any_number_of_rows_passes_all_layers(mesh, name, sizes):
  layers = alike(4)
  pipe, params = made(layers, mesh, name)
  for B in sizes:
    batch = rows(B)
    y = pipe.predict(params, batch)
    np.testing.assert_allclose(y, called(layers, batch["x"]), rtol=1e-5, atol=1e-6)
    assert y.sharding.is_fully_replicated and y.devices() == {*pipe.mesh.devices.flat}


def test_rows_lie_as_they_came():
  layers = alike(2)
  pipe, params = made(layers, "stage:2,data:2", "gpipe")
  want = called(layers, rows(8)["x"])
  here = NamedSharding(pipe.mesh, Spec(("data",), None))
  there = jax.devices()[5]
  for place, same in (
    (
      here,
      lambda y: y.sharding.spec == Spec(("data",)) or y.sharding.is_equivalent_to(here, y.ndim),
    ),
    (there, lambda y: y.devices() == {there}),
  ):
    y = pipe.predict(params, jax.device_put(rows(8), place))
    assert same(y), y.sharding
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)
  inside = jax.jit(pipe.predict)(params, jax.tree.map(jnp.asarray, rows(3)))
  np.testing.assert_allclose(inside, called(layers, rows(3)["x"]), rtol=1e-5, atol=1e-6)


class Several(nnx.Module):
  def __call__(self, x):
    return {
      "half": x.astype(jnp.bfloat16),
      "most": x.argmax(-1),
      "sign": x > 0,
      "small": x[:, :1].astype(jnp.float16),
    }


def test_outputs_may_be_trees_of_any_dtypes():
  layers = [nnx.Linear(6, 5, rngs=nnx.Rngs(0)), Several()]
  pipe, params = made(layers, "stage:2", "1f1b")
  batch = rows(3)
  y, want = pipe.predict(params, batch), called(layers, batch["x"])
  assert jax.tree.map(lambda a: (a.shape, a.dtype), y) == jax.tree.map(
    lambda a: (a.shape, a.dtype), want
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), rtol=1e-2),
    y,
    want,
  )


def test_outputs_without_rows_are_refused():
  layers = [functools.partial(nnx.Linear, 6, 5), lambda x: {"h": x, "zaux": x.sum()}]
  pipe, params = made(layers, "stage:2", "1f1b")
  with pytest.raises(ValueError, match=r"y\['zaux'\] of shape \(\) for a microbatch of 4 rows"):
    pipe.predict(params, rows(8))


@pytest.mark.parametrize(
  "mesh, head",
  [("stage:2,tensor:2", "last"), ("stage:2", "sharded")],
)
def test_axes_inside_layers_are_put_together(mesh, head):
  """Copies along `tensor`, and a vocabulary that is cut over the stages."""
  stack = lm.stack(layers=2, dtype="float32", param_dtype="float32", kv_heads=2)
  schedule = jaxpipe.make_schedule("1f1b", devices=2, microbatches=2, head=head)
  pipe = jaxpipe.pipeline(None, stack, mesh=mesh, schedule=schedule)
  batch = lm.batch(3, length=4)
  params = stack.init(jax.random.key(0), batch)
  embed, *layers, _ = modules(stack, params, {})
  want = run_layers(layers, embed(batch), batch)
  y = pipe.predict(pipe.place(params), batch)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), y, want)


def test_positions_that_layers_have_cut_are_refused():
  stack = lm.stack(layers=2, dtype="float32", param_dtype="float32")
  pipe = jaxpipe.pipeline(None, stack, mesh="stage:2,sequence:2", microbatches=2)
  with pytest.raises(ValueError, match="over sequence:2; unplace the parameters"):
    pipe.predict({}, lm.batch(2))


PROCESS = """
import functools, sys
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
import jaxpipe
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", 2, int(sys.argv[1]))
rows = lambda n: {"x": np.random.default_rng(n).normal(size=(n, 6)).astype(np.float32)}
layers = [nnx.Linear(6, 6, rngs=nnx.Rngs(i)) for i in range(4)]
loss = lambda y, batch: (y**2).sum(-1)
for modules in (layers, [*layers, jnp.tanh]):
  pipe = jaxpipe.pipeline(loss, modules, rows(4), mesh="stage:4", schedule="gpipe", microbatches=2)
  assert pipe.stack.uniform == (modules is layers) and jax.local_device_count() == 2
  params = pipe.init(jax.random.key(0), rows(4))
  held = sum(s.data.nbytes for leaf in jax.tree.leaves(params) for s in leaf.addressable_shards)
  assert held <= sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 2
  batch = rows(3)
  y = pipe.predict(params, batch)
  want = batch["x"]
  for module in modules:
    want = module(want)
  np.testing.assert_allclose(np.asarray(y), want, rtol=1e-5, atol=1e-6)
stack = jaxpipe.LayerStack.from_modules(layers, loss=loss, batch=rows(4))
report = jaxpipe.check(stack, pipe.schedule, pipe.mesh, rows(4), unroll="none")
assert report.ok and len(report.errors) == 2, report
wide = [nnx.Linear(256, 256, rngs=nnx.Rngs(i)) for i in range(8)]
batch = {"x": np.ones((2, 256), np.float32)}
pipe = jaxpipe.pipeline(loss, wide, batch, mesh="stage:4", schedule="gpipe", microbatches=2)
params = pipe.init(jax.random.key(0), batch)
memory = jax.jit(pipe.predict).lower(params, batch).compile().memory_analysis()
peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(f"{peak:,} bytes of a device, {whole:,} of the model")
assert peak < 1.05 * whole * 3 / 8
print("equal")
"""


def test_two_processes_predict_and_check():
  """Neither has the other's arrays; each device has the parameters of its own stages alone.

  Of a model of eight matrices a device holds two and a copy of the one that runs.
  """
  with socket.create_server(("127.0.0.1", 0)) as server:
    port = str(server.getsockname()[1])
  flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
  env = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
  started = [
    subprocess.Popen(
      [sys.executable, "-c", PROCESS, str(i), port],
      env=env,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for i in range(2)
  ]
  try:
    said = [process.communicate(timeout=180)[0] for process in started]
  finally:
    for process in started:
      process.kill()
  assert all(text.splitlines()[-1:] == ["equal"] for text in said), "\n".join(said)
