"""Flags that stand for a whole model: `--preset` and `--init_from`, and what overrides them."""

import dataclasses
import json
import pathlib
import shutil

import pytest
from absl import flags as absl_flags

from jaxpipe.models.huggingface import read_config as read_model
from jaxpipe.models.transformer.presets import PRESETS
from jaxpipe.training.flags.errors import ConfigError
from jaxpipe.training.flags.flags import define_flags, parse_flags
from jaxpipe.training.lm.config import Config
from jaxpipe.training.lm.model_flags import read_config
from jaxpipe.training.plan.run_dir import RunDir, RunRecord

FOLDERS = pathlib.Path(__file__).parents[2] / "data" / "huggingface"


def parse(*words: str) -> Config:
  values = absl_flags.FlagValues()
  define_flags(Config(), values)
  parse_flags(["lm.py", *words], values)
  return read_config(values)


@pytest.mark.parametrize("name", PRESETS)
def test_flags_give_the_model_of_the_preset(name: str) -> None:
  want = PRESETS[name]
  config = parse(f"--preset={name}")
  assert config.model(1) == want
  # What a run records is what it resolved to, not the name alone.
  assert Config.from_dict(json.loads(json.dumps(config.to_dict()))).model(1) == want


def test_flags_that_are_given_override_the_preset() -> None:
  config = parse("--preset=gpt2", "--layers=4", "--notied", "--vocabulary_size=0")
  model = config.model(256)
  changes = dict(layers=4, tied=False, vocabulary_size=256)
  assert model == dataclasses.replace(PRESETS["gpt2"], **changes)


def test_learned_positions_are_as_many_as_the_row_unless_told() -> None:
  model = parse("--positions=learned", "--sequence_length=64").model(256)
  assert model.max_positions == 64


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["--preset=qwen3"], "--preset=qwen3: 'qwen3' is unknown; did you mean qwen3-"),
    (["--preset=gpt2", "--init_from=x"], "--preset=gpt2 --init_from=x: both say what the model's"),
    (["--init_from=nowhere"], "--init_from=nowhere: nowhere/config.json: not found; give a folder"),
    ([f"--init_from={FOLDERS}/gpt2"], "has no tokenizer.json; give the model's --tokenizer"),
    (["--norm=none"], "--norm=none is none of rmsnorm, layernorm"),
    (["--rope_scaling=8"], "--rope_scaling=8: '8' is not FACTOR,LOW,HIGH,LENGTH"),
  ],
)
def test_what_cannot_be_is_one_line(words: list[str], message: str) -> None:
  with pytest.raises(ConfigError) as raised:
    parse(*words)
  assert message in str(raised.value) and "\n" not in str(raised.value)


def test_too_few_rows_for_the_tokenizer() -> None:
  with pytest.raises(ConfigError, match=r"--vocabulary_size=100 is too small .* 256 ids; use 256"):
    Config(vocabulary_size=100).model(256)


def test_a_folder_gives_its_shape_and_its_tokenizer(tmp_path: pathlib.Path) -> None:
  folder = tmp_path / "model"
  shutil.copytree(FOLDERS / "qwen3", folder)
  config = parse(f"--init_from={folder}", "--tokenizer=byte")
  assert config.model(1) == read_model(folder) and config.tokenizer == "byte"
  (folder / "tokenizer.json").touch()
  config = parse(f"--init_from={folder}", "--dropout=0.1")
  assert config.tokenizer == f"{folder}/tokenizer.json" and config.dropout == 0.1
  # A run's record is read back without the folder.
  shutil.rmtree(folder)
  (tmp_path / "run").mkdir()
  record = RunRecord(config=config, data={})
  (tmp_path / "run" / "config.json").write_text(
    json.dumps({"format": "jaxpipe run 1", "config": config.to_dict(), "data": {}})
  )
  assert RunDir(tmp_path / "run").read(Config) == record
