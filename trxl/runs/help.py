"""Text of `--help`: every key with its value and its line of help."""

from collections.abc import Mapping
from typing import Any

from trxl.config import GROUPS, Keys


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
