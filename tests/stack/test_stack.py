"""Stacks: what they refuse, how they are tied, and how they are initialised."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from networks import lm

import jaxpipe
from jaxpipe.stack.stack import LayerStack, StackError

ROWS = {"tokens": np.zeros((2, 3), np.int32), "targets": np.zeros((2, 3), np.int32)}


class Embed(nnx.Module):
  def __init__(self, rngs):
    self.table = nnx.Param(jax.random.normal(rngs.params(), (5, 4)))

  def __call__(self, batch):
    return jnp.take(self.table[...], batch["tokens"], axis=0)


class Head(nnx.Module):
  def __init__(self, rngs):
    self.out = nnx.Linear(4, 5, rngs=rngs)

  def __call__(self, x, batch):
    return jnp.sum(self.out(x) ** 2), jnp.float32(x.shape[0]), {}


class Layer(nnx.Module):
  def __init__(self, rngs, width=4, extra=None):
    self.linear = nnx.Linear(4, width, rngs=rngs)
    self.extra = extra(rngs) if extra else None

  def __call__(self, x, context):
    return x[..., : self.linear.out_features] + self.linear(x)


def make(layers, head=Head):
  return LayerStack(embed=Embed, layers=layers, head=head)


def test_random_streams_of_the_ends_are_refused_with_the_remedy():
  class Noisy(Head):
    def __init__(self, rngs):
      super().__init__(rngs)
      self.drop = nnx.Dropout(0.1, rngs=rngs)

  with pytest.raises(StackError, match=r"head \(Noisy\) keeps a random stream, and only layers"):
    make([Layer], Noisy)


def test_no_layers():
  with pytest.raises(StackError, match="at least one layer"):
    make([])


class Scaled(nnx.Module):
  def __init__(self, rngs, scale):
    self.scale = nnx.Param(jnp.full((4,), scale))

  def __call__(self, x, context):
    return x * self.scale[...][None, None, :]


@pytest.mark.parametrize("devices", [None, 2])
def test_each_layer_starts_as_its_own_factory_says(devices):
  """Layers of one kind share their code, not their factory: depth-scaled starts are common."""
  stack = make([functools.partial(Scaled, scale=float(i)) for i in (3, 1, 4, 1)])
  where = ()
  if devices:
    schedule = jaxpipe.make_schedule("gpipe", devices=devices, microbatches=1)
    where = (schedule, jaxpipe.make_mesh(f"stage:{devices}"))
  params = stack.init(jax.random.key(0), ROWS, *where)
  assert params["layers"]["scale"][:, 0].tolist() == [3, 1, 4, 1]


@pytest.mark.parametrize("array", [np.ones(3), jnp.ones(3)])
def test_arrays_outside_parameters_are_refused(array):
  def build(rngs):
    layer = Layer(rngs)
    layer.mask = nnx.data(array)
    return layer

  with pytest.raises(
    StackError, match=r"layers\[0\] \(Layer\) holds the array mask outside any nnx.Param"
  ):
    make([build])


def test_integer_parameters_are_refused():
  with pytest.raises(StackError, match=r"parameter \['extra'\] is int32, which has no gradient"):
    make([lambda rngs: Layer(rngs, extra=lambda r: nnx.Param(jnp.arange(3)))])


def test_a_head_that_returns_the_loss_alone():
  class Alone(Head):
    def __call__(self, x, batch):
      return jnp.sum(self.out(x))

  with pytest.raises(StackError, match=r"head must return \(loss_sum, weight, metrics\)"):
    make([Layer], Alone).init(jax.random.key(0), ROWS)


def test_a_schedule_without_a_mesh():
  schedule = jaxpipe.make_schedule("gpipe", devices=1, microbatches=1)
  with pytest.raises(StackError, match="a schedule and a mesh, or neither"):
    make([Layer]).init(jax.random.key(0), ROWS, schedule)


def test_a_layer_that_changes_the_shape_of_x():
  with pytest.raises(StackError, match=r"takes float32\[2, 3, 4\] but returns float32\[2, 3, 2\]"):
    make([lambda rngs: Layer(rngs, width=2)]).init(jax.random.key(0), ROWS)


def test_a_head_that_does_not_sum():
  class Means(Head):
    def __call__(self, x, batch):
      return self.out(x)[..., 0], jnp.float32(1), {}

  with pytest.raises(StackError, match=r"loss_sum has shape \(2, 3\).*sum over the rows"):
    make([Layer], Means).init(jax.random.key(0), ROWS)


def test_tied_leaves_must_be_alike():
  with pytest.raises(StackError, match="tied: head/out/kernel"):
    LayerStack(embed=Embed, layers=[Layer], head=Head, tied={"head/out/kernel": "embed/table"})


def test_tied_parameters_exist_once_and_sum_their_gradients():
  stack = lm.stack(dtype="float32", param_dtype="float32", dropout=0.0)
  params = stack.init(jax.random.key(0), lm.batch(2))
  assert "table" not in params["head"]
  assert (stack.head_params(params)["table"] == params["embed"]["table"]).all()
  ones = jax.tree.map(jnp.ones_like, {**params, "head": stack.head_params(params)})
  untied = stack.untie(ones)
  assert (untied["embed"]["table"] == 2).all() and "table" not in untied["head"]
  assert jax.tree.structure(untied) == jax.tree.structure(params)


class Tables(nnx.Module):
  """Entries of a list, which Flax numbers."""

  def __init__(self, rngs):
    self.tables = nnx.List(nnx.Param(jnp.full((3,), float(i))) for i in range(2))

  def __call__(self, *args):
    return args


def test_entries_of_a_list_can_be_tied():
  """Paths are strings, and the keys of a list are numbers."""
  stack = LayerStack(
    embed=Tables, layers=[Layer], head=Tables, tied={"head/tables/0": "embed/tables/1"}
  )
  shapes = stack.param_shapes()
  assert [*shapes["head"]["tables"]] == [1]
  ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes)
  head = stack.head_params(ones)
  assert [*sorted(head["tables"])] == [0, 1]
  untied = stack.untie({**ones, "head": head})
  assert (untied["embed"]["tables"][1] == 2).all() and (untied["embed"]["tables"][0] == 1).all()
  assert jax.tree.structure(untied) == jax.tree.structure(ones)


@pytest.mark.parametrize("devices, data", [(1, 1), (2, 2), (4, 1)])
def test_placed_initialisation_equals_the_unpipelined_one(devices, data):
  stack = lm.stack(8, dtype="float32", param_dtype="float32")
  schedule = jaxpipe.make_schedule("1f1b", devices=devices, microbatches=2)
  mesh = jaxpipe.make_mesh(f"stage:{devices},data:{data}")
  whole = stack.init(jax.random.key(5), lm.batch(4))
  placed = stack.init(jax.random.key(5), lm.batch(4), schedule, mesh)
  jax.tree.map(np.testing.assert_array_equal, jaxpipe.unplace(placed, stack, schedule), whole)
  kernel = placed["layers"]["up"]["kernel"]
  assert {s.data.shape[0] for s in kernel.addressable_shards} == {8 // devices}


def test_placed_initialisation_never_holds_the_whole():
  """No device of the compiled program has room for another device's layers."""
  stack = lm.stack(8, width=64, dtype="float32", param_dtype="float32")
  schedule = jaxpipe.make_schedule("1f1b", devices=8, microbatches=1)
  mesh = jaxpipe.make_mesh("stage:8")
  init = jax.jit(lambda key: stack.init(key, lm.batch(1), schedule, mesh))
  compiled = init.lower(jax.random.key(0)).compile()
  shapes = jax.tree.leaves(stack.param_shapes()["layers"])
  layer = sum(int(np.prod(s.shape)) * 4 for s in shapes) // 8
  memory = compiled.memory_analysis()
  assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 4 * layer
  assert "all-gather" not in compiled.as_text()


