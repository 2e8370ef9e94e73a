"""Adapters and frozen parameters of the transformer: exact, on the loop, and merged as they ran."""

import dataclasses

import jax
import numpy as np
import pytest
from networks import lm
from networks.drawn import drawn, drawn_state

import jaxpipe
from jaxpipe.models.transformer.adapters import Lora, divide, flops_beside_base, merge
from jaxpipe.models.transformer.config import TransformerConfig
from jaxpipe.models.transformer.decoder import transformer
from jaxpipe.models.transformer.moe import MoeConfig
from jaxpipe.pipeline.execution import Execution
from jaxpipe.stack.forward import modules

LORA = Lora(rank=2, alpha=3.0)
MOE = MoeConfig(experts=4, top_k=2, capacity_factor=0, group=0, balance=0.1, z=0.01)
# Schedule, mesh, what is frozen, and changes of the model.
CASES = [
  ("1f1b", "stage:2,tensor:2", "", dict(kv_heads=2)),
  ("zb-h1", "stage:2,data:2", "", dict(tied=False, **lm.QWEN3)),
  ("interleaved-1f1b", "stage:2,fsdp:2", "head/.*", dict(tied=False)),
  ("1f1b", "stage:2,sequence:2", "layers/.*", dict()),
  ("vocabulary", "stage:2", "", dict()),
  ("vocabulary", "stage:2,fsdp:2", "head/table|layers/.*", dict(tied=False)),
  ("vocabulary", "stage:2", "embed/.*", dict(tied=False, **lm.GPT2)),
  ("zb-v", "stage:2", "layers/[01]/.*", dict()),  # layers that are not alike: packed
  ("gpipe", "stage:2", "embed/table|layers/0/.*", dict()),
  ("1f1b", "stage:2", "layers/0/.*", dict(moe=MOE, mlp_width=8)),
]


def schedule_of(name):
  if name == "vocabulary":
    return jaxpipe.make_schedule("1f1b", devices=2, microbatches=4, head="sharded")
  return jaxpipe.make_schedule(name, devices=2, microbatches=4)


@pytest.mark.sampled("name, mesh, freeze, changes", CASES, 1)
def test_gradients_beside_what_is_frozen_are_those_of_the_merged_base(
  float64, name, mesh, freeze, changes
):
  """Compared with a model without adapters, whose parameters are what merging makes of them."""
  options = dict(layers=4, dropout=0.0, **changes)
  stack, base = lm.stack(freeze=freeze, lora=LORA, **options), lm.stack(**options)
  assert stack.uniform == ("layers/[" not in freeze and "layers/0" not in freeze)
  schedule, batch = schedule_of(name), lm.batch(8)
  pipe = jaxpipe.pipeline(None, stack, batch, mesh=mesh, schedule=schedule, microbatches=4)
  params, state = drawn(stack), drawn_state(stack)
  placed = [jaxpipe.place(tree, stack, schedule, pipe.mesh) for tree in (params, state)]
  (loss, _, after), grads = pipe.value_and_grad(placed[0], batch, None, placed[1])
  whole = jaxpipe.reference_value_and_grad(base, 4)

  def merged_loss(params):
    return whole(merge(stack, LORA, params, state), batch)[0][0]

  np.testing.assert_allclose(loss, merged_loss(params), rtol=1e-12)
  want, got = jax.grad(merged_loss)(params), pipe.unplace(grads)
  assert jax.tree.structure(want) == jax.tree.structure(got)
  for path, grad in jax.tree.leaves_with_path(want):
    found = dict(jax.tree.leaves_with_path(got))[path]
    # A bias of keys changes no softmax, so that its gradient is rounding alone.
    atol = 1e-14 + 1e-10 * float(abs(grad).max())
    np.testing.assert_allclose(found, grad, rtol=0, atol=atol, err_msg=str(path))
  jax.tree.map(np.testing.assert_array_equal, pipe.unplace(after), state)


@pytest.mark.parametrize("freeze", ["", "layers/0/.*", "embed/table"])
def test_dividing_a_base_and_merging_it_again_changes_nothing(float64, freeze):
  options = dict(layers=2, dropout=0.0)
  stack, base = lm.stack(freeze=freeze, lora=LORA, **options), lm.stack(**options)
  whole, fresh = drawn(base), stack.init(jax.random.key(0), lm.batch(2))
  params, state = divide(stack, whole, fresh)
  structure = jax.tree.structure((params, state))
  assert structure == jax.tree.structure((fresh, stack.state_shapes()))
  again = merge(stack, LORA, params, state)
  jax.tree.map(np.testing.assert_array_equal, again, whole)
  # The adapters themselves are the fresh ones, and A is not zero.
  names = {jax.tree_util.keystr(path[-1:]) for path, _ in jax.tree.leaves_with_path(params)}
  assert names >= {"['lora_a']", "['lora_b']"}


