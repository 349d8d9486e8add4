"""Writes docs/keys.md from the tables of settings: `python docs/keys_page.py`."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from trxl.config import GROUPS, LAUNCH_KEYS, SHARED_KEYS, Keys, in_group  # noqa: E402
from trxl.search.settings import SEARCH_KEYS  # noqa: E402

import search_trXL  # noqa: E402
import train_PPO_trXL_pmap  # noqa: E402
from trainer_Muesli_trXL import MUESLI  # noqa: E402
from trainer_PPO_trXL import PPO  # noqa: E402

PAGE = REPOSITORY / "docs" / "keys.md"
MARKER = "<!-- keys -->\n"
"""Line of the page after which the tables are written."""


def markdown_table(keys: Keys, scripts: Mapping[str, Mapping[str, Any]] = {}) -> str:
    """Returns a table of keys: default, what scripts set, and whether RESUME may change it.

    Args:
      scripts: column heading -> what that script's config sets.
    """
    headings = ["key", "default", *scripts, "`RESUME`", "what it is, and its unit"]
    rows = [f"| {' | '.join(headings)} |", "| --- " * len(headings) + "|"]
    for name, key in keys.items():
        values = [f"`{key.default!r}`"]
        for config in scripts.values():
            given = config.get(name, key.default)
            values.append("" if given == key.default else f"`{given!r}`")
        may_change = "may change" if key.resumable else ""
        text = key.help.replace("|", "\\|")
        rows.append(f"| {' | '.join([f'`{name}`', *values, may_change, text])} |")
    return "\n".join(rows)


def keys_page(introduction: str) -> str:
    """Returns the page: the introduction up to the marker, then a table for each group of keys."""
    parts = [introduction.partition(MARKER)[0] + MARKER]
    scripts = {"`train_PPO_trXL_pmap.py`": train_PPO_trXL_pmap.config}
    for group in GROUPS:
        table = markdown_table(in_group(PPO.keys, group), scripts)
        parts.append(f"\n## {group}\n\n{table}\n")
    shared = {name: (key.default, key.help) for name, key in SHARED_KEYS.items()}
    own = {
        name: key
        for name, key in MUESLI.keys.items()
        if shared.get(name) != (key.default, key.help)
    }
    parts.append(f"\n## Muesli's own\n\n{markdown_table(own)}\n")
    searched = markdown_table(SEARCH_KEYS, {"`search_trXL.py`": search_trXL.config})
    parts.append(f"\n## A search's own\n\n{searched}\n")
    parts.append(f"\n## One process of several\n\n{markdown_table(LAUNCH_KEYS)}\n")
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(keys_page(PAGE.read_text()))
