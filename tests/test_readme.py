"""The README: its table of keys, its Python, its links."""

import re
from ast import literal_eval
from pathlib import Path

import pytest

import train_PPO_trXL
import train_PPO_trXL_pmap
from config import DEFAULTS

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text()


def test_the_table_has_every_key_with_its_values():
    cell = r" `([^`]*)` \|"
    rows = re.findall(rf"^\|{cell}{cell}{cell}{cell} \S.* \|$", README, re.MULTILINE)
    values = {key: [literal_eval(text) for text in texts] for key, *texts in rows}
    assert values == {
        key: [default, train_PPO_trXL.config[key], train_PPO_trXL_pmap.config[key]]
        for key, default in DEFAULTS.items()
    }


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_its_python_runs(block, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    exec(compile(block, "README.md", "exec"), {})


def test_the_files_it_names_exist():
    linked = re.findall(r"\]\((?!http|#)([^)]+)\)", README)
    what_is_where = README.partition("## What is where")[2].partition("\n## ")[0]
    files = linked + re.findall(r"`(\S+(?:\.py|/))`", what_is_where)
    assert "transformerXL.py" in files
    assert "tests/" in files
    assert [name for name in files if not (REPOSITORY / name).exists()] == []


def test_the_sections_it_links_to_exist():
    headings = re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    sections = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= sections


def test_its_commands_name_files_that_exist():
    scripts = re.findall(r"python (\S+\.py)", README)
    assert scripts
    assert all((REPOSITORY / script).exists() for script in scripts)
