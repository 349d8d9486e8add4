"""Checks the English of docstrings, comments and pages: `python .ci/check_style.py`.

Docstrings must not start with a word of `NOT_FIRST`. Sentences of docstrings, comments and pages
have at most `MOST_WORDS` words.
"""

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]

NOT_FIRST = re.compile(
    r"(what|which|who|whose|whether|how|where|when|why|that|of|as|so|for|from|in|on|at|by|with"
    r"|without|beside|behind|before|after|below|within|it|its|those|them|both|one|many|several"
    r"|every|all|nothing|not)\b",
    re.IGNORECASE,
)
"""Words that begin a phrase without a noun or verb."""

MOST_WORDS = 30
"""Largest number of words in a sentence."""


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yields line and text of every docstring, those of constants included."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Expr(ast.Constant(str(text))):
                yield node.lineno, inspect.cleandoc(text)


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Yields the first line and the text of every block of comment lines."""
    for block in re.finditer(r"^ *# .*(\n *# .*)*", source, re.MULTILINE):
        yield source[: block.start()].count("\n") + 1, re.sub(r"^ *# ", "", block[0], flags=re.M)


def sentences(text: str) -> Iterator[str]:
    """Yields the sentences of Markdown or of a docstring, without code and tables."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*(?:[-*|#>]|\d+\.))", text):
        if not paragraph.lstrip().startswith(("|", "#", "<")):
            yield from re.split(r"(?<=[.:?!;])\s+", " ".join(paragraph.split()))


def too_long(text: str) -> list[str]:
    """Returns the sentences with too many words."""
    return [s for s in sentences(text) if len(s.split()) > MOST_WORDS]


def complaints() -> Iterator[str]:
    """Yields a line for each violation."""
    listed = subprocess.run(
        ["git", "ls-files", "*.py", "*.md"], cwd=REPOSITORY, capture_output=True, text=True
    )
    for name in listed.stdout.split():
        path = REPOSITORY / name
        source = path.read_text()
        texts = [(0, source)]
        if path.suffix == ".py":
            texts = [*docstrings(source), *comments(source)]
            for line, text in docstrings(source):
                if NOT_FIRST.match(text):
                    yield f"{name}:{line}: a docstring starts with {text.split()[0]!r}"
        for line, sentence in ((line, s) for line, text in texts for s in too_long(text)):
            start = " ".join(sentence.split()[:8])
            yield f"{name}:{line}: a sentence has {len(sentence.split())} words: {start} ..."


if __name__ == "__main__":
    lines = list(complaints())
    print("\n".join(lines))
    sys.exit(bool(lines))
