"""Text for the demo's corpus from the Python that runs: its language reference and its library's docstrings.

    pydoc_data.topics, docstrings of the standard library, parsed --> [(name, text of 200 to 3,000 characters)]

The same Python version gives the same documents in the same order, about 2,000 of them. Cost: 3 s.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

SHORTEST, LONGEST = 200, 3000
_SKIPPED = {"antigravity", "encodings", "ensurepip", "idlelib", "lib2to3", "test", "this", "turtledemo"}


def documents() -> list[tuple[str, str]]:
    """Name and text of every document, in a fixed order."""
    found = [(f"reference: {name}", text) for name, text in sorted(topics.items())]
    for module in sorted(sys.stdlib_module_names - _SKIPPED):
        if not module.startswith("_"):
            found += _docstrings(module)
    return [part for name, text in found for part in _parts(name, text)]


def _docstrings(module: str) -> Iterator[tuple[str, str]]:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return
    path = Path(spec.origin)
    for file in sorted(path.parent.glob("*.py")) if path.name == "__init__.py" else [path]:
        name = module if file.stem in ("__init__", module) else f"{module}.{file.stem}"
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                own = "" if isinstance(node, ast.Module) else f".{node.name}, line {node.lineno}"
                if text:
                    yield name + own, f"{name}{own.partition(',')[0]}\n\n{text}"


def _parts(name: str, text: str) -> Iterator[tuple[str, str]]:
    """Cut a long text between paragraphs; what is short, or one endless paragraph, is left out."""
    part, number = "", 0
    for paragraph in [*text.strip().split("\n\n"), None]:
        if paragraph is None or (part and len(part) + len(paragraph) > LONGEST):
            if SHORTEST <= len(part) <= LONGEST:
                yield f"{name}, {number}", part
            part, number = "", number + 1
        if paragraph is not None:
            part += f"{paragraph}\n\n" if len(paragraph) <= LONGEST else ""