def test_an_adapted_model_begins_as_the_model_without_adapters(float64):
  """The keys of matrices do not depend on adapters that are made between them."""
  key, options = jax.random.key(0), dict(layers=2, tied=True)
  stack, base = lm.stack(lora=LORA, **options), lm.stack(**options)
  params, state = stack.init(key, lm.batch(2)), stack.init_state(key, lm.batch(2))
  got, want = merge(stack, LORA, params, state), base.init(key, lm.batch(2))
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_frozen_table_that_is_tied_exists_once_and_is_placed_alike(float64):
  key, batch = jax.random.key(0), lm.batch(4)
  stack = lm.stack(lora=LORA, tied=True)
  assert "table" in stack.state_shapes()["embed"]
  assert "table" not in stack.state_shapes()["head"]
  whole = stack.init_state(key, batch)
  schedule, mesh = schedule_of("1f1b"), jaxpipe.make_mesh("stage:2")
  placed = stack.init_state(key, batch, schedule, mesh)
  jax.tree.map(np.testing.assert_array_equal, jaxpipe.unplace(placed, stack, schedule), whole)
  head = modules(stack, stack.init(key, batch), whole)[-1]
  np.testing.assert_array_equal(head.table[...], whole["embed"]["table"])


def test_w_computes_gradients_of_adapters_alone(float64):
  schedule, mesh = schedule_of("zb-h1"), jaxpipe.make_mesh("stage:2")

  def split(**options):
    execution = Execution.of(lm.stack(layers=2, dropout=0.0, **options), schedule, mesh)
    return execution.inspect(lm.batch(4), lambda device: device.stage.split)

  def gradients(split):
    return {v.aval.shape for v in split.weight_grad.outputs}

  adapted, base = split(lora=LORA), split()
  kernels = {(8, 8), (8, 4), (8, 32), (32, 8)}
  assert gradients(base) >= kernels and not gradients(adapted) & kernels
  assert {shape for shape in gradients(adapted) if 2 not in shape} == set()


def test_what_is_frozen_takes_four_flops_and_an_adapter_six():
  shape = dict(vocabulary_size=16, layers=3, width=8, heads=2, kv_heads=1, mlp_width=32)
  config = TransformerConfig(**shape, lora=LORA)
  matrices = 8 * 8 * 2 + 8 * 4 * 2 + 3 * 8 * 32
  adapters = 2 * (16 * 2 + 12 * 2 + 3 * 40)
  assert flops_beside_base(transformer(config)) == 6 * 3 * adapters - 2 * (3 * matrices + 16 * 8)
  assert flops_beside_base(transformer(TransformerConfig(**shape))) == 0
  tied = TransformerConfig(**shape, tied=True)
  assert flops_beside_base(transformer(tied, "embed/.*|head/norm/.*")) == -2 * 16 * 8


@pytest.mark.parametrize(
  "freeze, changes, message",
  [
    ("layers/9/.*", {}, r"freeze 'layers/9/\.\*' matches no parameter's whole path; there are emb"),
    (".*", {}, r"trainable: all but freeze='\.\*' matches no variable of the stack"),
    ("(", {}, r"freeze '\(' is no regular expression"),
  ],
)
def test_expressions_that_freeze_nothing_or_everything(float64, freeze, changes, message):
  with pytest.raises(ValueError, match=message):
    lm.stack(freeze=freeze, **changes)


def test_experts_count_as_far_as_a_token_visits_them():
  shape = dict(vocabulary_size=16, layers=3, width=8, heads=2, kv_heads=1, mlp_width=32)
  config = TransformerConfig(**shape, moe=dataclasses.replace(MOE, experts=8), lora=LORA)
  attention, adapters = 8 * 8 * 2 + 8 * 4 * 2, 2 * (16 * 2 + 12 * 2)
  met = 3 * (attention + 3 * 8 * 32 * 2 + 8 * 8) + 16 * 8
  assert flops_beside_base(transformer(config), 2 / 8) == 6 * 3 * adapters - 2 * met


def test_adapters_that_are_none():
  with pytest.raises(ValueError, match=r"rank 0 .* use a rank of 1"):
    Lora(0, 1.0)
  with pytest.raises(ValueError, match="an alpha above 0"):
    Lora(2, 0.0)
