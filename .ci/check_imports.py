"""Checks that `trxl` imports no module of the root, and that imports have no cycles.

Imports within functions count. Exits with a line for each violation.
"""

import ast
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def module_of(path: Path) -> str:
    """Returns the dotted name of a file of the repository."""
    name = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
    return name.removesuffix(".__init__")


def imports_of(path: Path, modules: set[str]) -> set[str]:
    """Returns the repository's modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & modules or {str(node.module)}
    return found & modules


def circle_through(start: str, graph: dict[str, set[str]]) -> list[str]:
    """Returns the modules of a shortest cycle through `start`, empty if there is none."""
    paths = [[start]]
    seen: set[str] = set()
    for path in paths:  # grows in the loop
        for module in sorted(graph[path[-1]]):
            if module == start:
                return [*path, start]
            if module not in seen:
                seen.add(module)
                paths.append([*path, module])
    return []


def broken_rules(graph: dict[str, set[str]]) -> list[str]:
    """Returns a line for each import of the root by `trxl`, and for each cycle."""
    up = [
        f"{module} imports {other}, a module of the root"
        for module, others in graph.items()
        for other in sorted(others)
        if module.split(".")[0] == "trxl" != other.split(".")[0]
    ]
    circles = [circle for module in graph if (circle := circle_through(module, graph))]
    return up + [f"a circle: {' -> '.join(c)}" for c in circles if c[0] == min(c)]


def main() -> None:
    """Checks the root and `trxl`."""
    files = {module_of(x): x for x in (*REPOSITORY.glob("*.py"), *REPOSITORY.glob("trxl/**/*.py"))}
    graph = {module: imports_of(path, set(files)) for module, path in files.items()}
    lines = broken_rules(graph)
    print("\n".join(lines) or f"{len(graph)} modules, imports run one way")
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()
