"""Imports go one way, the policies never need torch, and what `outpace` exports is there."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "outpace"
# A module may import from its own layer and from those above it in this list.
LAYERS = (
    {"errors", "config", "registry"},
    {"device"},
    {"kernels"},
    {"sampling", "request", "tree", "batch"},
    {"models"},
    {"runtime"},
    {"spec"},
    {"engine"},
    {"llm", "async_llm"},
    {"server", "bench", "training", "settings", "terminal", "planning", "cli", "__main__"},
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
RANK["policy"] = RANK["spec"]
FILES = sorted(SOURCE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Top-level parts of outpace that a file imports anywhere in it, for type checking or not."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "outpace":
            parts = node.module.split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("outpace.")}
    return names & RANK.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_one_way(path: Path) -> None:
    part = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if part == "__init__":
        return  # the package itself re-exports from everywhere
    if part == "policy":
        assert imported(path) <= {"policy", "config", "errors", "registry"}
        return
    above = {name for name in imported(path) if RANK[name] > RANK[part]}
    assert not above, f"{part} must not import {above}"


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_policies_need_no_torch() -> None:
    modules = [f"outpace.policy.{f.stem}" for f in (SOURCE / "policy").glob("*.py") if f.stem != "__init__"]
    assert "torch" not in loaded_by(f"import {', '.join(modules)}")


def test_the_engine_needs_no_web_framework() -> None:
    assert not {"fastapi", "uvicorn", "starlette"} & loaded_by("import outpace.llm, outpace.async_llm")


def test_importing_the_package_and_its_command_line_is_light() -> None:
    heavy = {"torch", "transformers", "fastapi", "pydantic", "rich", "yaml", "httpx"}
    assert not heavy & loaded_by("import outpace, outpace.cli")


def test_every_exported_name_exists() -> None:
    import outpace

    assert outpace.__all__ == sorted(outpace.__all__)
    for name in outpace.__all__:
        assert getattr(outpace, name) is not None
