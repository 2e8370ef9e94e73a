"""Whatever is wrong with a command: one line with flag, numbers and remedy, and nothing touched."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from absl import flags as absl_flags

from jaxpipe.schedules import schedule_names
from jaxpipe.training.flags.errors import ConfigError
from jaxpipe.training.flags.flags import define_flags, parse_flags, read_flags
from jaxpipe.training.lm.config import Config
from jaxpipe.training.lm.run import build_run
from jaxpipe.training.loop.loop import train

ROOT = Path(__file__).parents[3]

ERRORS = [
  ({"steps": 0}, "--steps=0 is not a count; use 1 or more"),
  ({"learning_rate": -1.0}, "--learning_rate=-1.0 is negative or no number; use 0 or more"),
  ({"learning_rate": float("nan")}, "--learning_rate=nan is negative or no number; use 0 or more"),
  ({"clip_norm": float("inf")}, "--clip_norm=inf is not finite; use a number"),
  ({"dtype": "float16"}, "--dtype=float16 is unknown; use float32 or bfloat16"),
  ({"dropout": 1.0}, "--dropout=1.0 is no rate; use 0 or more, below 1"),
  (
    {"profile_steps": "5:2"},
    "--profile_steps=5:2 is not START:STOP with START below STOP; use 10:13",
  ),
  (
    {"profile_steps": "9:12", "steps": 5},
    "--profile_steps=9:12 begins after --steps=5; begin before",
  ),
  ({"unroll": "most"}, "--unroll=most is unknown; use auto, none, ends, all"),
  ({"slack": 2}, "--slack=2 ticks cannot be executed; use 0 or 1"),
  ({"memory_limit": -1.0}, "--memory_limit=-1.0 is negative or no number; use 0 or more"),
  (
    {"schedule": "auto", "chunks": 2},
    "--chunks=2 is for a schedule by name, --schedule=auto decides it; leave --chunks out",
  ),
  ({"prompt": "\udcff"}, '--prompt="\\udcff" is not UTF-8; write it in UTF-8'),
  ({"mesh": ""}, "--mesh=: the mesh is empty; write stage:N"),
  (
    {"tokenizer": "bpe:100000000000000000000"},
    "--tokenizer=bpe:100000000000000000000: '100000000000000000000' is not a size from 257 to"
    " 16777216; use byte, bpe:4096 or a JSON file",
  ),
  (
    {"mesh": "stage:64"},
    "--mesh=stage:64: mesh stage:64 needs 64 devices but there are 8 (cpu); take a smaller mesh,"
    " or on CPU force 64: ./launch/local.sh --devices=64 SCRIPT,"
    " or XLA_FLAGS=--xla_force_host_platform_device_count=64",
  ),
  (
    {"mesh": "pipe:4"},
    "--mesh=pipe:4: mesh 'pipe:4': no axis 'pipe'; the axes are stage, data, fsdp,"
    " expert, sequence, tensor",
  ),
  (
    {"layers": 6},
    "--layers=6 --mesh=stage:4: 6 layers cannot fill 4 stages evenly; use 3 stages, or a multiple"
    " of 4 layers",
  ),
  (
    {"schedule": "zigzag"},
    "--schedule=zigzag --microbatches=4: unknown schedule 'zigzag'; known: "
    + ", ".join(schedule_names()),
  ),
  (
    {"chunks": 2},
    "--schedule=1f1b --microbatches=4 --chunks=2: 1f1b has 1 chunk(s) per device, not 2;"
    " use chunks=1",
  ),
  (
    {"batch_size": 6},
    "--batch_size=6 --microbatches=4 --mesh=stage:4: 6 rows cannot be cut into 4 microbatches over"
    " 1 data shard; use a multiple of 4 rows",
  ),
  (
    {"mesh": "stage:4,data:2"},
    "--batch_size=4 --microbatches=4 --mesh=stage:4,data:2: 4 rows cannot be cut into 4"
    " microbatches over 2 data shards; use a multiple of 8 rows",
  ),
  (
    {"width": 18, "heads": 4, "kv_heads": 4},
    "--width=18 --heads=4 --kv_heads=4 --mlp=swiglu: width 18 over 4 heads does not give an even"
    " head width; use a multiple of 8",
  ),
  (
    {"heads": 4, "kv_heads": 3},
    "--width=16 --heads=4 --kv_heads=3 --mlp=swiglu: 3 kv_heads do not divide 4 heads; use a"
    " divisor",
  ),
  (
    {"mlp": "relu"},
    "--width=16 --heads=2 --kv_heads=1 --mlp=relu: mlp 'relu' is unknown; use swiglu or gelu",
  ),
  (
    {"mesh": "stage:2,tensor:2", "heads": 3, "width": 24, "kv_heads": 3},
    "--mesh=stage:2,tensor:2 --heads=3 --kv_heads=3: 3 heads cannot be cut over tensor:2; use 2"
    " or 4 heads",
  ),
  (
    {"mesh": "stage:2,sequence:4", "sequence_length": 12},
    "--sequence_length=12 --mesh=stage:2,sequence:4 --nosequence_parallel: 12 positions cannot be"
    " cut into 8 chunks, two for each device of sequence:4; use a length of 8 or 16",
  ),
  (
    {"mesh": "stage:2,sequence:4", "ulysses": 3, "sequence_length": 16},
    "--mesh=stage:2,sequence:4 --heads=2 --kv_heads=1 --ulysses=3: ulysses=3 does not divide the"
    " 4 devices of sequence:4; use ulysses=2",
  ),
  (
    {"mesh": "stage:2,expert:4", "experts": 6, "batch_size": 16},
    "--mesh=stage:2,expert:4 --heads=2 --kv_heads=1 --experts=6: 6 experts cannot lie over 4"
    " devices (expert:4); use 4 or 8 experts, or 3 or 6 devices",
  ),
  (
    {"experts": 4, "top_k": 5},
    "--experts=4 --top_k=5 --capacity_factor=0.0 --expert_axes=expert: top_k 5 of 4 experts is"
    " impossible; use 1 to 4",
  ),
  (
    {"experts": 4, "expert_axes": "fsdp"},
    "--experts=4 --top_k=2 --capacity_factor=0.0 --expert_axes=fsdp: experts cannot lie over"
    " ['fsdp']; the axes are data, expert, sequence, tensor",
  ),
  (
    {"experts": 4, "head": "sharded"},
    "--experts=4 cannot be combined with --head=sharded; use --head=last, or leave it out",
  ),
  (
    {"expert_axes": "sequence"},
    "--expert_axes=sequence is for --experts; give them, too",
  ),
  (
    {"logits_chunk": 3},
    "--logits_chunk=3 --sequence_length=16 --mesh=stage:4: 16 positions cannot be cut into"
    " chunks of 3 logits; use 2, or 0",
  ),
  (
    {"mesh": "stage:-1,tensor:3"},
    "--mesh=stage:-1,tensor:3: mesh 'stage:-1,tensor:3': 3 does not divide the 8 devices, so that"
    " stage:-1 has no size; let the others multiply to 2",
  ),
  (
    {"slow_axis": "tensor"},
    "--slow_axis=tensor cannot lie between hosts; use stage or data",
  ),
  ({"text": ""}, "no text is given; use --text=FILE, --text=FILE,FILE or --text=FOLDER"),
  ({"text": "/no/such.txt"}, "/no/such.txt: no such file or folder; check --text"),
  (
    {"tokenizer": "/no/such.json"},
    "/no/such.json: no such tokenizer file; check --tokenizer, or use bpe:SIZE to train one",
  ),
]


@pytest.mark.parametrize(("changes", "message"), ERRORS, ids=lambda value: str(value)[:40])
def test_one_line_names_flag_numbers_and_remedy(
  tiny: Callable[..., Config], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
  with pytest.raises(ValueError) as caught:
    build_run(tiny(**changes))
  assert str(caught.value) == message
  assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize("name", ["residuals", "backward"])
def test_unknown_words_name_their_flag(tiny: Callable[..., Config], name: str) -> None:
  with pytest.raises(ConfigError, match=f"--{name}=sideways.*: .*sideways"):
    build_run(tiny(**{name: "sideways"}))


def test_names_that_no_layer_bears(tiny: Callable[..., Config]) -> None:
  with pytest.raises(ConfigError, match=r"--residuals=names:atention: .*did you mean attention\?"):
    build_run(tiny(residuals="names:atention"))


def test_damaged_token_bin_is_refused(tiny: Callable[..., Config], tmp_path: Path) -> None:
  setup = build_run(tiny())
  bin_file = tmp_path / "short.bin"
  bin_file.write_bytes(setup.data.train.path.read_bytes()[:-2])
  with pytest.raises(ValueError, match=r"short.bin: \d+ bytes, but its header says \d+ tokens"):
    build_run(tiny(text=str(bin_file)))


def test_folder_of_somebody_else_is_left_alone(tiny: Callable[..., Config], tmp_path: Path) -> None:
  thesis = tmp_path / "run" / "thesis.txt"
  thesis.parent.mkdir()
  thesis.write_text("years of work")
  with pytest.raises(ConfigError, match=r"--run_dir=.*run: not empty and not a jaxpipe run"):
    build_run(tiny())
  assert list(thesis.parent.iterdir()) == [thesis]


def test_damaged_record_is_refused(tiny: Callable[..., Config], tmp_path: Path) -> None:
  record = tmp_path / "run" / "config.json"
  record.parent.mkdir()
  record.write_text('{"format": "jaxpipe run 1"')
  with pytest.raises(ConfigError, match=r"config.json: damaged .*use another --run_dir"):
    build_run(tiny())


SAME = {
  "width": 32,
  "tied": True,
  "dropout": 0.1,
  "dtype": "bfloat16",
  "batch_size": 8,
  "sequence_length": 8,
  "seed": 1,
  "learning_rate": 1e-3,
  "weight_decay": 0.0,
  "validation_fraction": 0.1,
}


@pytest.fixture
def begun(tiny: Callable[..., Config]) -> Callable[..., Config]:
  build_run(tiny()).begin()
  return tiny


@pytest.mark.parametrize("name", SAME)
def test_resume_refuses_what_would_train_another_model(
  begun: Callable[..., Config], tmp_path: Path, name: str
) -> None:
  before = (tmp_path / "run" / "config.json").read_bytes()
  with pytest.raises(ConfigError) as caught:
    build_run(begun(**{name: SAME[name]}))
  now, was = begun(**{name: SAME[name]}).flag(name), begun().flag(name)
  assert str(caught.value) == (
    f"{now}: the run in {tmp_path}/run has {was}; repeat that to resume it,"
    " or use another --run_dir"
  )
  assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_resume_refuses_another_text(begun: Callable[..., Config], text: Path) -> None:
  text.write_text(text.read_text().replace("mind", "MIND"))
  with pytest.raises(ConfigError, match=r"--text=.*: its tokens is .* the run in .* has .*another"):
    build_run(begun())


@pytest.mark.parametrize(
  "changes",
  [
    {"mesh": "stage:2,data:2", "microbatches": 2, "schedule": "gpipe", "backward": "split"},
    {"residuals": "full", "steps": 7, "checkpoint_every": 1, "validate_every": 3},
  ],
)
def test_resume_accepts_another_way_of_computing(
  begun: Callable[..., Config], changes: dict[str, Any]
) -> None:
  build_run(begun(**changes))


def test_same_text_may_move(begun: Callable[..., Config], text: Path) -> None:
  build_run(begun(text=str(text.rename(text.with_name("moved.txt")))))


def _parse(*words: str) -> Config:
  values = absl_flags.FlagValues()
  define_flags(Config(), values)
  parse_flags(["lm.py", *words], values)
  return read_flags(Config, values)


def test_flags_fill_the_configuration() -> None:
  config = _parse("--layers=8", "--tied", "--learning_rate=0.5", "--mesh=stage:2,data:2")
  want = Config(layers=8, tied=True, learning_rate=0.5, mesh="stage:2,data:2")
  assert config == want
  assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
  ("word", "message"),
  [
    ("--sed=1", "--sed: unknown flag; did you mean --seed?"),
    ("--qqqq", "--qqqq: unknown flag; --help lists the flags"),
    ("stray", "'stray' is not a flag; write --NAME=VALUE, --help lists the flags"),
    ("--layers=two", "flag --layers=two: invalid literal for int() with base 10: 'two'"),
  ],
)
def test_wrong_flags_are_one_line(word: str, message: str) -> None:
  with pytest.raises(ConfigError) as caught:
    _parse(word)
  assert str(caught.value) == message


def test_help_is_no_error() -> None:
  command = [sys.executable, str(ROOT / "experiments" / "lm.py"), "--help"]
  environment = {**_environ(), "PYTHONPATH": str(ROOT)}
  done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
  assert done.returncode == 0 and "--microbatches: microbatches M" in done.stdout


def test_two_processes_never_train_in_one_folder(tiny: Callable[..., Config]) -> None:
  """The second would drop the first one's metrics and clean up its unfinished checkpoints."""
  config = tiny()
  build_run(config).begin()
  code = (
    "import sys, json; from jaxpipe.training.lm.config import Config;"
    "from jaxpipe.training.lm.run import build_run;"
    "build_run(Config.from_dict(json.loads(sys.argv[1]))).begin()"
  )
  command = [sys.executable, "-c", code, json.dumps(config.to_dict())]
  environment = {**_environ(), "PYTHONPATH": str(ROOT)}
  done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
  assert "another process is training there; wait for it, or use another --run_dir" in done.stderr


@pytest.mark.smoke
@pytest.mark.sampled(
  "word", ["--layers=6", "--sed=1", "--batch_size=7", "--compilation_cache=/dev/null/x"], 2
)
def test_the_command_exits_2_with_one_line(tmp_path: Path, word: str) -> None:
  command = [sys.executable, str(ROOT / "experiments" / "lm.py"), word, f"--run_dir={tmp_path}/run"]
  environment = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")}
  done = subprocess.run(
    command, capture_output=True, text=True, check=False, env={**_environ(), **environment}
  )
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr.startswith("lm.py: --") and done.stderr.count("\n") == 1
  assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == []


def _environ() -> dict[str, str]:
  import os

  return dict(os.environ)


def test_a_bug_keeps_its_traceback(
  tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
  setup = build_run(tiny())
  monkeypatch.setattr("jaxpipe.training.loop.loop.describe", lambda _: int("a bug"))
  with pytest.raises(ValueError, match="a bug"):
    train(setup)
