"""What the default model drafts with, and the trained draft that comes with it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from outpace.config import DEFAULT_DRAFT, DEFAULT_DRAFT_METHODS, EngineConfig
from outpace.errors import ConfigError
from outpace.models.hub import resolve_draft
from tiny import tiny_engine


@pytest.mark.parametrize(
    ("settings", "method", "model"),
    [
        ({}, "prompt_lookup", None),
        ({"spec_tokens": 3}, "prompt_lookup", None),
        ({"spec_method": "streaming"}, "streaming", DEFAULT_DRAFT),
        ({"spec_method": "redrafter"}, "redrafter", DEFAULT_DRAFT),
        ({"spec_method": "prompt_lookup, streaming"}, "prompt_lookup,streaming", DEFAULT_DRAFT),
        ({"speculative_config": {"method": "streaming"}}, "streaming", DEFAULT_DRAFT),
        ({"spec_method": "streaming", "spec_model": "mine"}, "streaming", "mine"),
        ({"spec_method": "none"}, "none", None),
        ({"spec_model": "mine", "spec_method": "medusa"}, "medusa", "mine"),
        ({"spec_method": "suffix"}, "suffix", None),
        ({"model": "a/model"}, "none", None),
    ],
)
def test_the_default_model_drafts_by_lookup_and_its_trained_drafts_need_no_name_of_their_weights(
    settings: dict[str, Any], method: str, model: str | None
) -> None:
    config = EngineConfig(**settings)
    assert (config.speculative.method, config.speculative.model) == (method, model)
    assert config.policy == ("off" if method == "none" else "goodput")


def test_another_model_still_needs_its_draft_named() -> None:
    with pytest.raises(ConfigError, match="streaming needs a model: name one with --spec-model"):
        EngineConfig("a/model", spec_method="streaming")


@pytest.mark.parametrize("method", DEFAULT_DRAFT_METHODS)
def test_a_default_draft_is_refused_for_another_model_in_words(method: str) -> None:
    with pytest.raises(ConfigError, match="was trained for SmolLM2-135M-Instruct with hidden_size 576, this"):
        tiny_engine(spec_method=method, spec_model="default")


def test_a_method_without_a_default_draft_says_which_have_one() -> None:
    with pytest.raises(
        ConfigError, match=r"no draft of medusa comes with .*, there are: redrafter, streaming"
    ):
        resolve_draft(DEFAULT_DRAFT, "medusa")


@pytest.mark.parametrize("method", DEFAULT_DRAFT_METHODS)
def test_a_default_draft_is_small_and_says_where_it_comes_from(method: str) -> None:
    directory = resolve_draft(DEFAULT_DRAFT, method)
    weights = load_file(directory / "model.safetensors")
    token_ids = weights.pop("d2t")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    config = json.loads((directory / "config.json").read_text())
    assert config["draft_vocab_size"] == len(token_ids)
    assert config["speculators_config"]["verifier"]["name_or_path"] == "SmolLM2-135M-Instruct"
    assert sum(file.stat().st_size for file in directory.iterdir()) < 6e6
    report = json.loads((directory / "training.json").read_text())
    assert report["model_sha256"]
    assert '"/' not in json.dumps(report), "a path of the machine it was trained on"
    card = (directory / "README.md").read_text()
    assert report["command"] in card
    accuracies = [value for name, value in report["metrics"].items() if name.startswith("accuracy_")]
    assert len(accuracies) > 2
    for value in accuracies:
        assert f"{100 * value:.1f} %" in card
