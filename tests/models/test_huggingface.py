"""Weights by Hugging Face's names: what `transformers` says of a batch, and every byte back."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxpipe
from jaxpipe.models.huggingface import check_weights, export, read_config, read_params
from jaxpipe.models.transformer.decoder import transformer
from jaxpipe.parallel.placing import layer_order
from jaxpipe.training.lm.sample import forward

FOLDERS = pathlib.Path(__file__).parents[1] / "data" / "huggingface"
MODELS = ("gpt2", "llama", "qwen2", "qwen3", "mixtral")


def load(name):
  config = read_config(FOLDERS / name)
  stack = transformer(config)
  return config, stack, read_params(FOLDERS / name, config, stack)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name):
  _, stack, params = load(name)
  expected = load_file(FOLDERS / name / "expected.safetensors")
  found = np.stack([forward(stack, params, row) for row in expected["tokens"]])
  scale = np.abs(expected["logits"]).max()
  assert np.abs(found - expected["logits"]).max() < 1e-5 * scale, name


@pytest.mark.parametrize("name", MODELS)
def test_exported_files_are_those_that_were_read(name, tmp_path):
  config, _, params = load(name)
  export(tmp_path, params, config, length=32)
  was, now = (load_file(at / "model.safetensors") for at in (FOLDERS / name, tmp_path))
  assert was.keys() == now.keys()
  for tensor, value in was.items():
    assert value.dtype == now[tensor].dtype and (value == now[tensor]).all(), tensor
  assert read_config(tmp_path) == config
  theirs, ours = (json.loads((at / "config.json").read_text()) for at in (FOLDERS / name, tmp_path))
  assert theirs["architectures"] == ours["architectures"]


@pytest.mark.parametrize(
  "name, mesh, schedule, chunks",
  [
    ("gpt2", "stage:2,tensor:2", "1f1b", 1),
    ("qwen3", "stage:2,tensor:2", "interleaved-1f1b", 2),
    ("mixtral", "stage:2,fsdp:2,expert:2", "1f1b", 1),
  ],
)
def test_read_onto_a_mesh_and_exported_from_it(name, mesh, schedule, chunks, tmp_path):
  config, stack, whole = load(name)
  plan = jaxpipe.make_schedule(schedule, devices=2, microbatches=4, chunks=chunks)
  placed = read_params(FOLDERS / name, config, stack, plan, jaxpipe.make_mesh(mesh))
  want = jaxpipe.place(whole, stack, plan, jaxpipe.make_mesh(mesh))
  for (path, a), b in zip(jax.tree.leaves_with_path(placed), jax.tree.leaves(want), strict=True):
    assert a.sharding == b.sharding and (np.asarray(a) == np.asarray(b)).all(), path
  # Small files, so that there are several and an index.
  order = layer_order(stack.depth, plan)
  export(tmp_path / "out", placed, config, length=32, order=order, limit=20_000)
  assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
  again = read_params(tmp_path / "out", config, stack)
  for (path, a), b in zip(jax.tree.leaves_with_path(again), jax.tree.leaves(whole), strict=True):
    assert (np.asarray(a) == np.asarray(b)).all(), path


def test_a_device_reads_only_its_own_pieces(monkeypatch):
  """No part that is read is larger than what a device holds of one layer."""
  from jaxpipe.models.huggingface import files

  config = read_config(FOLDERS / "llama")
  stack, read, sizes = transformer(config), files.WeightFiles.read, []

  def counting(self, name, index):
    part = read(self, name, index)
    sizes.append((name, part.size / np.prod(self.shape(name))))
    return part

  monkeypatch.setattr(files.WeightFiles, "read", counting)
  plan = jaxpipe.make_schedule("1f1b", devices=2, microbatches=4)
  read_params(FOLDERS / "llama", config, stack, plan, jaxpipe.make_mesh("stage:2,tensor:2"))
  cut = [share for name, share in sizes if not name.endswith("norm.weight")]
  assert cut and max(cut) == 0.5


@pytest.fixture
def folder(tmp_path):
  """A copy of the GPT-2 whose files may be changed."""
  shutil.copytree(FOLDERS / "gpt2", tmp_path / "model")
  return tmp_path / "model"


def rewrite(folder, change):
  tensors = load_file(folder / "model.safetensors")
  change(tensors)
  save_file(tensors, folder / "model.safetensors")


def test_files_without_the_head_in_bfloat16_with_masks(folder):
  """As the hub has GPT-2 itself: no first word in the names, and buffers among the weights."""

  def change(tensors):
    bare = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    tensors.clear()
    tensors.update({n: v.astype(ml_dtypes.bfloat16) for n, v in bare.items()})
    tensors["h.0.attn.bias"] = np.ones((1, 1, 32, 32), np.float32)
    tensors["h.1.attn.masked_bias"] = np.ones((1,), np.int8)

  rewrite(folder, change)
  config, stack, params = load("gpt2")
  found = read_params(folder, config, stack)
  rounded = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(jnp.float32), params)
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), found, rounded))


def test_weights_of_another_model_are_named_in_one_line(folder):
  def change(tensors):
    del tensors["transformer.h.2.mlp.c_fc.bias"]
    tensors["transformer.h.0.extra"] = np.ones(3, np.float32)
    tensors["transformer.wpe.weight"] = np.ones((7, 16), np.float32)

  rewrite(folder, change)
  config = read_config(folder)
  with pytest.raises(ValueError) as raised:
    check_weights(folder, config, transformer(config))
  assert str(raised.value).endswith(
    "the weights are not this model's: missing: transformer.h.2.mlp.c_fc.bias [64]; left over:"
    " transformer.h.0.extra [3]; of another shape: transformer.wpe.weight [7, 16] for [32, 16]"
  )


def test_pickles_are_refused(folder):
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
  config = read_config(folder)
  with pytest.raises(ValueError, match=r"pytorch_model.bin: a pickle runs code when it is loaded"):
    check_weights(folder, config, transformer(config))


def test_a_damaged_file_is_named(folder):
  (folder / "model.safetensors").write_bytes(b"nothing of the kind")
  config = read_config(folder)
  with pytest.raises(
    ValueError, match=r"model.safetensors: cannot be read .* fetch the file again"
  ):
    check_weights(folder, config, transformer(config))


def test_an_index_reaches_no_file_elsewhere(folder):
  index = {"weight_map": {"a": "../model.safetensors"}}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  config = read_config(folder)
  with pytest.raises(ValueError, match=r"'../model.safetensors' is not a file beside it"):
    check_weights(folder, config, transformer(config))


@pytest.mark.parametrize(
  "model, changes, message",
  [
    ("gpt2", {"model_type": "bert"}, r"model_type 'bert' is none of gpt2, llama"),
    ("gpt2", {"activation_function": "relu"}, r"activation_function 'relu' is not supported"),
    ("gpt2", {"n_head": 3}, r"width 16 over 3 heads"),
    ("llama", {"rope_parameters": {"rope_type": "yarn"}}, r"rope_type 'yarn' is not supported"),
    ("llama", {"attention_bias": True}, r"attention_bias True with mlp_bias False"),
    ("qwen2", {"use_sliding_window": True}, r"use_sliding_window True is not supported"),
    ("qwen2", {"layer_types": ["sliding_attention"]}, r"layer_types \['sliding_attention'\]"),
  ],
)
def test_what_a_configuration_asks_for_is_never_left_out(tmp_path, model, changes, message):
  fields = json.loads((FOLDERS / model / "config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps({**fields, **changes}))
  with pytest.raises(ValueError, match=message):
    read_config(tmp_path)


def test_a_missing_field_and_a_missing_file(tmp_path):
  with pytest.raises(ValueError, match=r"config.json: not found"):
    read_config(tmp_path)
  (tmp_path / "config.json").write_text('{"model_type": "llama"}')
  with pytest.raises(ValueError, match=r"config.json: has no 'num_attention_heads'"):
    read_config(tmp_path)


def test_old_and_new_names_of_rotary_positions_agree(tmp_path):
  fields = json.loads((FOLDERS / "llama" / "config.json").read_text())
  rope = fields.pop("rope_parameters")
  fields |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
  (tmp_path / "config.json").write_text(json.dumps(fields))
  assert read_config(tmp_path) == read_config(FOLDERS / "llama")


def test_a_model_without_a_name_cannot_be_exported(tmp_path):
  config, _, params = load("llama")
  strange = dataclasses.replace(config, norm="layernorm")
  with pytest.raises(ValueError, match=r"no model of gpt2, .* has norm 'layernorm'"):
    export(tmp_path, params, strange, length=32)
  (tmp_path / "here").touch()
  with pytest.raises(ValueError, match=r"not an empty folder"):
    export(tmp_path, params, config, length=32)
