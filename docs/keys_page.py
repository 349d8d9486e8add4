"""Writes docs/keys.md from the tables of settings: `python docs/keys_page.py`."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from trxl.config import GROUPS, LAUNCH_KEYS, SHARED_KEYS, Keys, defaults  # noqa: E402
from trxl.runs.help import in_group  # noqa: E402
from trxl.search.settings import SEARCH_KEYS  # noqa: E402

import search_trXL  # noqa: E402
import train_Muesli_trXL  # noqa: E402
import train_PPO_trXL  # noqa: E402
import train_PPO_trXL_pmap  # noqa: E402
from trainer_Muesli_trXL import MUESLI  # noqa: E402
from trainer_PPO_trXL import PPO  # noqa: E402

PAGE = REPOSITORY / "docs" / "keys.md"
MARKER = "<!-- keys -->\n"
"""Line of the page behind which the tables are written."""


def markdown_table(keys: Keys, columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns a table of keys: values by column, and whether RESUME may change them.

    Args:
      columns: heading -> {key: value}.
    """
    headings = ["key", *columns, "`RESUME`", "what it is, and its unit"]
    rows = [f"| {' | '.join(headings)} |", "| --- " * len(headings) + "|"]
    for name, key in keys.items():
        values = [f"`{column[name]!r}`" for column in columns.values()]
        may_change = "may change" if key.resumable else ""
        rows.append(f"| {' | '.join([f'`{name}`', *values, may_change, key.help])} |")
    return "\n".join(rows)


def keys_page(introduction: str) -> str:
    """Returns the page: the introduction up to the marker, then a table for each group of keys."""
    columns = {
        "missing": defaults(PPO.keys),
        "`train_PPO_trXL.py`": train_PPO_trXL.config,
        "`train_PPO_trXL_pmap.py`": train_PPO_trXL_pmap.config,
    }
    parts = [introduction.partition(MARKER)[0] + MARKER]
    for group in GROUPS:
        parts.append(f"\n## {group}\n\n{markdown_table(in_group(PPO.keys, group), columns)}\n")
    own = {name: key for name, key in MUESLI.keys.items() if name not in SHARED_KEYS}
    columns = {
        "missing": defaults(MUESLI.keys),
        "`train_Muesli_trXL.py`": train_Muesli_trXL.config,
    }
    parts.append(f"\n## Muesli's own\n\n{markdown_table(own, columns)}\n")
    searched = {
        "missing": defaults(SEARCH_KEYS),
        "`search_trXL.py`": {**defaults(SEARCH_KEYS), **search_trXL.config},
    }
    parts.append(f"\n## A search's own\n\n{markdown_table(SEARCH_KEYS, searched)}\n")
    launch = markdown_table(LAUNCH_KEYS, {"missing": defaults(LAUNCH_KEYS)})
    parts.append(f"\n## One process of several\n\n{launch}\n")
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(keys_page(PAGE.read_text()))
