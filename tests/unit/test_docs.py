"""What the documentation says is so: its tables, names, links, code and examples.

The tables of docs/server.md come from the code. To write them anew:

    PYTHONPATH=tests python tests/unit/test_docs.py
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import re
import runpy
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_llm import FakeLLM, running_server
from prometheus_client import Metric

import outpace
from outpace import LLM, cli, config, settings
from outpace.config import EngineConfig, ServerConfig, SpeculativeConfig
from outpace.engine.metrics import Metrics
from outpace.models.hf_config import ARCHITECTURES
from outpace.server import protocol
from tiny import tiny_engine

ROOT = Path(__file__).parents[2]
SERVER = ROOT / "docs" / "server.md"
BENCHMARKING = ROOT / "docs" / "benchmarking.md"
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*GUIDES, *sorted((ROOT / "docs" / "adr").glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
REWRITE = "PYTHONPATH=tests python tests/unit/test_docs.py"


# --- Tables from the code -------------------------------------------------------------------------------


def settings_table(kind: type[Any], called: str = "flag") -> str:
    """A row per setting of a config: flag or key, values, default, meaning."""
    rows = [f"| {called} | values | default | meaning |", "| --- | --- | --- | --- |"]
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name = config.flag(field.name) if called == "flag" else field.name
        if hints[field.name] is bool:
            name = f"{name}`, `--no-{name.removeprefix('--')}"
        default = "" if field.default is None else f"`{settings._show(field.default)}`"
        rows.append(f"| `{name}` | {_values(hints[field.name])} | {default} | {field.metadata['help']} |")
    return "\n".join(rows)


def _values(hint: Any) -> str:
    if typing.get_origin(hint) is tuple:
        return "list of lists"
    names = {int: "integer", float: "number", str: "text", bool: "switch", dict[str, Any]: "JSON object"}
    names |= {list[float]: "list of numbers", list[int]: "integers"}
    if hint not in names and typing.get_args(hint):
        return ", ".join(_values(arg) for arg in typing.get_args(hint) if arg is not type(None))
    return names.get(hint) or f"`{hint}`"


def families() -> list[Metric]:
    """Every metric family of a server."""
    idle: Any = SimpleNamespace(
        num_running=0,
        num_waiting=0,
        kv_cache_usage=0.0,
        num_preemptions=0,
        num_prefix_queries=0,
        num_prefix_hits=0,
    )
    return list(Metrics("model", idle).collect())


def metrics_table() -> str:
    """A row per metric, as it is exposed."""
    rows = ["| metric | type | meaning |", "| --- | --- | --- |"]
    for family in families():
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = {label for sample in family.samples for label in sample.labels} - {"model_name", "le"}
        by = f", by {' and '.join(f'`{label}`' for label in sorted(labels))}" if labels else ""
        rows.append(f"| `{name}` | {family.type} | {family.documentation}{by} |")
    return "\n".join(rows)


def with_tables(text: str) -> str:
    """A page with its generated parts written anew."""
    tables = {
        "engine settings": settings_table(EngineConfig),
        "server settings": settings_table(ServerConfig),
        "speculative settings": settings_table(SpeculativeConfig, "key"),
        "metrics": metrics_table(),
    }
    for name, table in tables.items():
        begin, end = f"<!-- {name}: {REWRITE} -->", f"<!-- end of {name} -->"
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        assert found, f"the page must hold {begin} and {end}"
        text = f"{before}{begin}\n{table}\n{end}{after}"
    return text


def test_the_tables_of_settings_and_metrics_are_those_of_the_code() -> None:
    text = SERVER.read_text(encoding="utf-8")
    assert text == with_tables(text), f"docs/server.md is out of date; run: {REWRITE}"


# --- Names in the text ----------------------------------------------------------------------------------


def quoted(page: Path) -> set[str]:
    """What stands in backticks on a page, outside its blocks of code."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return set(re.findall(r"`([^`\n]+)`", text))


@pytest.mark.parametrize("request_type", [protocol.ChatCompletionRequest, protocol.CompletionRequest])
def test_every_request_field_is_documented(request_type: Any) -> None:
    assert request_type.model_fields.keys() <= quoted(SERVER)


def test_every_architecture_is_named_in_the_readme() -> None:
    names = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(name.removesuffix("ForCausalLM") in names for name in ARCHITECTURES.values())


@pytest.mark.parametrize("page", [ROOT / "README.md", SERVER, BENCHMARKING], ids=lambda page: page.name)
def test_every_flag_that_is_mentioned_exists(page: Path) -> None:
    of_others = re.compile(r"^vllm (?:.*\\\n)*.*$", re.MULTILINE)  # another program's command
    text = of_others.sub("", page.read_text(encoding="utf-8"))
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    assert mentioned <= flags(cli._parser()), "a flag that the command line does not know"


def flags(parser: argparse.ArgumentParser) -> set[str]:
    """Every flag of a parser and its subcommands."""
    known = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            known = known.union(*map(flags, action.choices.values()))
    return known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_link_and_test_that_is_mentioned_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = {link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link}
    missing = {link for link in links if link and not (page.parent / link).exists()}
    paths = {name for name in quoted(page) if re.match(r"(src|tests|docs|examples|benchmarks)/", name)}
    missing |= {path for path in paths if not list(ROOT.glob(path.partition("::")[0]))}
    missing |= set(re.findall(r"\btest_\w+", text)) - names_of_tests()
    assert not missing


def names_of_tests() -> set[str]:
    """The names of all tests and of their files."""
    files = list((ROOT / "tests").rglob("test_*.py"))
    functions = (re.findall(r"def (test_\w+)", file.read_text(encoding="utf-8")) for file in files)
    return {file.stem for file in files}.union(*functions)


# --- Code in the text, and examples ---------------------------------------------------------------------


def blocks(language: str) -> list[Any]:
    """Every block of code in a language, named by its page."""
    block = re.compile(rf"^```{language}\n(.*?)^```", re.DOTALL | re.MULTILINE)
    return [
        pytest.param(code, id=f"{page.name}-{number}")
        for page in GUIDES
        for number, code in enumerate(block.findall(page.read_text(encoding="utf-8")))
    ]


@pytest.mark.parametrize("code", blocks("python"))
def test_python_in_the_docs_parses_and_imports_what_is_there(code: str) -> None:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module == "outpace":
            assert {alias.name for alias in node.names} <= set(outpace.__all__)


@pytest.mark.parametrize("code", blocks("yaml"))
def test_yaml_in_the_docs_is_a_valid_configuration(code: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(code, encoding="utf-8")
    settings.load(EngineConfig, {"config": str(file)}, {})
    settings.load(ServerConfig, {"config": str(file)}, {})


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_examples_run(
    example: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(outpace, "LLM", lambda: LLM.from_engine(tiny_engine()))
    with running_server(FakeLLM()) as url:
        monkeypatch.setenv("OPENAI_BASE_URL", f"{url}/v1")
        runpy.run_path(str(example), run_name="__main__")
    output = capsys.readouterr().out
    assert output.strip()
    assert "NOT" not in output


if __name__ == "__main__":
    SERVER.write_text(with_tables(SERVER.read_text(encoding="utf-8")), encoding="utf-8")
