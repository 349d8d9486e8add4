"""The table of keys in words: for `--help`, and as the page docs/keys.md.

`python -m host.help` writes that page anew.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keys import GROUPS, LAUNCH_KEYS, SHARED_KEYS, Keys, defaults

PAGE = Path(__file__).resolve().parents[1] / "docs" / "keys.md"
MARKER = "<!-- keys -->\n"
"""Behind it stands what this file writes."""


def help_text(keys: Keys, values: Mapping[str, Any]) -> str:
    """Every key with a value and what it is, a line each, group by group."""
    parts = [f"{group}\n{key_lines(in_group(keys, group), values)}" for group in GROUPS]
    return "\n\n".join(parts)


def key_lines(keys: Keys, values: Mapping[str, Any]) -> str:
    """Every key with a value and what it is, a line each."""
    return "\n".join(
        f"  {f'{name}={values[name]!r}':<36}  {key.help.replace('`', '')}"
        for name, key in keys.items()
    )


def in_group(keys: Keys, group: str) -> Keys:
    """The keys of one group."""
    return {name: key for name, key in keys.items() if key.group == group}


def markdown_table(keys: Keys, columns: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of keys: a column of values for each of `columns`, and whether RESUME may change it.

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
    """docs/keys.md: what stands before the marker, and a table for each group of keys."""
    import search_trXL
    import train_Muesli_trXL
    import train_PPO_trXL
    import train_PPO_trXL_pmap
    from search.settings import SEARCH_KEYS
    from trainer_Muesli_trXL import MUESLI
    from trainer_PPO_trXL import PPO

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