class CountingEmbed(Embed):
  """An embedding beside which a scalar travels: leaves are ordered by name, and it is the first."""

  def __call__(self, batch):
    return {"added": jnp.float32(0), "h": super().__call__(batch)}


class CountingLayer(Layer):
  def __call__(self, x, context):
    h = super().__call__(x["h"], context)
    return {"added": x["added"] + jnp.sum(h**2), "h": h}


class CountingHead(Head):
  def __call__(self, x, batch):
    loss, weight, metrics = super().__call__(x["h"], batch)
    return loss + 0.1 * x["added"], weight, metrics


def test_the_first_leaf_of_x_may_be_a_scalar():
  stack = LayerStack(embed=CountingEmbed, layers=[CountingLayer] * 2, head=CountingHead)
  schedule = jaxpipe.make_schedule("1f1b", devices=2, microbatches=2)
  report = jaxpipe.check(stack, schedule, jaxpipe.make_mesh("stage:2"), ROWS, unroll="none")
  assert report.ok, str(report)


@pytest.mark.parametrize("batch", [{"scale": np.float32(1)}, {}])
def test_a_batch_without_rows(batch):
  class Constant(Embed):
    def __call__(self, batch):
      return jnp.zeros((2, 3, 4))

  stack = LayerStack(embed=Constant, layers=[Layer], head=Head)
  with pytest.raises(StackError, match="no leaf of the batch has rows"):
    stack.init(jax.random.key(0), batch)


