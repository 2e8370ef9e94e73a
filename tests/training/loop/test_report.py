"""What stands on the screen."""

from collections.abc import Callable

import jax
import pytest

from jaxpipe.models.transformer.config import flops_per_token
from jaxpipe.training.lm.config import Config
from jaxpipe.training.lm.run import build_run
from jaxpipe.training.loop import report
from jaxpipe.training.loop.metrics import Record
from jaxpipe.training.plan.state import create_state


def test_the_plan_names_mesh_timetable_bubbles_and_memory(tiny: Callable[..., Config]) -> None:
  text = report.describe(build_run(tiny()))
  for part in (
    "mesh: stage 4 = 4 devices (cpu)",
    "device 0 | F0 F1 F2 F3",
    "bubble 42.9 %  span 21  span bubble 42.9 %",
    "expected memory of each device",
    "optimizer",
  ):
    assert part in text


def test_counts_and_bytes_are_those_of_the_state(tiny: Callable[..., Config]) -> None:
  setup = build_run(tiny())
  state = create_state(
    setup.stack, setup.optimizer, 0, setup.batch_shapes, setup.schedule, setup.mesh
  )
  device = setup.mesh.devices.flat[0]

  def here(tree: object, of: str) -> int:
    shards = [s for leaf in jax.tree.leaves(tree) for s in leaf.addressable_shards]
    return sum(getattr(s.data, of) for s in shards if s.device == device)

  total = sum(leaf.size for leaf in jax.tree.leaves(state.params))
  assert report.count_parameters(setup) == (total, here(state.params, "size"))
  memory = setup.memory.bytes
  assert memory["parameters"] == here(state.params, "nbytes")
  assert memory["optimizer"] == here(state.opt_state, "nbytes")


def test_utilisation_only_where_the_peak_is_known(
  tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
  setup = build_run(tiny())
  record = Record(
    step=3, loss=2.0, grad_norm=1.0, learning_rate=1e-3, tokens_per_second=1e3, step_seconds=0.1
  )
  line = "step    3  loss 2.0000  grad norm 1.000  lr 1.00e-03  1,000 tokens/s  100.0 ms"
  assert report.StepLine(setup)(record) == line
  monkeypatch.setattr(report, "peak_flops", lambda kind: 1e9 if kind == "cpu" else None)
  flops = flops_per_token(setup.model, 16)
  assert report.StepLine(setup)(record) == f"{line}  MFU {1e3 * flops / 4e9:.1%}"


def test_no_bar_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
  with report.Screen(0, 2) as screen:
    screen.line("step [0] done")
    screen.advance(1)
  assert capsys.readouterr().out == "step [0] done\n"
