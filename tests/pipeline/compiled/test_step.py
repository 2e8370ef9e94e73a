"""Reading compiled programs: small ones for CPU, and literal text for what only a TPU's has."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as Spec

from jaxpipe.parallel.mesh import make_mesh
from jaxpipe.pipeline.compiled.copies import ring_copies
from jaxpipe.pipeline.compiled.cycles import Cost, branches, loops, outside_loops
from jaxpipe.pipeline.compiled.hlo import Shape, parse
from jaxpipe.pipeline.compiled.step import read_compiled
from jaxpipe.pipeline.compiled.transfers import permutes

RING = (jnp.float32, (5, 4, 64))


def compiled(function, *args):
  return jax.jit(function).lower(*args).compile()


def ticks(body):
  """A loop of six ticks over a ring, from what `body(i, ring, x) -> ring` does on each."""

  def run(x):
    ring = lax.empty(RING[1], RING[0])
    return lax.fori_loop(0, 6, lambda i, r: body(i, r, x), ring)

  return compiled(run, jnp.ones(RING[1][1:]))


def put(ring, value, i):
  return lax.dynamic_update_slice(ring, value[None], (i, 0, 0))


# Text of a TPU program, shortened: a loop of three ticks; on each a transfer with a branch under
# it, one of whose ways is a loop of four layers.
TPU = """
HloModule jit_step, is_scheduled=true

%fused.1 (p.0: bf16[4,2,8], p.1: s32[], p.2: bf16[2,8]) -> bf16[4,2,8] {
  %p.0 = bf16[4,2,8]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p.1 = s32[]{:T(128)} parameter(1)
  %p.2 = bf16[2,8]{1,0:T(8,128)(2,1)} parameter(2)
  %bitcast.1 = bf16[1,2,8]{2,1,0:T(8,128)(2,1)} bitcast(%p.2)
  ROOT %dus = bf16[4,2,8]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%bitcast.0, %bitcast.1, %p.1)
  %bitcast.0 = bf16[4,2,8]{2,1,0:T(8,128)(2,1)} bitcast(%p.0)
}

%fused.2 (p.3: bf16[4,2,8]) -> bf16[4,2,8] {
  %p.3 = bf16[4,2,8]{2,1,0} parameter(0)
  ROOT %negate = bf16[4,2,8]{2,1,0} negate(%p.3)
}

