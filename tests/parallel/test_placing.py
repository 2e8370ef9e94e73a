"""Placement moves labels, so that where a layer went can be read off it; and it compiles once."""

import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from networks import layer_kinds, unlike

import jaxpipe
from jaxpipe.parallel.mesh import MeshError, make_mesh, parse_mesh
from jaxpipe.parallel.placing import layer_order
from jaxpipe.parallel.rules import NONE
from jaxpipe.schedules import Placement, Schedule


class Stack:
  depth = 12
  rules = NONE
  uniform = True
  shared_rows: dict = {}  # noqa: RUF012 - nothing writes it

  def laid_out(self, schedule):
    return self


def schedule(placement):
  return Schedule("labels", placement, 1, ((),) * placement.devices)


@pytest.mark.parametrize(
  "placement, want",
  [
    (Placement.loop(3), [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]),
    (Placement.loop(3, 2), [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]),
    (Placement.v(3), [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]),
    (Placement.loop(1, 4), [list(range(12))]),
  ],
)
def test_every_device_holds_its_own_layers(placement, want):
  plan, mesh = schedule(placement), make_mesh({"stage": placement.devices})
  labels = {"embed": jnp.zeros(2), "layers": jnp.arange(12), "head": jnp.zeros(2)}
  placed = jaxpipe.place(labels, Stack(), plan, mesh)
  shards = sorted(placed["layers"].addressable_shards, key=lambda s: s.index[0].start or 0)
  assert [s.data.tolist() for s in shards] == want
  assert [s.device for s in shards] == list(mesh.devices.flat)
  assert jaxpipe.unplace(placed, Stack(), plan)["layers"].tolist() == list(range(12))
  assert labels["layers"].tolist() == list(range(12))


@pytest.fixture
def compiled():
  """A list that grows by one entry for every program that XLA compiles."""
  programs = []

  def listen(event, seconds, **_):
    if event.endswith("backend_compile_duration"):
      programs.append(seconds)

  jax.monitoring.register_event_duration_secs_listener(listen)
  yield programs
  jax.monitoring.unregister_event_duration_listener(listen)


def packed_case():
  """A stack of unlike modules, its parameters, and a schedule of two chunks a device for it."""
  stack = unlike.convolutions()
  plan = jaxpipe.make_schedule("interleaved-1f1b", devices=2, microbatches=2)
  return stack, stack.init(jax.random.key(0), unlike.images(4)), plan


def same(a, b):
  """Whether two trees have the same structure and hold the same bits."""
  equal = jax.tree.map(np.array_equal, jax.device_get(a), jax.device_get(b))
  return jax.tree.all(equal)


def test_a_packed_stack_compiles_its_places_once(float64, compiled):
  stack, params, plan = packed_case()
  mesh = make_mesh("stage:2")
  placed = jaxpipe.place(params, stack, plan, mesh)
  back = jaxpipe.unplace(placed, stack, plan)
  assert len(compiled) > 0
  compiled.clear()
  assert same(jaxpipe.place(params, stack, plan, mesh), placed)
  assert same(jaxpipe.unplace(placed, stack, plan), back)
  # Another schedule of the same placement, in an object of its own, has the same places.
  other = jaxpipe.make_schedule("looped-bfs", devices=2, microbatches=4)
  assert other.placement == plan.placement
  assert same(jaxpipe.place(params, stack, other, mesh), placed)
  assert compiled == []
  assert same(back, params)


def test_a_uniform_stack_compiles_its_places_once(float64, compiled):
  stack = layer_kinds.stack("linear", layers=4)
  plan = jaxpipe.make_schedule("interleaved-1f1b", devices=2, microbatches=2)
  mesh = make_mesh("stage:2")
  params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), stack.param_shapes())
  placed = jaxpipe.place(params, stack, plan, mesh)
  jaxpipe.unplace(placed, stack, plan)
  compiled.clear()
  jaxpipe.unplace(jaxpipe.place(params, stack, plan, mesh), stack, plan)
  assert compiled == []


def test_places_of_a_packed_stack_are_those_that_its_layout_says(float64):
  stack, params, plan = packed_case()
  mesh, order = make_mesh("stage:2"), layer_order(4, plan)
  # Another placement of the same stack, another dtype, and state: each has a program of its own.
  narrow = jaxpipe.make_schedule("1f1b", devices=2, microbatches=2)
  state = stack.init_state(jax.random.key(0), unlike.images(4))
  for tree in (params, jax.tree.map(lambda a: a.astype(jnp.float32), params), state):
    rows = jax.device_get(jax.jit(stack.laid_out(plan).pack)(tree))
    want = {**rows, "layers": jax.tree.map(lambda row: row[order], rows["layers"])}
    assert same(jaxpipe.place(tree, stack, plan, mesh), want)
    want = jax.jit(stack.laid_out(narrow).pack)(tree)
    assert same(jaxpipe.place(tree, stack, narrow, mesh), want)
    assert same(jaxpipe.unplace(jaxpipe.place(tree, stack, plan, mesh), stack, plan), tree)


def test_a_stack_is_let_go_with_its_compiled_places(float64):
  stack, params, plan = packed_case()
  jaxpipe.unplace(jaxpipe.place(params, stack, plan, make_mesh("stage:2")), stack, plan)
  gone = weakref.ref(stack)
  del stack
  gc.collect()
  assert gone() is None


def test_predictions_compile_once_and_let_their_stack_go(compiled):
  batch = {"x": jnp.ones((4, 3))}
  layers = [functools.partial(nnx.Linear, 3, 5), functools.partial(nnx.Linear, 5, 2)]
  options = dict(mesh="stage:2", microbatches=2)
  pipe = jaxpipe.pipeline(lambda y, _: y.sum(-1), layers, batch, **options)
  params = pipe.init(jax.random.key(0), batch)
  first = pipe.predict(params, batch)
  compiled.clear()
  assert same(pipe.predict(params, batch), first)
  assert compiled == []
  gone = weakref.ref(pipe.stack)
  del pipe
  gc.collect()
  assert gone() is None


def test_layer_counts_that_do_not_divide_name_what_does():
  with pytest.raises(ValueError, match=r"12 layers cannot fill 5 stages evenly; use 4 stages"):
    layer_order(12, schedule(Placement.loop(5)))


@pytest.mark.parametrize(
  "text, message",
  [
    ("stage:2,stage:2", "axis 'stage' stands twice"),
    ("stages:2", "no axis 'stages'; the axes are stage, data"),
    ("stage:0", "stage:0 is not a size"),
    ("stage:two", "stage:two is not a size"),
    ("stage", "stage: is not a size"),
    ("stage:4,data:3", "needs 12 devices but there are 8"),
  ],
)
def test_meshes_that_cannot_be(text, message):
  with pytest.raises(MeshError, match=message):
    make_mesh(text)


def test_stage_is_the_outermost_axis():
  names = ["stage", "data", "fsdp", "expert", "sequence", "tensor"]
  assert list(parse_mesh("data:2,stage:4")) == names
  mesh = make_mesh("data:2,stage:4")
  assert np.array_equal(mesh.devices[0].flat, np.array(jax.devices()[:2]))
