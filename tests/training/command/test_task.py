"""A run of something that is not text: resumed, moved, refused, and its result told."""

import dataclasses
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxpipe
from jaxpipe.training.command.task import Baseline, Task, TaskConfig
from jaxpipe.training.command.task_run import build_run, conclude
from jaxpipe.training.flags.errors import ConfigError
from jaxpipe.training.flags.settings import same
from jaxpipe.training.loop.checkpoint import Checkpoints
from jaxpipe.training.loop.loop import train
from jaxpipe.training.loop.metrics import MetricsWriter, Record

ROOT = Path(__file__).parents[3]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LineRun(TaskConfig):
  depth: int = same(4, "layers")
  identity: str = same("a", "of the data")


class Embed(nnx.Module):
  def __init__(self, rngs):
    self.inner = nnx.Linear(3, 4, rngs=rngs)

  def __call__(self, batch):
    return self.inner(batch["x"])


class Layer(nnx.Module):
  def __init__(self, rngs):
    self.inner = nnx.Linear(4, 4, rngs=rngs)

  def __call__(self, x, context):
    return x + context.dropout(jnp.tanh(self.inner(x)), 0.1)


class Head(nnx.Module):
  def __init__(self, rngs):
    self.inner = nnx.Linear(4, 1, rngs=rngs)

  def __call__(self, x, batch):
    off = self.inner(x)[:, 0] - batch["y"]
    weights = batch["weights"]
    return jnp.sum(weights * off**2), jnp.sum(weights), {"off": jnp.sum(weights * jnp.abs(off))}


def draw(rows: int, *seed: int) -> dict[str, np.ndarray]:
  x = np.random.default_rng(seed).normal(size=(rows, 3)).astype(np.float32)
  weights = np.ones(rows, np.float32)
  weights[: seed[-1] % rows] = 0  # so that batches weigh unlike
  return {"x": x, "y": x.sum(axis=1), "weights": weights}


def build(config: LineRun) -> Task:
  B = config.batch_size
  return Task(
    stack=jaxpipe.LayerStack(embed=Embed, layers=[Layer] * config.depth, head=Head),
    batches=lambda step: draw(B, config.seed, step),
    validation=[draw(B, 7, i) for i in range(3)],
    summarize=lambda loss, metrics, weight: {"off": metrics["off"] / weight},
    baseline=Baseline(name="zero", metrics={"loss": 3.0}),
    finish=lambda params, state: f"bias {params['head']['inner']['bias'].shape} {state}",
    identity={"data": config.identity},
    data_line="data: drawn",
  )


def config(folder: Path, **changes: Any) -> LineRun:
  small: dict[str, Any] = dict(steps=12, batch_size=8, warmup_steps=2, learning_rate=1e-2)
  options: dict[str, Any] = dict(mesh="stage:2", unroll="none", validate_every=5)
  return LineRun(**{"run_dir": str(folder / "run"), **small, **options, **changes})


def run(folder: Path, **changes: Any) -> int:
  return train(build_run(config(folder, **changes), build).begin())


def read(folder: Path) -> list[dict[str, Any]]:
  records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open()]
  assert [record["step"] for record in records] == list(range(len(records)))
  return records


