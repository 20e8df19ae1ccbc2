"""Parts chosen by name: found by their file, refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from outpace.config import EngineConfig, SpeculativeConfig
from outpace.errors import ConfigError
from outpace.policy import base as policies
from outpace.policy.base import BatchView, PolicyContext, SpeculationPolicy, load_policy
from outpace.spec import proposer as proposers
from outpace.spec.proposer import DraftContext, Proposer, load_proposer


class Mine(SpeculationPolicy):
    """A policy from outside."""

    def limits(self, view: BatchView) -> list[int]:
        return []


def create(context: PolicyContext) -> Mine:
    return Mine()


def test_the_defaults_are_among_what_is_available() -> None:
    assert EngineConfig().policy in policies.available()
    assert EngineConfig(spec_method="ngram").policy in policies.available()
    assert SpeculativeConfig().method in proposers.available()


def test_modules_that_make_no_part_are_not_offered() -> None:
    assert "base" not in policies.available()


def test_a_built_in_part_is_found_by_its_file_name() -> None:
    assert isinstance(load_policy("off", PolicyContext()), SpeculationPolicy)
    assert isinstance(load_method("none"), Proposer)


def test_a_dotted_path_names_a_part_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine.py").write_text(f"from {__name__} import create")
    monkeypatch.syspath_prepend(tmp_path)
    assert isinstance(load_policy("elsewhere.mine", PolicyContext()), Mine)


def load_method(name: str) -> Proposer:
    nothing: Any = None
    return load_proposer(DraftContext(EngineConfig(spec_method=name), nothing, nothing, nothing, nothing))


def load_policy_named(name: str) -> SpeculationPolicy:
    return load_policy(name, PolicyContext())


@pytest.mark.parametrize("load", [load_policy_named, load_method])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fast", "must be one of .* or the dotted path of a module, got 'fast'"),
        ("", "must be one of .*, got ''"),
        ("no.such.module", "no.such.module cannot be imported: ModuleNotFoundError: No module named 'no'"),
        (".relative", "cannot be imported: TypeError"),
        ("broken.here", "broken.here cannot be imported: ZeroDivisionError: division by zero"),
        ("os.path", r"os\.path has no function create\(\)"),
        ("wrong.here", r"wrong\.here: create\(\) made a dict, not a (SpeculationPolicy|Proposer)"),
    ],
)
def test_what_cannot_be_built_is_one_line(
    load: Any, name: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for folder, code in {"broken": "1 / 0", "wrong": "def create(config): return {}"}.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "here.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=message) as refusal:
        load(name)
    assert "\n" not in str(refusal.value)