class Trained(nnx.Variable):
  """What a filter may name."""


def test_a_filter_says_what_a_uniform_stack_creates():
  class Own(nnx.Module):
    def __init__(self, rngs):
      self.scale = Trained(jnp.ones(4))

    def __call__(self, x, context):
      return x * self.scale[...][None, None]

  stack = LayerStack(
    embed=Embed, layers=[Own] * 2, head=Head, trainable=nnx.Any(nnx.Param, Trained)
  )
  assert stack.uniform
  shapes = jax.tree.map(jnp.shape, stack.init(jax.random.key(0), ROWS))
  assert shapes["layers"] == {"scale": (2, 4)}


def test_a_packed_row_of_more_elements_than_int32_counts_is_refused():
  """Offsets within a row are int32, and a slice behind 2^31 elements would begin elsewhere."""
  large = functools.partial(nnx.Linear, 2**16, 2**15 + 1, use_bias=False)
  batch = {"x": jax.ShapeDtypeStruct((2, 2**16), jnp.float32)}
  stack = LayerStack.from_modules(
    [lambda x: x, large], loss=lambda y, b: y.sum(-1), batch=batch, partition=[1, 1]
  )
  schedule = jaxpipe.make_schedule("gpipe", devices=2, microbatches=1)
  with pytest.raises(StackError, match=r"stage 1 has 2,147,549,184 elements of float32 parameters"):
    stack.laid_out(schedule)


def test_a_factory_of_many_layers_is_traced_once():
  """Each layer of a deep stack was traced by itself, whose time grew with the depth."""
  made = []

  def factory(rngs):
    made.append(rngs)
    return Layer(rngs)

  make([factory] * 2)
  once = len(made)
  make([factory] * 12)
  assert len(made) == 2 * once


def test_a_factory_that_counts_its_calls_is_refused():
  """All layers silently had the attributes of the first one."""
  numbers = itertools.count()

  class Numbered(Layer):
    def __init__(self, rngs):
      super().__init__(rngs)
      self.number = next(numbers)

  with pytest.raises(StackError, match=r"layers\[1\]: its factory makes number \d+ in one call"):
    make([Numbered] * 2)
  make([Numbered])

  class Shaped(Layer):
    def __init__(self, rngs):
      super().__init__(rngs)
      self.steady, self.pair = float("nan"), (1, 2.0)
      self.more = nnx.Param(jnp.zeros(next(numbers)))

  with pytest.raises(StackError, match=r"makes more float32\[\d+\] in one call"):
    make([Shaped] * 2)

  class Steady(Layer):
    def __init__(self, rngs):
      super().__init__(rngs)
      self.steady, self.pair = float("nan"), (1, 2.0)

  make([Steady] * 2)
