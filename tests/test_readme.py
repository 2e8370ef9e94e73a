"""The README's example runs word for word, and its files exist."""

import pathlib
import re

import pytest

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()


@pytest.mark.smoke
def test_the_example_runs(capsys):
  (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
  assert len(example.splitlines()) < 35
  exec(compile(example, "README.md", "exec"), {})
  assert "ok: worst" in capsys.readouterr().out


def test_every_file_it_names_exists():
  root = pathlib.Path(__file__).parents[1]
  named = re.findall(r"(?:\]\(|`|\./)((?:docs|jaxpipe|experiments|launch|data)/[\w./-]*)", README)
  assert len(named) > 8
  for name in named:
    assert (root / name).exists(), name
