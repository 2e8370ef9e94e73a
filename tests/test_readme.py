"""The first examples run word for word, and the README's files exist."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.smoke
@pytest.mark.parametrize("page", ["README.md", "docs/guide.md"])
def test_the_first_example_runs(capsys, page):
  example = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)[0]
  assert len(example.splitlines()) < 35
  exec(compile(example, page, "exec"), {})
  assert "ok: worst" in capsys.readouterr().out


def test_every_file_it_names_exists():
  named = re.findall(r"(?:\]\(|`|\./)((?:docs|jaxpipe|experiments|launch|data)/[\w./-]*)", README)
  assert len(named) > 8
  for name in named:
    assert (ROOT / name).exists(), name
