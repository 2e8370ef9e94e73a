"""Rules: which dim of which parameter lies over which axis, and what cannot."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as Spec
from networks import layer_kinds, lm

import jaxpipe
from jaxpipe.parallel.placing import param_specs
from jaxpipe.parallel.redco import transformer_rules
from jaxpipe.parallel.rules import Rules

D, F, V, L = 8, 32, 100, 3


def tree(layers, **ends):
  """Shapes of a model: layers stacked, embedding and head as given."""
  nested = {}
  for path, shape in {**{f"layers/{k}": (L, *s) for k, s in layers.items()}, **ends}.items():
    *folders, leaf = path.split("/")
    at = nested
    for folder in folders:
      at = at.setdefault(folder, {})
    at[leaf] = jax.ShapeDtypeStruct(shape, jnp.float32)
  return nested


# As transformers call their parameters: in kernels [in, out], as Flax stores them.
TREES = {
  "gpt2": (
    {
      "attn/c_attn/kernel": (D, 3 * D),
      "attn/c_attn/bias": (3 * D,),
      "attn/c_proj/kernel": (D, D),
      "attn/c_proj/bias": (D,),
      "ln_1/scale": (D,),
      "mlp/c_fc/kernel": (D, F),
      "mlp/c_fc/bias": (F,),
      "mlp/c_proj/kernel": (F, D),
      "mlp/c_proj/bias": (D,),
    },
    {"embed/wte": (V, D), "embed/wpe": (64, D)},
    {
      "attn/c_attn/kernel": ("embed", "heads"),
      "attn/c_attn/bias": ("heads",),
      "attn/c_proj/kernel": ("heads", "embed"),
      "attn/c_proj/bias": ("embed",),
      "ln_1/scale": (None,),
      "mlp/c_fc/kernel": ("embed", "mlp"),
      "mlp/c_fc/bias": ("mlp",),
      "mlp/c_proj/kernel": ("mlp", "embed"),
      "mlp/c_proj/bias": ("embed",),
    },
  ),
  "llama": (
    {
      "self_attn/q_proj/kernel": (D, D),
      "self_attn/k_proj/kernel": (D, D // 2),
      "self_attn/v_proj/kernel": (D, D // 2),
      "self_attn/o_proj/kernel": (D, D),
      "mlp/gate_proj/kernel": (D, F),
      "mlp/up_proj/kernel": (D, F),
      "mlp/down_proj/kernel": (F, D),
      "input_layernorm/weight": (D,),
    },
    {"embed/embed_tokens": (V, D), "head/lm_head/kernel": (D, V)},
    {
      "self_attn/q_proj/kernel": ("embed", "heads"),
      "self_attn/k_proj/kernel": ("embed", "heads"),
      "self_attn/v_proj/kernel": ("embed", "heads"),
      "self_attn/o_proj/kernel": ("heads", "embed"),
      "mlp/gate_proj/kernel": ("embed", "mlp"),
      "mlp/up_proj/kernel": ("embed", "mlp"),
      "mlp/down_proj/kernel": ("mlp", "embed"),
      "input_layernorm/weight": (None,),
    },
  ),
  "t5": (
    {
      "SelfAttention/q/kernel": (D, 2 * D),
      "SelfAttention/k/kernel": (D, 2 * D),
      "SelfAttention/v/kernel": (D, 2 * D),
      "SelfAttention/o/kernel": (2 * D, D),
      "EncDecAttention/q/kernel": (D, 2 * D),
      "EncDecAttention/o/kernel": (2 * D, D),
      "DenseReluDense/wi_0/kernel": (D, F),
      "DenseReluDense/wo/kernel": (F, D),
      "layer_norm/weight": (D,),
    },
    {"embed/shared": (V, D)},
    {
      "SelfAttention/q/kernel": ("embed", "heads"),
      "SelfAttention/k/kernel": ("embed", "heads"),
      "SelfAttention/v/kernel": ("embed", "heads"),
      "SelfAttention/o/kernel": ("heads", "embed"),
      "EncDecAttention/q/kernel": ("embed", "heads"),
      "EncDecAttention/o/kernel": ("heads", "embed"),
      "DenseReluDense/wi_0/kernel": ("embed", "mlp"),
      "DenseReluDense/wo/kernel": ("mlp", "embed"),
      "layer_norm/weight": (None,),
    },
  ),
}


@pytest.mark.parametrize("name", TREES)
def test_two_rules_give_megatrons_layout(name):
  layers, ends, want = TREES[name]
  rules = transformer_rules(tree(layers, **ends), D)
  assert {path: rules.names(f"layers/{path}", len(shape)) for path, shape in layers.items()} == want


def test_tables_are_cut_along_the_vocabulary_and_positions_are_whole():
  layers, ends, _ = TREES["gpt2"]
  rules = transformer_rules(tree(layers, **ends, **{"head/kernel": (D, V)}), D)
  assert rules.names("embed/wte", 2) == ("vocabulary", "embed")
  assert rules.names("embed/wpe", 2) == (None, "embed")
  assert rules.names("head/kernel", 2) == ("embed", "vocabulary")


def test_a_matrix_that_neither_rule_covers_is_an_error():
  with pytest.raises(ValueError, match=r"layers/mystery/kernel \[8, 8\]: .* names in extra"):
    transformer_rules(tree({"mystery/kernel": (D, D)}), D)
  given = transformer_rules(
    tree({"mystery/kernel": (D, D)}), D, extra=[("layers/mystery/kernel", ("mlp", "embed"))]
  )
  assert given.names("layers/mystery/kernel", 2) == ("mlp", "embed")


RULES = Rules(dims=[("w", ("embed", "mlp")), ("scale", (None,))])


@pytest.mark.parametrize(
  "path, shape, sizes, want",
  [
    ("w", (8, 32), {"tensor": 2}, Spec(None, "tensor")),
    ("w", (8, 32), {"tensor": 2, "fsdp": 2}, Spec(None, ("tensor", "fsdp"))),
    ("w", (64, 32), {"tensor": 2, "fsdp": 2}, Spec("fsdp", "tensor")),
    ("w", (6, 8), {"tensor": 4, "fsdp": 3}, Spec("fsdp", "tensor")),
    ("scale", (8,), {"tensor": 2, "fsdp": 4}, Spec("fsdp")),
    ("other", (3, 10), {"fsdp": 5}, Spec(None, "fsdp")),  # `fsdp` needs no rule
    ("number", (), {"fsdp": 5}, Spec()),
  ],
)
def test_what_rules_leave_is_cut_by_fsdp(path, shape, sizes, want):
  assert RULES.spec(path, shape, sizes) == want


@pytest.mark.parametrize(
  "path, shape, sizes, message",
  [
    (
      "w",
      (8, 30),
      {"tensor": 4},
      r"mlp of 30 cannot be cut over tensor:4; use 3 .* 4 devices, or 32",
    ),
    ("other", (8, 8), {"tensor": 2}, r"parameter other .* no rule says how it lies over tensor:2"),
    ("scale", (7,), {"fsdp": 4}, r"none of its dims can be cut into fsdp:4 pieces; use fsdp:1"),
    ("w", (8,), {"tensor": 2}, r"has 1 dims, and its rule 'w' has 2 names"),
  ],
)
def test_what_does_not_fit_is_an_error(path, shape, sizes, message):
  with pytest.raises(ValueError, match=message):
    RULES.spec(path, shape, sizes)


def test_the_first_rule_that_matches_counts():
  rules = Rules(dims=[("w", None), *RULES.dims])
  assert rules.spec("w", (8, 32), {"tensor": 2}) == Spec(None, None)


def test_a_stack_may_say_which_axes_cut_a_name():
  rules = Rules(dims=RULES.dims, places={"mlp": ("sequence", "tensor")})
  spec = rules.spec("w", (8, 32), {"tensor": 2, "sequence": 2})
  assert spec == Spec(None, ("sequence", "tensor"))


@pytest.mark.parametrize(
  "mesh, changes, message",
  [
    ("stage:2,tensor:4", {}, r"heads"),
    ("stage:2,sequence:4", dict(ulysses=3), r"ulysses"),
  ],
)
def test_a_model_that_a_mesh_cannot_cut_is_refused_early(float64, mesh, changes, message):
  schedule = jaxpipe.make_schedule("1f1b", devices=2, microbatches=2)
  with pytest.raises(ValueError, match=message):
    jaxpipe.pipeline_value_and_grad(lm.stack(**changes), schedule, jaxpipe.make_mesh(mesh))


@pytest.mark.parametrize("axis", ["tensor", "sequence"])
def test_a_stack_that_does_not_share_work_over_an_axis_is_refused(axis):
  schedule = jaxpipe.make_schedule("gpipe", devices=2, microbatches=2)
  mesh = jaxpipe.make_mesh(f"stage:2,{axis}:2")
  with pytest.raises(ValueError, match=f"mesh axis {axis}:2: the stack's modules do not share"):
    jaxpipe.pipeline_value_and_grad(layer_kinds.stack("linear"), schedule, mesh)


def test_vocabulary_over_stages_and_over_tensor_are_not_combined(float64):
  stack = lm.stack(heads=2, kv_heads=2)
  schedule = jaxpipe.make_schedule("1f1b", devices=2, microbatches=2, head="sharded")
  mesh = jaxpipe.make_mesh("stage:2,tensor:2")
  with pytest.raises(ValueError, match=r"cuts the vocabulary over 2 stages, and the mesh over ten"):
    param_specs(stack.param_shapes(), stack, schedule, mesh)