%layer (l.0: (s32[], bf16[2,8])) -> (s32[], bf16[2,8]) {
  %l.0 = (s32[]{:T(128)}, bf16[2,8]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %dot = bf16[2,8]{1,0} fusion(%l.0), kind=kOutput, calls=%x, metadata={op_name="jit(f)/F/dot"}, \
backend_config={"window_config":{"estimated_cycles":"100"}}
  %scatter = f32[128,128]{1,0} fusion(%l.0), kind=kCustom, calls=%x, \
backend_config={"window_config":{"estimated_cycles":"9223372036854775807"}}
  ROOT %l.1 = (s32[]{:T(128)}, bf16[2,8]{1,0}) tuple(%l.0, %dot)
}

%layers_left (c.0: (s32[], bf16[2,8])) -> pred[] {
  %c.0 = (s32[]{:T(128)}, bf16[2,8]{1,0}) parameter(0)
  %c.1 = s32[]{:T(128)} get-tuple-element(%c.0), index=0
  %c.2 = s32[]{:T(128)} constant(4)
  ROOT %c.3 = pred[]{:T(512)} compare(%c.1, %c.2), direction=LT
}

%idle (i.0: bf16[2,8]) -> bf16[2,8] {
  ROOT %i.0 = bf16[2,8]{1,0} parameter(0)
}

%work (w.0: (s32[], bf16[2,8])) -> bf16[2,8] {
  %w.0 = (s32[]{:T(128)}, bf16[2,8]{1,0}) parameter(0)
  %w.1 = (s32[]{:T(128)}, bf16[2,8]{1,0}) while(%w.0), condition=%layers_left, body=%layer
  ROOT %w.2 = bf16[2,8]{1,0} get-tuple-element(%w.1), index=1
}

%tick (t.0: (s32[], bf16[4,2,8], bf16[2,8])) -> (s32[], bf16[4,2,8], bf16[2,8]) {
  %t.0 = (s32[]{:T(128)}, bf16[4,2,8]{2,1,0:T(8,128)(2,1)}, /*index=2*/bf16[2,8]{1,0}) parameter(0)
  %t.1 = s32[]{:T(128)} get-tuple-element(%t.0), index=0
  %t.2 = bf16[4,2,8]{2,1,0:T(8,128)(2,1)} get-tuple-element(%t.0), index=1
  %t.3 = bf16[2,8]{1,0} get-tuple-element(%t.0), index=2
  %start = (bf16[2,8]{1,0}, bf16[2,8]{1,0}, u32[]{:S(2)}) collective-permute-start(%t.3), \
channel_id=1, source_target_pairs={{0,1}}
  %choice = bf16[2,8]{1,0} conditional(%t.1, %t.3, %t.0), branch_computations={%idle, %work}
  %done = bf16[2,8]{1,0} collective-permute-done(%start)
  %put = bf16[4,2,8]{2,1,0:T(8,128)(2,1)} fusion(%t.2, %t.1, %done), kind=kLoop, calls=%fused.1, \
backend_config={"window_config":{"estimated_cycles":"7"}}
  EXTRA
  ROOT %t.9 = (s32[]{:T(128)}, bf16[4,2,8]{2,1,0:T(8,128)(2,1)}, bf16[2,8]{1,0}) \
tuple(%t.1, %put, %choice)
}

%ticks_left (c.4: (s32[], bf16[4,2,8], bf16[2,8])) -> pred[] {
  ROOT %c.4 = pred[]{:T(512)} parameter(0)
}

ENTRY %main (a.0: bf16[4,2,8]) -> bf16[4,2,8] {
  %a.0 = bf16[4,2,8]{2,1,0} parameter(0)
  %fill = bf16[4,2,8]{2,1,0} broadcast(%a.0), backend_config={"estimated_cycles":"50"}
  %loop = (s32[]{:T(128)}, bf16[4,2,8]{2,1,0}, bf16[2,8]{1,0}) while(%fill), \
condition=%ticks_left, body=%tick, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %a.1 = bf16[4,2,8]{2,1,0} get-tuple-element(%loop), index=1
}
""".replace("\\\n", "")
TPU_RING = (jnp.bfloat16, (4, 2, 8))


def tpu(extra=""):
  return parse(TPU.replace("EXTRA", extra))


def test_types_with_layouts_and_tuples_are_read():
  tick = tpu()["tick"]
  assert tick.instructions["t.0"].shapes == (
    Shape("s32", ()),
    Shape("bf16", (4, 2, 8)),
    Shape("bf16", (2, 8)),
  )
  assert tick.instructions["choice"].operands == ("t.1", "t.3", "t.0")
  assert tick.instructions["choice"].runs == ("idle", "work")
  assert tick.root.name == "t.9"
  assert str(Shape.of(jnp.float8_e4m3fn, (2,))) == "f8e4m3fn[2]"
  assert [str(Shape.of(d, ())) for d in (bool, "int32", "uint8")] == ["pred[]", "s32[]", "u8[]"]


def test_a_text_that_is_no_program():
  with pytest.raises(ValueError, match=r"no ENTRY computation .* pass compiled.as_text\(\)"):
    parse("module @jit_f {}")


def test_a_ring_written_in_place_is_not_copied():
  found = read_compiled(ticks(lambda i, ring, x: put(ring, x * i, i)), [RING])
  assert found.copies == ()
  assert found.loops[0].trips == 6
  assert found.instructions > 10
  assert found.memory is not None and found.memory.temporary > 0
  assert found.memory.total >= found.memory.arguments + found.memory.temporary


def both(i, ring, x):
  """Old and new contents are both wanted."""
  new = put(ring, x, i)
  return lax.cond(new[0, 0, 0] > 2, lambda: ring, lambda: new)


@pytest.mark.parametrize(
  "body",
  [
    both,
    lambda i, ring, x: put(ring, x, i) * 2,
    lambda i, ring, x: put(lax.rev(ring, (0,)), x, i),
    lambda i, ring, x: jnp.where(x[None] > 2, ring, put(ring, x, i)[::-1]),
  ],
)
def test_a_ring_that_is_written_whole_inside_a_loop_is_found(body):
  copies = read_compiled(ticks(body), [RING]).copies
  assert copies
  assert {str(copy.ring) for copy in copies} == {"f32[5,4,64]"}


@pytest.mark.parametrize(
  "line, moved",
  [
    ("copy(%t.2)", False),
    ("broadcast(%t.1), dimensions={}", False),
    ("fusion(%t.2), kind=kLoop, calls=%fused.2", False),
    ("copy-start(%t.2)", True),
  ],
)
def test_copies_in_a_tpu_program(line, moved):
  kind = "bf16[4,2,8]{2,1,0:T(8,128)(2,1)S(1)}"
  result = f"({kind}, bf16[4,2,8]{{2,1,0}}, u32[])" if moved else kind
  module = tpu(f"%extra = {result} {line}")
  (copy,) = ring_copies(module, [TPU_RING])
  assert (copy.name, copy.computation, copy.moved) == ("extra", "tick", moved)
  assert copy.written == kind


@pytest.mark.parametrize(
  "line, found",
  [
    ("%extra = f32[8,2,4]{2,1,0} convert(%view)", True),
    ("%extra = bf16[64]{0} copy(%view)", True),
    ("%extra = bf16[8,8]{1,0} fusion(%view), kind=kLoop, calls=%fused.2", False),
    ("%extra = f32[8,2,4]{1,2,0} fusion(%view), kind=kLoop, calls=%fused.2", True),
    ("%extra = bf16[64]{0} copy(%other)", False),
  ],
)
def test_a_ring_in_another_shape_or_dtype_is_still_the_ring(line, found):
  """A conversion or a change of layout writes no array of the ring's own type."""
  views = "%view = bf16[8,8]{1,0} bitcast(%t.2)\n  %other = bf16[8,8]{1,0} bitcast(%t.3)\n  "
  copies = ring_copies(tpu(views + line), [TPU_RING])
  assert [copy.name for copy in copies] == ["extra"] * found


def test_what_stands_outside_loops_is_no_copy():
  assert ring_copies(tpu(), [TPU_RING]) == []  # the fill in the entry computation


def test_cycles_are_summed_over_loops_and_kept_apart_by_branch():
  idle, work = branches(tpu(), ["F", "I"])
  assert (idle.index, idle.scope, idle.cost) == (0, None, Cost())
  # Four layers of 100 cycles, and a scatter about which the compiler says nothing.
  assert (work.index, work.scope, work.cost) == (1, "F", Cost(400, 400, 1))
  (loop,) = loops(tpu())
  assert (loop.trips, loop.outside) == (3, Cost(7, 7, 0))
  assert outside_loops(tpu()) == Cost(50, 50, 0)


def test_a_loop_of_unknown_length_counts_once_and_says_so():
  module = parse(TPU.replace("EXTRA", "").replace("compare(%c.1, %c.2)", "compare(%c.1, %c.1)"))
  _, work = branches(module)
  assert work.cost == Cost(100, 100, 2)


def test_what_runs_under_an_asynchronous_transfer():
  (permute,) = permutes(tpu())
  assert permute.asynchronous and permute.in_loop and permute.conditional is None
  assert [(name, opcode) for name, opcode, *_ in permute.under] == [("choice", "conditional")]
  # An idle device hides nothing, a working one four layers.
  assert permute.hidden == Cost(0, 400, 1)


def test_a_generic_asynchronous_transfer():
  text = TPU.replace("collective-permute-done(%start)", "async-done(%start)").replace(
    "collective-permute-start(%t.3), channel_id=1, source_target_pairs={{0,1}}",
    "async-start(%t.3), calls=%carry",
  )
  carry = "%carry (k: bf16[2,8]) -> bf16[2,8] {\n  %k = bf16[2,8] parameter(0)\n"
  carry += "  ROOT %cp = bf16[2,8] collective-permute(%k), source_target_pairs={{0,1}}\n}\n"
  module = parse(text.replace("EXTRA", "").replace("%layer (", carry + "%layer (", 1))
  found = {permute.name: permute for permute in permutes(module)}
  assert found["start"].asynchronous and found["start"].hidden.most == 400


def exchange(inside):
  mesh = make_mesh("stage:2")

  def local(x):
    send = lambda x: lax.ppermute(x, "stage", [(0, 1)])  # noqa: E731
    if inside:
      return lax.cond(x.sum() > 0, send, lambda x: x, x)
    return lax.fori_loop(0, 3, lambda i, x: send(x) + 1, x)

  sharded = jax.shard_map(local, mesh=mesh, in_specs=Spec("stage"), out_specs=Spec("stage"))
  return read_compiled(compiled(sharded, jnp.ones((2, 8)))).permutes


def test_a_synchronous_transfer():
  (permute,) = exchange(inside=False)
  assert not permute.asynchronous and permute.in_loop and permute.conditional is None
  assert permute.under == ()


def test_a_transfer_inside_a_conditional():
  """There it waits for devices that took another branch."""
  (permute,) = exchange(inside=True)
  assert permute.conditional is not None


def test_branches_are_told_apart_by_scope():
  def body(i, ring, x):
    forward = lambda: put(ring, jnp.sin(x) @ x.T @ x, i)  # noqa: E731
    backward = lambda: put(ring, jnp.cos(x), 0)  # noqa: E731
    return lax.cond(i > 2, jax.named_scope("F")(forward), jax.named_scope("B")(backward))

  found = read_compiled(ticks(body), [RING], ["F", "B", "I"])
  assert {b.scope for b in found.branches} == {"F", "B"} and found.branches[0].in_loop
  assert found.action("F") is not None and found.action("I") is None


def test_an_action_is_the_outermost_branch():
  """What an action chooses inside (its stage's place) is part of it."""

  def body(i, ring, x):
    inner = lambda: lax.cond(x[0, 0] > 1, lambda: put(ring, jnp.sin(x), i), lambda: ring)  # noqa: E731
    return lax.cond(i > 2, inner, lambda: ring)

  assert len(read_compiled(ticks(body), [RING]).branches) == 2
