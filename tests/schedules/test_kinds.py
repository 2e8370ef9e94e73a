"""The table of kinds: what is derived from it, and that nothing else says what a kind is."""

import ast
import pathlib
import pickle
import shutil
import subprocess
import sys

import pytest

from jaxpipe.pipeline.compiled.action_paths import SCOPES
from jaxpipe.pipeline.table.program import CODE, IDLE
from jaxpipe.schedules.kinds import CHUNKS_HELD, PRODUCTS, REQUIRED, STAGE_KINDS, Kind

ROOT = pathlib.Path(__file__).parents[2]


def test_derived_tables():
  assert "".join(Kind) == "FRIWBSTGXYU"
  assert {k: "".join(made) for k, made in PRODUCTS.items()} == {**{k: k for k in Kind}, "B": "IW"}
  assert set("FRIWB") == STAGE_KINDS
  assert list("FIW") == [*REQUIRED]
  assert CHUNKS_HELD == {"F": 1, "W": -1, "B": -1}


def test_codes_and_scopes_of_the_executor():
  """Tables in files and reports have these numbers, in this order."""
  assert list(CODE.items()) == [*zip("FRBIWSTG", range(1, 9), strict=True)]
  assert IDLE == 0
  assert SCOPES == ("F", "B", "I", "W", "R", "S", "T", "G", "first_stage", "last_stage")


def test_rows_agree_with_themselves():
  codes = [kind.info.code for kind in Kind if kind.info.code is not None]
  assert sorted(codes) == list(range(1, 1 + len(codes)))
  assert len({kind.info.colour for kind in Kind}) == len(Kind)
  for kind in Kind:
    assert kind.name == kind.value and len(kind) == 1
    # A pass through a stage takes the stage's time, and nothing else does.
    assert kind.info.on_stage == bool(kind.info.times)
    assert kind.info.necessary <= kind.info.on_stage
    # What is made of others has no product of its own that anybody could wait for.
    assert not (kind.info.awaited and kind.info.products)


def test_a_kind_is_its_letter():
  assert (str(Kind.F), f"{Kind.F}", repr(Kind.F)) == ("F", "F", "<Kind.F: 'F'>")
  assert Kind("F") is Kind["F"] is Kind.F
  assert {Kind.F: 1}["F"] == 1
  assert pickle.loads(pickle.dumps(Kind.F)) is Kind.F
  with pytest.raises(ValueError, match="'Z' is not a valid Kind"):
    Kind("Z")


ROW = """
  Z = (
    "Z",
    KindInfo(
      meaning="a kind that nobody needs",
      legend="nothing",
      colour=(0, 0, 0),
      on_stage=True,
      awaited=True,
      times="FW",
      chunks_held=2,
      pending_weight_grads=3,
      code=9,
    ),
  )

  _value_: str
"""
CHECKS = """
from jaxpipe.pipeline.compiled.action_paths import SCOPES
from jaxpipe.pipeline.table.program import CODE
from jaxpipe.schedules import Action, Kind, Placement, Schedule, peaks
from jaxpipe.schedules.partition.critical import CriticalPaths

action = Action.parse("0Z0")
schedule = Schedule("mine", Placement.loop(1), 1, ((action,),))
assert CriticalPaths(schedule).makespan([(1, 10, 100)]) == 101
held = peaks(schedule)
assert (held.activations, held.pending_weight_grads) == ((2,), (3,))
assert CODE[Kind.Z] == 9 and "Z" in SCOPES
"""


def test_a_new_kind_is_one_row(tmp_path):
  """Every table of a copy of the package knows a kind of which only the row was added."""
  shutil.copytree(
    ROOT / "jaxpipe", tmp_path / "jaxpipe", ignore=shutil.ignore_patterns("__pycache__")
  )
  table = tmp_path / "jaxpipe/schedules/kinds.py"
  before = table.read_text()
  after = before.replace("\n  _value_: str\n", ROW)
  assert after != before
  table.write_text(after)
  subprocess.run([sys.executable, "-c", CHECKS], cwd=tmp_path, check=True, timeout=120)


def constant_tables(source):
  """Yields the lines of dicts that say something constant about kinds by name."""
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Dict):
      pairs = zip(node.keys, node.values, strict=True)
      facts = [value for key, value in pairs if _is_kind(key)]
      # A dict of results, computed from what is given, says nothing about kinds as such.
      if facts and not any(map(_is_computed, facts)):
        yield node.lineno


def _is_kind(node):
  return isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("Kind")


def _is_computed(value):
  if _is_kind(value):
    return False
  parts = map(_is_computed, ast.iter_child_nodes(value))
  return isinstance(value, ast.Name | ast.Call) or any(parts)


def test_no_other_table_says_what_a_kind_is():
  for path in sorted((ROOT / "jaxpipe").rglob("*.py")):
    assert list(constant_tables(path.read_text())) == [], path


@pytest.mark.parametrize(
  "source, found",
  [
    ("{Kind.F: (0,), Kind.B: (1, 2)}", 1),
    ("{Kind.F: Kind.I}", 1),
    ("{actions.Kind.F: -1}", 1),
    ("{**a, Kind.F: 'forward'}", 1),
    ("{Kind.F: forward, Kind.I: [0] * M}", 0),
    ("{Kind.F: peak(0)}", 0),
    ("{kind: 0 for kind in Kind}", 0),
  ],
)
def test_a_planted_table_is_caught(source, found):
  assert len(list(constant_tables(source))) == found
