"""What cannot run, or would run wrongly, is refused when a step is built or first traced."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import AbstractMesh, AxisType
from networks import lm

import jaxpipe
from jaxpipe.models.transformer.decoder import Embed, Head, Layer, TransformerConfig
from jaxpipe.parallel.replicas import owned
from jaxpipe.pipeline.timeline import measure
from jaxpipe.stack.module_spec import StackError
from jaxpipe.stack.stack import LayerStack
from jaxpipe.stack.vocabulary import Tables

F32 = dict(dtype="float32", param_dtype="float32", dropout=0.0)
BATCH = {"x": jnp.ones((4, 3))}
GPIPE = jaxpipe.make_schedule("gpipe", devices=2, microbatches=2)


class In(nnx.Module):
  def __init__(self, rngs):
    self.inner = nnx.Linear(3, 8, rngs=rngs)

  def __call__(self, batch):
    return self.inner(batch["x"])


class Out(nnx.Module):
  def __init__(self, rngs):
    self.weight = nnx.Param(jnp.ones((8,)))

  def __call__(self, x, batch):
    return jnp.sum(x @ self.weight[...]), 1.0 * len(x), {}


def layer(function):
  """A layer of one matmul and `function`."""

  class Middle(nnx.Module):
    def __init__(self, rngs):
      self.inner = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x, context):
      return x + function(self.inner(x), context)

  return Middle


def stack(function, depth=2):
  return LayerStack(embed=In, layers=[layer(function)] * depth, head=Out)


def swap(h, _):
  return lax.ppermute(h, "data", [(0, 1), (1, 0)])


def total(h, _):
  return h + lax.psum(h.sum(), "stage")


def foreign(shape, names, types=AxisType.Auto):
  return jax.make_mesh(shape, names, axis_types=(types,) * len(names))


FOREIGN = {
  "another name": lambda: foreign((2,), ("pp",)),
  "no stage": lambda: foreign((2,), ("data",)),
  "explicit": lambda: foreign((2,), ("stage",), AxisType.Explicit),
  "one name more": lambda: foreign((2, 2), ("stage", "model")),
  "no devices": lambda: AbstractMesh((2,), ("stage",)),
  "a text": lambda: "stage:2",
  "nothing": lambda: None,
}


def entries(stack, mesh):
  """All public functions that take a mesh, called with this one."""
  params = jax.eval_shape(lambda: stack.init(jax.random.key(0), BATCH))
  yield lambda: jaxpipe.pipeline(None, stack, BATCH, mesh=mesh, microbatches=2)
  yield lambda: jaxpipe.pipeline_value_and_grad(stack, GPIPE, mesh)
  yield lambda: jaxpipe.pipeline_forward(stack, GPIPE, mesh)
  yield lambda: jaxpipe.memory_report(stack, GPIPE, mesh, BATCH)
  yield lambda: jaxpipe.check(stack, GPIPE, mesh, BATCH)
  yield lambda: jaxpipe.place(params, stack, GPIPE, mesh)
  yield lambda: stack.init(jax.random.key(0), BATCH, GPIPE, mesh)
  yield lambda: measure(stack, GPIPE, mesh, params, BATCH)
  yield lambda: jaxpipe.choose_schedule(stack, mesh, BATCH, microbatches=2)


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_mesh_that_the_executor_cannot_run_on_is_refused_by_every_entry(kind):
  """A KeyError, an AttributeError, or a sum over an axis that nothing here knows."""
  mesh, named = FOREIGN[kind](), stack(lambda h, _: h)
  # A text is a mesh for `pipeline`, and for `init` None is no mesh.
  apart = {"a text": {0}, "nothing": {6}}.get(kind, set())
  for i, entry in enumerate(entries(named, mesh)):
    if i not in apart:
      with pytest.raises(jaxpipe.MeshError, match=r"; build it with jaxpipe\.make_mesh"):
        entry()


def test_a_mesh_may_leave_out_axes_and_name_the_others_in_any_order():
  batch = {"x": np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)}
  made = foreign((2, 2), ("data", "stage"))
  assert jaxpipe.check(stack(lambda h, _: jnp.tanh(h)), GPIPE, made, batch, unroll="none").ok


@pytest.mark.smoke
@pytest.mark.parametrize(
  "function, message",
  [
    (swap, "calls ppermute over data: it waits for devices of other stages"),
    (total, "over the axis `stage`, along which other devices run other stages"),
  ],
)
def test_collectives_that_wait_for_other_stages(function, message):
  """The first gave wrong gradients in silence, the second never ended."""
  schedule = jaxpipe.make_schedule("1f1b", devices=2, microbatches=2)
  with pytest.raises(ValueError, match=message):
    jaxpipe.memory_report(stack(function), schedule, jaxpipe.make_mesh("stage:2,data:2"), BATCH)


def test_a_collective_within_a_group_is_none_of_these():
  mean = lambda h, _: h - lax.pmean(h, "data")  # noqa: E731
  schedule = jaxpipe.make_schedule("zb-h1", devices=2, microbatches=2)
  jaxpipe.memory_report(stack(mean), schedule, jaxpipe.make_mesh("stage:2,data:2"), BATCH)


@pytest.mark.parametrize(
  "tied, tables",
  [
    ({"head/table": "embed/other"}, Tables("table", "table")),
    ({"head/other": "embed/table"}, Tables("table", "table")),
  ],
)
def test_a_table_tied_to_what_is_no_table(tied, tables):
  """Every device took the whole of it for its own shard: gradients were wrong in silence."""
  config = TransformerConfig(vocabulary_size=16, layers=2, width=8, heads=2, kv_heads=1, **F32)

  def with_other(part):
    class Both(part):
      def __init__(self, rngs):
        super().__init__(config, rngs=rngs)
        self.other = nnx.Param(jnp.ones((16, 8)))

    return Both

  with pytest.raises(StackError, match="a table can be tied to the other table only"):
    LayerStack(
      embed=with_other(Embed),
      layers=[lambda rngs: Layer(config, rngs=rngs)] * 2,
      head=with_other(Head),
      tied=tied,
      vocabulary=tables,
    )


def test_ends_without_the_methods_of_a_cut_vocabulary():
  class Table(In):
    def __init__(self, rngs):
      super().__init__(rngs)
      self.table = nnx.Param(jnp.ones((16, 8)))

  class TableOut(Out):
    def __init__(self, rngs):
      super().__init__(rngs)
      self.table = nnx.Param(jnp.ones((16, 8)))

  plain = LayerStack(
    embed=Table,
    layers=[layer(lambda h, _: h)] * 2,
    head=TableOut,
    vocabulary=Tables("table", "table"),
  )
  schedule = jaxpipe.make_schedule("1f1b", devices=2, microbatches=2, head="sharded")
  with pytest.raises(StackError, match="embed has no method ids"):
    jaxpipe.pipeline_value_and_grad(plain, schedule, jaxpipe.make_mesh("stage:2"))


def test_owners_of_replicated_stages_are_found_where_there_are_any():
  """Stages that were given away in the order of the chunks left none for the second device."""
  found = owned(jaxpipe.Placement(((0, 1, 2), (0, 1, 3))))
  assert [len(row) for row in found] == [2, 2]
  assert {0, 2} | {1, 3} == {s for row in found for s in row} and 2 in found[0] and 3 in found[1]


def test_stages_that_devices_cannot_own_evenly():
  with pytest.raises(
    ValueError, match="3 stages with replicas cannot be owned evenly by 2 devices"
  ):
    owned(jaxpipe.Placement(((0, 1), (0, 2))))


@pytest.mark.parametrize("module", [nn.Dense(8), nn.Dense])
def test_a_linen_module_that_nobody_wrapped(module):
  with pytest.raises(StackError, match=r"embed is a Linen module; wrap it: jaxpipe\.linen"):
    LayerStack(embed=module, layers=[layer(lambda h, _: h)], head=Out)


class Halved(layer(lambda h, _: h)):
  def __call__(self, x, context):
    return super().__call__(x, context).astype(jnp.bfloat16)


def test_a_layer_that_returns_another_dtype():
  schedule, mesh = GPIPE, jaxpipe.make_mesh("stage:2")
  params = stack(lambda h, _: h).init(jax.random.key(0), BATCH, schedule, mesh)
  wrong = LayerStack(embed=In, layers=[Halved] * 2, head=Out)
  with pytest.raises(StackError, match=r"takes float32\[2, 8\] but returns bfloat16\[2, 8\]"):
    jaxpipe.pipeline_value_and_grad(wrong, schedule, mesh)(params, BATCH)


def test_parameters_of_another_stack():
  schedule, mesh = GPIPE, jaxpipe.make_mesh("stage:2")
  plain = stack(lambda h, _: h)
  params = plain.init(jax.random.key(0), BATCH, schedule, mesh)
  step = jaxpipe.pipeline_value_and_grad(plain, schedule, mesh)
  short = {**params, "layers": {"inner": {"kernel": params["layers"]["inner"]["kernel"]}}}
  with pytest.raises(
    ValueError, match=r"\['inner'\]\['bias'\] is missing, and the stack has \(2, 8"
  ):
    step(short, BATCH)


def chatty(h, _):
  jax.debug.print("{}", h.sum())
  return h


def chatty_inside(h, _):
  return lax.fori_loop(0, 2, lambda _, h: chatty(h, None), h)


@pytest.mark.parametrize("chatty", [chatty, chatty_inside])
def test_a_print_that_a_pipeline_leaves_out_is_told(chatty):
  with pytest.warns(UserWarning, match="a layer calls debug_.*, which a pipeline leaves out"):
    jaxpipe.memory_report(stack(chatty), GPIPE, jaxpipe.make_mesh("stage:2"), BATCH)


def test_negative_ids_count_from_the_end_of_a_cut_table():
  """A padding id of -1 got a row of zeros, and its row no gradient."""
  cut = lm.stack(4, **F32)
  batch = lm.batch(4)
  batch["tokens"] = batch["tokens"] - 16 * (batch["tokens"] > 9)
  schedule = jaxpipe.make_schedule("1f1b", devices=2, microbatches=2, head="sharded")
  assert (batch["tokens"] < 0).any()
  report = jaxpipe.check(cut, schedule, jaxpipe.make_mesh("stage:2"), batch)
  assert report.ok, str(report)


KEYS = {
  "rbg": lambda: jax.random.key(0, impl="rbg"),
  "unsafe_rbg": lambda: jax.random.key(0, impl="unsafe_rbg"),
  "a raw rbg key": lambda: jax.random.PRNGKey(0, impl="rbg"),
  "several": lambda: jax.random.split(jax.random.key(0)),
  "several raw ones": lambda: jax.random.split(jax.random.PRNGKey(0), 3),
  "a seed": lambda: 7,
  "a number": lambda: jnp.int32(7),
}


@pytest.mark.parametrize("kind", KEYS)
def test_a_key_by_which_masks_would_depend_on_the_mesh_is_refused(kind):
  """A vmapped `rbg` generator draws all rows at once: other rows on a device, other masks."""
  named, mesh, key = (
    stack(lambda h, c: c.dropout(h, 0.5)),
    jaxpipe.make_mesh("stage:2"),
    KEYS[kind](),
  )
  params = named.init(jax.random.key(0), BATCH)
  step = jaxpipe.pipeline_value_and_grad(named, GPIPE, mesh)
  for call in (
    lambda: step(params, BATCH, key),
    lambda: jax.eval_shape(step, params, BATCH, key),
    lambda: jaxpipe.reference_value_and_grad(named, 2)(params, BATCH, key),
    lambda: named.init(key, BATCH),
    lambda: named.init(key, BATCH, GPIPE, mesh),
  ):
    with pytest.raises(ValueError, match=r"the key is .*; pass jax\.random\.key\(seed, impl='thr"):
      call()


def test_a_raw_key_gives_the_masks_of_a_typed_one():
  named, mesh = stack(lambda h, c: c.dropout(h, 0.5)), jaxpipe.make_mesh("stage:2")
  batch = {"x": np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)}
  params = named.init(jax.random.PRNGKey(1), batch, GPIPE, mesh)
  step = jaxpipe.pipeline_value_and_grad(named, GPIPE, mesh, unroll="none")
  typed, raw = step(params, batch, jax.random.key(3)), step(params, batch, jax.random.PRNGKey(3))
  other = step(params, batch, jax.random.PRNGKey(4))
  assert float(typed[0][0]) == float(raw[0][0]) != float(other[0][0])
  jax.tree.map(np.testing.assert_array_equal, typed[1], raw[1])


def plain(batch, **options):
  """Modules in a row with an example batch."""
  layers = [lambda rngs: nnx.Linear(3, 3, rngs=rngs), jnp.tanh]
  return jaxpipe.pipeline(
    lambda y, batch: y.sum(-1), layers, batch, mesh="stage:2", microbatches=2, **options
  )


X = {"x": np.ones((4, 3), np.float32)}


@pytest.mark.parametrize(
  "leaf, message",
  [
    (lambda: jax.random.split(jax.random.key(0), 4), "holds PRNG keys, which no batch has"),
    (lambda: "a sentence", "is a str and no array of numbers"),
    (lambda: np.array(["a", "b", "c", "d"]), "is an array of <U1 and no array of numbers"),
    (lambda: np.array([{}, {}, {}, {}]), "is an array of object and no array of numbers"),
    (lambda: np.zeros(4, "datetime64[s]"), "is an array of datetime64.* and no array of numbers"),
  ],
)
def test_leaves_of_a_batch_that_are_no_numbers_are_named(leaf, message):
  """A text was an AttributeError, or `inputs` that are not in the batch."""
  batch = {**X, "extra": leaf()}
  named = stack(lambda h, _: h)
  for call in (lambda: plain(batch), lambda: named.init(jax.random.key(0), batch)):
    with pytest.raises(ValueError, match=rf"batch\['extra'\] {message}"):
      call()
  params = named.init(jax.random.key(0), X, GPIPE, jaxpipe.make_mesh("stage:2"))
  step = jaxpipe.pipeline_value_and_grad(named, GPIPE, jaxpipe.make_mesh("stage:2"))
  with pytest.raises(ValueError, match=message):
    step(params, batch)


@pytest.mark.parametrize("dtype", ["float16", "int32", "bool"])
def test_a_later_batch_of_another_dtype_is_refused(dtype):
  """It was compiled anew, and computed in another precision."""
  pipe = plain(X)
  params = pipe.init(jax.random.key(0), X)
  other = {"x": X["x"].astype(dtype), "unknown": np.ones(4)}
  for call in (pipe.value_and_grad, pipe.evaluate, pipe.predict):
    with pytest.raises(ValueError, match=rf"\['x'\] is {dtype}, and the example batch had float32"):
      call(params, other)
  # Without double precision JAX takes float64 as float32.
  assert pipe.predict(params, {"x": X["x"].astype(np.float64)}).shape == (4, 3)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "complex64", "int8"])
def test_parameters_without_a_usable_gradient_are_refused(dtype):
  class Odd(nnx.Module):
    def __init__(self, rngs):
      self.weight = nnx.Param(jnp.ones(3, dtype))

    def __call__(self, x):
      return x * self.weight[...].real.astype(x.dtype)

  message = rf"layers\[0\] \(Odd\): parameter \['weight'\] is {dtype}, "
  with pytest.raises(jaxpipe.StackError, match=message):
    jaxpipe.pipeline(lambda y, b: y.sum(-1), [Odd, jnp.tanh], X, mesh="stage:2", microbatches=2)


def kernel(interpret):
  def double(x_ref, y_ref):
    y_ref[...] = 2.0 * x_ref[...]

  def call(x):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(double, out_shape=shape, interpret=interpret)(x)

  twice = jax.custom_vjp(call)
  twice.defvjp(lambda x: (call(x), None), lambda _, dy: (call(dy),))
  return twice


def called(function, x):
  return function(x)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_kernel_is_traced_off_a_mesh_that_cuts_rows_and_refused_if_it_is_interpreted(layers):
  """Every module asked for the axes of rows, which is refused off the mesh, whether or not it
  had norms."""
  made = {
    interpret: LayerStack.from_modules(
      [functools.partial(called, kernel(interpret))] * layers
      + [nnx.Linear(3, 3, rngs=nnx.Rngs(0))],
      loss=lambda y, b: y.sum(-1),
      batch=X,
    )
    for interpret in (False, True)
  }
  mesh = jaxpipe.make_mesh("stage:2,data:2")
  assert jaxpipe.packing_report(made[False], GPIPE, mesh, X).held
  with pytest.raises(ValueError, match="an interpreted Pallas kernel, which JAX cannot lower over"):
    jaxpipe.packing_report(made[True], GPIPE, mesh, X)


class Platform(nnx.Module):
  """Computes one thing on CPU and another elsewhere, plainly and inside a loop."""

  def __init__(self, rngs):
    self.inner = nnx.Linear(3, 3, rngs=rngs)

  def __call__(self, x):
    h = self.inner(x)
    pick = lambda h: jax.lax.platform_dependent(h, cpu=jnp.tanh, default=jnp.sin)  # noqa: E731
    looped = lax.scan(lambda c, _: (c + pick(h), None), jnp.zeros(h.shape), None, length=2)[0]
    return pick(h) + looped


def test_layers_that_depend_on_the_platform_are_what_they_are_under_jit():
  layers = [Platform(nnx.Rngs(i)) for i in range(2)]
  batch = {"x": np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)}
  square = lambda y, batch: (y**2).sum(-1)  # noqa: E731
  pipe = jaxpipe.pipeline(
    square, layers, batch, mesh="stage:2,data:2", schedule="gpipe", microbatches=1
  )
  (value, _), grads = pipe.value_and_grad(pipe.init(jax.random.key(0), batch), batch)
  true, true_grads = nnx.value_and_grad(
    lambda own: square(own[1](own[0](batch["x"])), batch).mean()
  )(nnx.List(layers))
  np.testing.assert_allclose(value, true, rtol=1e-6)
  found = pipe.unplace(grads)["layers"]["inner"]["kernel"]
  for i in range(2):
    want = true_grads[i]["inner"]["kernel"][...]
    np.testing.assert_allclose(found[i], want, rtol=1e-5, atol=1e-5)
