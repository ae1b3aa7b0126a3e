"""The package itself: its table is complete and it depends on torch alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from perl_vlm import formulas

SOURCES = sorted(Path(formulas.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("name", formulas.__all__)
def test_every_formula_is_in_the_table_and_says_what_it_raises(name: str) -> None:
    assert formulas.__doc__ is not None
    rows = [line for line in formulas.__doc__.splitlines() if f"``{name}``" in line]
    assert len(rows) == 1
    assert "Raises" in (getattr(formulas, name).__doc__ or "")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_else_of_ours_is_imported(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    foreign = {name for name in imported if name.split(".")[0] not in {"__future__", "math", "torch"}}
    assert all(name.startswith("perl_vlm.formulas.") for name in foreign), foreign
