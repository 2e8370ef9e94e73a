"""Out of a run and into another: the same model by Hugging Face's files."""

import pathlib
import subprocess
import sys
from collections.abc import Callable

import jax
import numpy as np
import pytest

from jaxpipe.models.huggingface import read_config, read_params
from jaxpipe.training.export import export_run
from jaxpipe.training.flags.errors import ConfigError
from jaxpipe.training.lm.config import Config
from jaxpipe.training.lm.load import load
from jaxpipe.training.lm.run import build_run
from jaxpipe.training.loop.loop import train
from jaxpipe.training.loop.metrics import read_records
from jaxpipe.training.plan.run_dir import RunDir
from jaxpipe.training.plan.state import create_state

GPT2 = dict(norm="layernorm", bias="all", positions="learned", mlp="gelu", kv_heads=2)


def test_a_run_is_exported_and_another_begins_from_it(
  tiny: Callable[..., Config], tmp_path: pathlib.Path
) -> None:
  assert train(build_run(tiny(steps=2, tokenizer="bpe:260", **GPT2)).begin()) == 0
  run, folder = load(tmp_path / "run"), tmp_path / "out"
  assert export_run(str(tmp_path / "run"), str(folder)) == 2
  assert {p.name for p in folder.iterdir()} == {
    "config.json",
    "model.safetensors",
    "tokenizer.json",
  }
  next_run = dict(tokenizer=str(folder / "tokenizer.json"), init_from=str(folder), **GPT2)
  setup = build_run(tiny(run_dir=str(tmp_path / "next"), **next_run))
  assert read_config(folder) == setup.model
  params, _ = setup.first_values(jax.random.key(0))
  found = read_params(folder, setup.model, setup.stack)
  for a, b, c in zip(*map(jax.tree.leaves, (params, found, run.params)), strict=True):
    assert (np.asarray(a) == np.asarray(c)).all() and (np.asarray(b) == np.asarray(c)).all()


@pytest.mark.sampled("freeze", ["", "embed/.*|head/.*|layers/[01]/.*"], 1)
def test_adapters_begin_from_a_folder_resume_and_are_exported_merged(
  tiny: Callable[..., Config], tmp_path: pathlib.Path, freeze: str
) -> None:
  """Frozen values are the folder's to the end, and the merged model is as good as the adapted."""
  assert train(build_run(tiny(steps=2, tokenizer="bpe:260", tied=True)).begin()) == 0
  folder, out = tmp_path / "base", tmp_path / "out"
  export_run(str(tmp_path / "run"), str(folder))
  shape = dict(tokenizer=str(folder / "tokenizer.json"), init_from=str(folder), tied=True)
  flags = dict(shape, run_dir=str(tmp_path / "lora"), lora_rank=2, freeze=freeze, mesh="stage:2")
  setup = build_run(tiny(steps=2, **flags))
  assert setup.stack.uniform == (not freeze)
  assert train(setup.begin()) == 0
  assert train(build_run(tiny(steps=4, **flags)).begin()) == 0
  run, before = load(tmp_path / "lora"), load(tmp_path / "run")
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), run.params, before.params)
  layers = moved["layers"]
  assert layers["query"]["kernel"] and layers["down"]["kernel"]
  assert not moved["embed"]["table"] and not moved["head"]["norm"]["scale"]
  scale = np.asarray(run.params["layers"]["mlp_norm"]["scale"])
  kept = (scale == np.asarray(before.params["layers"]["mlp_norm"]["scale"])).all(axis=1)
  assert kept.tolist() == ([True] * 4 if not freeze else [True, True, False, False])
  assert export_run(str(tmp_path / "lora"), str(out)) == 4
  merged = build_run(tiny(run_dir=str(tmp_path / "next"), **{**shape, "init_from": str(out)}))
  state = create_state(
    *(merged.stack, merged.optimizer, 0, merged.batch_shapes, merged.schedule, merged.mesh),
    values=merged.first_values,
  )
  records = list(read_records(RunDir(tmp_path / "lora").metrics))
  np.testing.assert_allclose(
    merged.validator()(state)["loss"], records[-1]["validation_loss"], rtol=1e-6
  )


def test_weights_of_another_shape_are_refused_before_anything_runs(
  tiny: Callable[..., Config], tmp_path: pathlib.Path
) -> None:
  fixture = pathlib.Path(__file__).parents[1] / "data" / "huggingface" / "gpt2"
  with pytest.raises(ConfigError, match=r"^--init_from=.*gpt2: .* missing: model.embed_tokens"):
    build_run(tiny(init_from=str(fixture)))
  assert not (tmp_path / "run").exists()


def test_rows_longer_than_the_learned_positions(tiny: Callable[..., Config]) -> None:
  with pytest.raises(
    ConfigError, match="--sequence_length=16 --max_positions=8: rows of 16 tokens"
  ):
    build_run(tiny(positions="learned", max_positions=8))


def test_the_command_fails_in_one_line(tmp_path: pathlib.Path) -> None:
  command = [sys.executable, "-m", "jaxpipe.training.export", str(tmp_path / "none"), "out"]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no run there" in done.stderr