def numbers(folder: Path) -> list[dict[str, Any]]:
  """All but the clock."""
  return [{k: v for k, v in record.items() if k != "step_seconds"} for record in read(folder)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """The folder of a run that nobody disturbed."""
  folder = tmp_path_factory.mktemp("whole")
  assert run(folder) == 0
  return folder


def test_metrics_are_the_contract(whole: Path) -> None:
  records = read(whole)
  always = ["step", "loss", "grad_norm", "learning_rate", "step_seconds", "validation_loss"]
  assert all(list(record)[:6] == always for record in records)
  measured = [r["step"] for r in records if r["validation_loss"] is not None]
  assert measured == [4, 9, 11] == [r["step"] for r in records if "validation_off" in r]
  assert (whole / "run" / "loss.png").exists()


def test_validation_is_over_all_rows_by_weight(whole: Path) -> None:
  """Batches that weigh unlike: the mean of their means would be another number."""
  setup = build_run(config(whole), build)
  params, _ = restored(setup)
  stack, total, off, weight = setup.stack, 0.0, 0.0, 0.0
  for batch in setup.task.validation:
    x = stack.apply_embed(params["embed"], batch)
    for i in range(4):
      inner = {k: v[i] for k, v in params["layers"]["inner"].items()}
      x = x + jnp.tanh(x @ inner["kernel"] + inner["bias"][None])
    loss, (w, metrics) = stack.apply_head(params["head"], x, batch)
    total, off, weight = total + loss, off + metrics["off"], weight + w
  last = read(whole)[-1]
  np.testing.assert_allclose(last["validation_loss"], total / weight, rtol=1e-5)
  np.testing.assert_allclose(last["validation_off"], off / weight, rtol=1e-5)


def restored(setup: Any) -> Any:
  from jaxpipe.training.command.task_run import _restore

  return _restore(setup)


def test_the_result_stands_beside_its_baseline(
  whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  conclude(build_run(config(whole), build))
  last = read(whole)[-1]
  assert capsys.readouterr().out == (
    f"result after 12 steps: loss {last['validation_loss']:.4f}  off {last['validation_off']:.4f}"
    "  (zero: loss 3.0000)\nbias (1,) {}\n"
  )


@pytest.fixture
def interrupt_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
  """`interrupt_after(step)`: sends SIGINT when that step is written."""
  write = MetricsWriter.write

  def arm(step: int) -> None:
    def writing(self: MetricsWriter, record: Record) -> None:
      write(self, record)
      if record.step == step:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(MetricsWriter, "write", writing)

  return arm


def test_a_resumed_run_is_the_same_bit_for_bit(
  tmp_path: Path, whole: Path, interrupt_after: Callable[[int], None]
) -> None:
  interrupt_after(3)
  assert run(tmp_path) == 128 + signal.SIGINT
  done = Checkpoints(tmp_path / "run" / "checkpoints", read_only=True).newest
  assert done in (4, 5)
  assert run(tmp_path) == 0
  assert numbers(tmp_path) == numbers(whole)


def test_a_run_moves_to_another_mesh_and_schedule(
  tmp_path: Path, whole: Path, interrupt_after: Callable[[int], None]
) -> None:
  interrupt_after(3)
  run(tmp_path, mesh="stage:1")
  assert run(tmp_path, mesh="stage:2,data:2", schedule="zb-v") == 0
  for name in ("loss", "grad_norm"):
    got, want = ([record[name] for record in read(folder)] for folder in (tmp_path, whole))
    np.testing.assert_allclose(got, want, rtol=1e-4)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"batch_size": 6}, "--batch_size=6 --microbatches=4 --mesh=stage:2: 6 rows cannot be cut"),
    ({"depth": 3}, "--schedule=1f1b --mesh=stage:2: 3 layers cannot fill 2 stages evenly"),
    ({"run_dir": ""}, "--run_dir= names no folder; use --run_dir=runs/NAME"),
    ({"seed": -1}, "--seed=-1 is no seed; use 0 to 4294967295"),
  ],
)
def test_errors_name_the_flags(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
  with pytest.raises(ConfigError) as caught:
    build_run(config(tmp_path, **changes), build)
  assert str(caught.value).startswith(message)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("batch", "message"),
  [
    ({"x": np.zeros((4, 3), np.float32)}, r"batch\['x'\] is \[4, 3\]; .* with B = 8"),
    ({"x": np.zeros((8, 3))}, r"batch\['x'\] is float64, and JAX computes in float32"),
  ],
)
def test_batches_that_no_run_takes(tmp_path: Path, batch: Any, message: str) -> None:
  wrong = lambda c: dataclasses.replace(build(c), batches=lambda step: batch)  # noqa: E731
  with pytest.raises(ConfigError, match=message):
    build_run(config(tmp_path), wrong)


def test_a_resumed_run_keeps_model_and_data(whole: Path) -> None:
  for changes, message in (
    ({"depth": 6}, "--depth=6: the run in .* has --depth=4; repeat that"),
    ({"learning_rate": 0.5}, "--learning_rate=0.5: the run in .*"),
  ):
    with pytest.raises(ConfigError, match=message):
      build_run(config(whole, **changes), build)
  other = lambda c: dataclasses.replace(build(c), identity={"data": "b"})  # noqa: E731
  with pytest.raises(ConfigError, match=r"data: its data is b, the run in .* has a"):
    build_run(config(whole), other)


def test_another_experiment_has_another_folder(whole: Path) -> None:
  @dataclasses.dataclass(frozen=True, kw_only=True)
  class OtherRun(LineRun):
    pass

  other = OtherRun(**vars(config(whole)))
  with pytest.raises(ConfigError, match=r"a run of another experiment \(LineRun, not OtherRun\)"):
    build_run(other, build)


@pytest.mark.parametrize("script", ["vit.py", "mlp.py"])
def test_the_commands_exit_2_with_one_line(tmp_path: Path, script: str) -> None:
  path = str(ROOT / "experiments" / script)
  command = [sys.executable, path, "--patch=3", f"--run_dir={tmp_path}/run", "--mesh=stage:1"]
  environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": ""}
  done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr.startswith(f"{script}: --") and done.stderr.count("\n") == 1
  assert "patches of 3x3 do not tile 8x8 pixels" in done.stderr
  assert not list(tmp_path.iterdir())
