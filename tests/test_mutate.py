"""The faults that `mutate.py` plants still apply to the package as it is."""

import ast

import mutate
import pytest


@pytest.mark.parametrize("fault", mutate.FAULTS, ids=lambda fault: fault.name)
def test_a_fault_changes_one_line_and_stays_python(fault):
  text = (mutate.ROOT / "jaxpipe" / fault.file).read_text()
  assert ast.dump(ast.parse(mutate.broken(text, fault))) != ast.dump(ast.parse(text))


def test_there_are_twenty_two():
  assert len({fault.name for fault in mutate.FAULTS}) == 22
