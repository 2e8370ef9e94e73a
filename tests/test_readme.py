"""The first examples of the README and of the guide run word for word."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize(
  "page", [pytest.param("README.md", marks=pytest.mark.smoke), "docs/guide.md"]
)
def test_the_first_example_runs(capsys, page):
  example = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)[0]
  assert len(example.splitlines()) < 35
  exec(compile(example, page, "exec"), {})
  assert "ok: worst" in capsys.readouterr().out
