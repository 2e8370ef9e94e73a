"""Collectives, traffic and FLOPs of compiled programs: whole steps on CPU, and literal text."""

import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax
from networks import lm
from networks.drawn import placed_shapes

import jaxpipe
from jaxpipe.parallel import axes
from jaxpipe.pipeline.compiled.action_paths import runs
from jaxpipe.pipeline.compiled.collectives import (
  axes_of,
  collectives,
  replica_groups,
  source_target_pairs,
)
from jaxpipe.pipeline.compiled.hlo import parse
from jaxpipe.pipeline.compiled.matmuls import flops_of_actions, flops_of_step, matmuls
from jaxpipe.pipeline.compiled.traffic import traffic
from jaxpipe.pipeline.compiled.walk import walk

WIDE = 8  # of a small layer
ROWS = 16
# Layers that share work and have no parameter that is cut.
WHOLE = jaxpipe.Rules(axes=frozenset({"tensor", "sequence"}), dims=[(".*", None)])


# Groups.


@pytest.mark.parametrize(
  "text, groups",
  [
    ("{{0,1},{2,3},{4,5},{6,7}}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
    ("{}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ("[4,2]<=[8]", [[0, 1], [2, 3], [4, 5], [6, 7]]),
    ("[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("[4,2]<=[2,2,2]T(0,2,1)", [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ("mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("mesh['a'=2,'b'=4,'c'=1] {'a','b'}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ("mesh['a'=2,'b'=4,'c'=1] {'b','c'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("mesh['a'=2,'b'=4] {'b':(2)2}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
    ("mesh['a'=2,'b'=4] {'b':(1)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("mesh[a=2,b=2], device_ids=(3,2,1,0) {a}", [[3, 1], [2, 0]]),
  ],
)
def test_groups_in_every_notation(text, groups):
  attributes = f", channel_id=1, replica_groups={text}, use_global_device_ids=true, to_apply=%add"
  assert [list(group) for group in replica_groups(attributes, 8)] == groups


def test_groups_in_an_unknown_notation():
  with pytest.raises(ValueError, match=r"'@later\[2\]' are written in a way that is not known"):
    replica_groups(", replica_groups=@later[2]", 8)


def test_a_device_does_not_send_to_itself():
  pairs = source_target_pairs(", source_target_pairs={{0,1},{1,1},{2,3}}, metadata={}")
  assert pairs == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
  "mesh, groups, names",
  [
    ("stage:2,data:2,tensor:2", [[0, 1], [6, 7]], ("tensor",)),
    ("stage:2,data:2,tensor:2", [[0, 2], [1, 3]], ("data",)),
    ("stage:2,data:2,tensor:2", [[0, 3], [1, 2]], ("data", "tensor")),
    ("stage:2,data:2,tensor:2", [[0, 4]], ("stage",)),
    ("stage:2,sequence:4", [[0, 1], [2, 3]], ("sequence",)),  # pairs along a longer axis
    ("stage:2,sequence:4", [[1, 3], [4, 6]], ("sequence",)),
    ("stage:2,expert:2", [[0], [1], [2, 3]], ("expert",)),
  ],
)
def test_axes_of_groups(mesh, groups, names):
  assert axes_of(groups, jaxpipe.make_mesh(mesh)) == names


def test_a_mesh_that_is_not_the_programs():
  with pytest.raises(ValueError, match=r"knows a device 7, but the mesh has 2; pass its own"):
    axes_of([[0, 7]], jaxpipe.make_mesh("stage:2"))


# Text of programs for TPU and GPU, shortened.

HEAD = "HloModule jit_step, is_scheduled=true\n"
ADD = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}
"""
MESH = "stage:2,data:2,tensor:2"


def read(lines, extra="", mesh=MESH):
  """The collectives of an entry computation with these lines; `%p` is bf16[4,8], `%q` f32[6]."""
  body = "\n".join(f"  {line}" for line in lines)
  text = f"""{HEAD}{ADD}{extra}
ENTRY %main (p: bf16[4,8], q: f32[6]) -> bf16[4,8] {{
  %p = bf16[4,8]{{1,0:T(8,128)(2,1)}} parameter(0)
  %q = f32[6]{{0}} parameter(1)
{body}
  ROOT %out = bf16[4,8]{{1,0}} copy(%p)
}}
"""
  return collectives(text, jaxpipe.make_mesh(mesh))


def test_an_asynchronous_collective_counts_once():
  lines = [
    "%s = bf16[4,8]{1,0} all-reduce-start(%p), replica_groups=[4,2]<=[8], to_apply=%add",
    "%d = bf16[4,8]{1,0} all-reduce-done(%s)",
    "%g = (bf16[4,8]{1,0}, bf16[8,8]{1,0}) all-gather-start(%p), channel_id=2,"
    " replica_groups=[4,2]<=[2,2,2]T(0,2,1), dimensions={0}, use_global_device_ids=true",
    "%h = bf16[8,8]{1,0} all-gather-done(%g)",
    "%k = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[]{:S(2)}, u32[]{:S(2)})"
    " collective-permute-start(%p), channel_id=1, source_target_pairs={{0,4},{1,5},{2,6},{3,7}}",
    "%l = bf16[4,8]{1,0} collective-permute-done(%k)",
  ]
  assert [(c.kind, c.axes, c.group, c.bytes) for c in read(lines)] == [
    ("all-reduce", ("tensor",), 2, 64),
    ("all-gather", ("data",), 2, 64),
    ("collective-permute", ("stage",), 2, 64),
  ]
  assert [c.senders for c in read(lines)][2] == (0, 1, 2, 3)


# How GPU starts what has no start of its own: in a computation, or written as if it had one.
@pytest.mark.parametrize(
  "line",
  [
    "%s = ((bf16[4,8]), bf16[1,8]) async-start(%p), calls=%wrapped",
    "%s = ((bf16[4,8]), bf16[1,8]) reduce-scatter-start(%p), replica_groups={{0,1,2,3},{4,5,6,7}},"
    " dimensions={0}, to_apply=%add, calls=%wrapped",
  ],
)
def test_a_generic_asynchronous_collective(line):
  wrapped = """
%wrapped (w: bf16[4,8]) -> bf16[1,8] {
  %w = bf16[4,8]{1,0} parameter(0)
  ROOT %rs = bf16[1,8]{1,0} reduce-scatter(%w), replica_groups={{0,1,2,3},{4,5,6,7}}, \
dimensions={0}, to_apply=%add
}
"""
  done = "%d = bf16[1,8] async-done(%s)"
  (one,) = read([line, done], wrapped)
  assert (one.kind, one.axes, one.group, one.bytes) == (
    "reduce-scatter",
    ("data", "tensor"),
    4,
    4 * 8 * 2 * 3 / 4,
  )


def test_a_merged_collective_is_as_many_arrays():
  line = (
    "%s = (bf16[4,8]{1,0}, /*index=1*/f32[6]{0}) all-reduce(%p, /*index=1*/%q), channel_id=1,"
    " replica_groups={{0,2},{1,3},{4,6},{5,7}}, use_global_device_ids=true, to_apply=%add"
  )
  found = read([line])
  assert [(c.shape, c.dtype, c.bytes) for c in found] == [
    ((4, 8), "bf16", 64),
    ((6,), "f32", 24),
  ]
  assert {(c.axes, c.site.path, c.times) for c in found} == {(("data",), (), 1)}


def test_an_all_to_all_in_pieces_is_one():
  whole = "%w = bf16[4,8]{1,0} all-to-all(%p), replica_groups=[4,2]<=[8], dimensions={0}"
  pieces = "%s = (f32[6], f32[6]) all-to-all(%q, %q), replica_groups={{0,1},{2,3},{4,5},{6,7}}"
  found = read([whole, pieces])
  assert [(c.shape, c.bytes) for c in found] == [((4, 8), 32), ((2, 6), 24)]


def test_what_a_device_keeps_to_itself_is_left_out():
  alone = "replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}"
  lines = [
    f"%s = bf16[4,8]{{1,0}} all-reduce(%p), {alone}, to_apply=%add",
    "%k = bf16[4,8] collective-permute(%p), source_target_pairs={{0,0},{1,1}}",
  ]
  assert read(lines) == ()


def test_groups_smaller_than_an_axis():
  pairs = "%s = f32[6] all-reduce(%q), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add"
  (one,) = read([pairs], mesh="stage:2,sequence:4")
  assert (one.axes, one.group, one.bytes) == (("sequence",), 2, 24)


def test_a_sum_that_tpu_fuses_with_the_slice_that_is_kept():
  fused = """
%all-reduce-scatter.1 (w: bf16[4,8]) -> bf16[2,8] {
  %w = bf16[4,8]{1,0} parameter(0)
  %ar = bf16[4,8]{1,0} all-reduce(%w), replica_groups=[4,2]<=[8], to_apply=%add
  ROOT %mine = bf16[2,8]{1,0} dynamic-slice(%ar, %w, %w), dynamic_slice_sizes={2,8}
}
"""
  (one,) = read(["%f = bf16[2,8] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1"], fused)
  assert (one.kind, one.bytes) == ("reduce-scatter", 32)


# A loop of five ticks; in each a conditional whose second branch is a loop of three layers.
TICKS = """
HloModule jit_step

%layer (l.0: (s32[], f32[6])) -> (s32[], f32[6]) {
  %l.0 = (s32[], f32[6]) parameter(0)
  %l.1 = f32[6] get-tuple-element(%l.0), index=1
  %ar = f32[6] all-reduce(%l.1), replica_groups=[4,2]<=[8], to_apply=%addNAMED
  ROOT %l.2 = (s32[], f32[6]) tuple(%l.0, %ar)
}

%more (c.0: (s32[], f32[6])) -> pred[] {
  ROOT %c.0 = pred[] parameter(0)
}

%idle (i.0: f32[6]) -> f32[6] {
  ROOT %i.0 = f32[6] parameter(0)
}

%work (w.0: (s32[], f32[6])) -> f32[6] {
  %w.0 = (s32[], f32[6]) parameter(0)
  %w.1 = (s32[], f32[6]) while(%w.0), condition=%more, body=%layer, \
backend_config={"known_trip_count":{"n":"3"}}
  %sin = f32[6] sine(%w.0), metadata={op_name="jit(f)/I/sin"}
  ROOT %w.2 = f32[6] get-tuple-element(%w.1), index=1
}

%tick (t.0: (s32[], f32[6])) -> (s32[], f32[6]) {
  %t.0 = (s32[], f32[6]) parameter(0)
  %t.1 = f32[6] get-tuple-element(%t.0), index=1
  %cp = f32[6] collective-permute(%t.1), source_target_pairs={{0,4},{1,5},{2,6},{3,7}}
  %choice = f32[6] conditional(%t.0, %t.1, %t.0), branch_computations={%idle, %work}COND
  ROOT %t.2 = (s32[], f32[6]) tuple(%t.0, %choice)
}

ENTRY %main (a.0: (s32[], f32[6])) -> f32[6] {
  %a.0 = (s32[], f32[6]) parameter(0)
  %loop = (s32[], f32[6]) while(%a.0), condition=%more, body=%tick, \
backend_config={"known_trip_count":{"n":"5"}}
  ROOT %a.1 = f32[6] get-tuple-element(%loop), index=1
}
""".replace("\\\n", "")


@pytest.mark.parametrize(
  "named, cond, path",
  [
    ("", "", ("I",)),  # by most of the branch
    ("", "jit(f)/while/body/F/cond", ("F",)),
    ("jit(f)/while/body/F/cond/while/body/psum", "jit(f)/while/body/F/cond", ("F",)),
    ("jit(f)/while/body/B/cond/psum", "", ("B",)),
    # A layer may have scopes of such names itself.
    ("jit(f)/F/cond/while/body/T/psum", "", ("F",)),
    ("jit(f)/F/cond/first_stage/cond/psum", "", ("F", "first_stage")),
    ("jit(f)/output_0/cond/psum", "", ("output_0",)),
  ],
)
def test_an_action_is_found_by_names_or_by_its_branch(named, cond, path):
  metadata = lambda name: f', metadata={{op_name="{name}"}}' if name else ""  # noqa: E731
  text = TICKS.replace("NAMED", metadata(named)).replace("COND", metadata(cond))
  by_kind = {c.kind: c for c in collectives(text, jaxpipe.make_mesh(MESH))}
  inside, outside = by_kind["all-reduce"], by_kind["collective-permute"]
  assert (inside.site.path, inside.times) == (path, 3)
  assert (outside.site.path, outside.times) == ((), 5)


def test_a_branch_of_no_action_counts_as_always_taken():
  text = TICKS.replace("NAMED", "").replace("COND", "").replace("jit(f)/I/sin", "jit(f)/sin")
  one, *_ = [c for c in collectives(text, jaxpipe.make_mesh(MESH)) if c.kind == "all-reduce"]
  assert (one.site.path, one.times, one.site.unknown) == ((), 15, 0)


def test_a_loop_of_unknown_length_counts_once_and_says_so_in_its_site():
  text = TICKS.replace("NAMED", "").replace("COND", "").replace('{"n":"3"}', "{}")
  one, *_ = [c for c in collectives(text, jaxpipe.make_mesh(MESH)) if c.kind == "all-reduce"]
  assert (one.times, one.site.unknown) == (1, 1)


def test_the_calls_that_lead_to_an_instruction():
  frames = {instruction.name: frames for instruction, _, frames in walk(parse(TICKS))}
  assert [(f.instruction.name, f.caller, f.callee) for f in frames["ar"]] == [
    ("loop", "main", "tick"),
    ("choice", "tick", "work"),
    ("w.1", "work", "layer"),
  ]


# Whole steps.


class Embed(nnx.Module):
  def __init__(self, rngs):
    self.inner = nnx.Linear(3, WIDE, rngs=rngs)

  def __call__(self, batch):
    return self.inner(batch["x"])


class Layer(nnx.Module):
  """A linear map of its parameters, and what `say` says of it."""

  def __init__(self, say, rngs):
    self.say, self.inner = say, nnx.Linear(WIDE, WIDE, use_bias=False, rngs=rngs)

  def __call__(self, x, context):
    return x + self.say(jnp.sin(self.inner(x)))


class Head(nnx.Module):
  def __init__(self, rngs):
    self.inner = nnx.Linear(WIDE, 1, rngs=rngs)

  def __call__(self, x, batch):
    return jnp.sum(self.inner(x) ** 2), 1.0 * len(x), {}


def silent(x):
  return x


def total(x):
  return axes.total(x, "tensor")


def gather_and_scatter(x):
  """Back at the same shape; the sum keeps the gather from cancelling against the scatter."""
  return axes.scatter(jnp.cos(axes.gather(x, "tensor", 0)), "tensor", 0)


def exchange_twice(x):
  return axes.exchange(jnp.cos(axes.exchange(x, "sequence", 0, 1)), "sequence", 1, 0)


def talking(say, mesh, name="zb-h1", layers=4, microbatches=4, **options):
  """A compiled step of layers that say something, its mesh and its schedule."""
  mesh = jaxpipe.make_mesh(mesh)
  layer = lambda rngs: Layer(say, rngs)  # noqa: E731 - one object, so that layers are one kind
  stack = jaxpipe.LayerStack(embed=Embed, layers=[layer] * layers, head=Head, rules=WHOLE)
  schedule = jaxpipe.make_schedule(name, devices=mesh.shape["stage"], microbatches=microbatches)
  batch = {"x": jnp.ones((ROWS, 3))}
  return compiled(stack, schedule, mesh, batch, **options), mesh, schedule


def compiled(stack, schedule, mesh, batch, **options):
  params = placed_shapes(stack, schedule, mesh)
  step = jaxpipe.pipeline_value_and_grad(stack, schedule, mesh, **options)
  return jax.jit(step).lower(params, batch, jax.random.key(1)).compile().as_text()


def transformer(mesh, name, **options):
  """The same of the small transformer, 16 rows in 4 microbatches."""
  mesh, stack = jaxpipe.make_mesh(mesh), lm.stack(4)
  schedule = jaxpipe.make_schedule(name, devices=mesh.shape["stage"], microbatches=4)
  return compiled(stack, schedule, mesh, lm.batch(ROWS), **options), mesh, schedule


def test_gradients_are_added_once_a_step(float64):
  text, mesh, schedule = transformer("stage:2,data:2,expert:2", "1f1b", unroll="none")
  over = ("data", "expert")
  found = collectives(text, mesh)
  assert {(c.site.path, c.times) for c in found if c.kind == "all-reduce"} == {((), 1)}
  stack = lm.stack(4)
  leaves = lambda part: sorted(leaf.shape for leaf in jax.tree.leaves(part))  # noqa: E731
  shapes = stack.param_shapes()
  mine = [c for c in found if c.axes == over]
  assert sorted(c.shape for c in mine) == [(2, *shape[1:]) for shape in leaves(shapes["layers"])]
  # Embedding and head lie on all stages; with them, loss, weight and the metric.
  ends = [c for c in found if c.axes == ("stage", *over)]
  assert sorted(c.shape for c in ends) == sorted(
    [(), (), (), *leaves(shapes["embed"]), *leaves(shapes["head"])]
  )
  g = mine[0].group
  assert g == mesh.size // 2 and {c.group for c in ends} == {mesh.size}
  size = sum(8 * math.prod(c.shape) for c in mine)
  assert traffic(text, mesh, schedule).bytes(over) == (2 * size * (g - 1) / g,) * 2


def test_activations_travel_every_tick(float64):
  text, mesh, schedule = transformer("stage:4,data:2", "1f1b", unroll="none")
  found = [c for c in collectives(text, mesh) if c.kind == "collective-permute"]
  # Two rows of four positions of eight numbers, of eight bytes; there and back.
  assert [(c.axes, c.site.path, c.bytes) for c in found] == [(("stage",), (), 512.0)] * 2
  # 4 F and 4 B on each of 4 devices, the last of which starts after 3 and ends 3 before the end.
  assert [c.times for c in found] == [14, 14]
  table = traffic(text, mesh, schedule)
  # One way the last stage sends nothing, the other way the first.
  assert table.bytes(("stage",), "collective-permute") == (7168.0, 14336.0, 14336.0, 7168.0)


@pytest.mark.parametrize("name, unroll", [("1f1b", "ends"), ("zb-h1", "all")])
def test_written_out_only_what_is_needed_travels(name, unroll):
  text, mesh, schedule = talking(silent, "stage:4,data:2", name, unroll=unroll)
  x = ROWS // 4 // 2 * WIDE * 4
  sends = [4 * x * ((d > 0) + (d < 3)) for d in range(4)]
  assert traffic(text, mesh, schedule).bytes(("stage",), "collective-permute") == tuple(sends)


@pytest.mark.parametrize(
  "name, backward, unroll",
  [("1f1b", "B", "ends"), ("zb-h1", "I", "none")],
)
def test_what_layers_say_belongs_to_their_action(name, backward, unroll):
  """Two layers a stage, each with a sum, and its transpose in the backward, over `tensor`."""
  text, mesh, schedule = talking(total, "stage:2,tensor:2", name, unroll=unroll)
  x = ROWS // 4 * WIDE * 4  # bytes of a microbatch; a ring of two sends it once
  table = traffic(text, mesh, schedule)
  rows = {row.path: row for row in table.rows if row.axes == ("tensor",) and row.path}
  assert set(rows) == {("F",), (backward,)}
  for row in rows.values():
    assert (row.kind, row.group, row.arrays, row.bytes) == ("all-reduce", 2, 2, 2 * x)
    assert row.runs == (4, 4)
  once = [c for c in collectives(text, mesh) if c.site.path == ("F",)]
  assert {(c.shape, c.dtype, c.times) for c in once} == {((ROWS // 4, WIDE), "f32", 2)}
  # What is replicated along `tensor` is added once a step.
  weights = 2 * 2 * WIDE * WIDE * 4 / 2
  assert table.bytes(("tensor",)) == (2 * 4 * 2 * x + weights,) * 2


@pytest.mark.parametrize(
  "say, mesh, axis, kinds",
  [
    (gather_and_scatter, "stage:2,tensor:2", "tensor", ("all-gather", "reduce-scatter")),
    (exchange_twice, "stage:2,sequence:4", "sequence", ("all-to-all",)),
  ],
)
def test_other_collectives_of_layers(say, mesh, axis, kinds):
  text, mesh, schedule = talking(say, mesh, "zb-h1", unroll="none")
  g, x = mesh.shape[axis], ROWS // 4 * WIDE * 4
  whole = {"all-gather": g * x, "reduce-scatter": g * x, "all-to-all": x}
  forward = [row for row in traffic(text, mesh, schedule).rows if row.path == ("F",)]
  assert {row.kind for row in forward} == set(kinds)
  for row in forward:
    arrays = 4 if row.kind == "all-to-all" else 2
    assert (row.axes, row.group, row.arrays) == ((axis,), g, arrays)
    assert row.bytes == arrays * whole[row.kind] * (g - 1) / g


def test_what_is_said_at_the_ends_runs_there():
  mesh = jaxpipe.make_mesh("stage:2,tensor:2")

  class Telling(Head):
    def __call__(self, x, batch):
      return super().__call__(axes.total(jnp.sin(x), "tensor"), batch)

  class Asking(Embed):
    def __call__(self, batch):
      return axes.total(jnp.sin(super().__call__(batch)), "tensor")

  layer = lambda rngs: Layer(silent, rngs)  # noqa: E731
  stack = jaxpipe.LayerStack(embed=Asking, layers=[layer] * 4, head=Telling, rules=WHOLE)
  schedule = jaxpipe.make_schedule("zb-h1", devices=2, microbatches=4)
  text = compiled(stack, schedule, mesh, {"x": jnp.ones((ROWS, 3))}, unroll="none")
  rows = {row.path: row.runs for row in traffic(text, mesh, schedule).rows if row.path}
  assert rows == {
    ("F", "first_stage"): (4, 0),
    ("last_stage",): (0, 4),
    ("first_stage",): (4, 0),
  }


def test_collectives_over_the_vocabulary(float64):
  mesh, stack = jaxpipe.make_mesh("stage:2"), lm.stack(4)
  schedule = jaxpipe.make_schedule("1f1b", devices=2, microbatches=4, head="sharded")
  text = compiled(stack, schedule, mesh, lm.batch(ROWS), unroll="none")
  rows = [row for row in traffic(text, mesh, schedule).rows if row.path]
  assert {row.path[0] for row in rows} == {
    "embedding_0",
    "output_0",
    "barrier_0",
    "embedding_gradient_0",
  }
  assert {(row.axes, row.kind, row.runs) for row in rows} == {(("stage",), "all-reduce", (4, 4))}


@pytest.mark.parametrize(
  "path, name, counts",
  [
    (("F",), "interleaved-1f1b", (8, 8, 8, 8)),
    (("F", "first_stage"), "interleaved-1f1b", (4, 0, 0, 0)),
    (("first_stage",), "interleaved-1f1b", (4, 0, 0, 0)),
    (("last_stage",), "interleaved-1f1b", (0, 0, 0, 4)),
    (("last_stage",), "zb-v", (4, 0, 0, 0)),
    (("W",), "zb-v", (8, 8, 8, 8)),
    (("B",), "zb-v", (0, 0, 0, 0)),
    (("first_stage",), "chimera", (2, 0, 0, 2)),
    ((), "gpipe", (1, 1, 1, 1)),
  ],
)
def test_how_often_a_device_does_an_action(path, name, counts):
  schedule = jaxpipe.make_schedule(name, devices=4, microbatches=4)
  assert runs(schedule, path) == counts


def test_the_table():
  text = TICKS.replace("NAMED", "").replace("COND", ', metadata={op_name="jit(f)/F/cond"}')
  schedule = jaxpipe.make_schedule("gpipe", devices=2, microbatches=4)
  table = traffic(text, jaxpipe.make_mesh(MESH), schedule)
  assert str(table) == "\n".join(
    [
      "axes    kind                scope  arrays  runs  bytes a run  MB a step",
      "stage   collective-permute  -           1  0..5           24      0.000",
      "tensor  all-reduce          F           3     4           72      0.000",
    ]
  )
  assert table.bytes() == (5 * 24 + 4 * 72, 4 * 72)
  assert table.sums() == {
    (("stage",), "collective-permute"): 120,
    (("tensor",), "all-reduce"): 288,
  }


def test_a_mesh_of_another_size_than_the_schedules():
  schedule = jaxpipe.make_schedule("gpipe", devices=4, microbatches=4)
  with pytest.raises(ValueError, match=r"gpipe is for 4 devices but the mesh has 2 along"):
    traffic(TICKS, jaxpipe.make_mesh(MESH), schedule)


# FLOPs.


def test_flops_of_products_of_every_kind():
  def run(x, w, q):
    return lax.fori_loop(0, 3, lambda i, x: x @ w, x), jnp.einsum("bij,bkj->bik", q, q)

  text = (
    jax.jit(run).lower(jnp.ones((4, 6)), jnp.ones((6, 6)), jnp.ones((5, 7, 9))).compile().as_text()
  )
  assert flops_of_actions(text) == {(): 3 * 2 * 4 * 6 * 6 + 2 * 5 * 7 * 7 * 9}
  assert {one.site.times for one in matmuls(text)} == {1, 3}


@pytest.mark.parametrize("name, unroll", [("1f1b", "none"), ("zb-h1", "all")])
def test_flops_of_a_step(name, unroll):
  """A layer has one product, and two in its backward; the head one and two; the embedding one."""
  text, _, schedule = talking(silent, "stage:2,data:2", name, unroll=unroll)
  rows = ROWS // 4 // 2
  layer = 2 * rows * WIDE * WIDE
  found = flops_of_actions(text)
  backward = {("B",): 4 * layer} if name == "1f1b" else {("I",): 2 * layer, ("W",): 2 * layer}
  stages = {path: found[path] for path in found if path[0] in "FBIW" and len(path) == 1}
  assert stages == {("F",): 2 * layer, **backward}
  first, last = flops_of_step(found, schedule)
  assert first - 4 * 6 * layer == 4 * 2 * 2 * rows * 3 * WIDE  # the embedding, and its gradient
  assert last >= 4 * 6 * layer
