"""Drafts by the target's own first layers, in the target's own cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from outpace.config import EngineConfig
from outpace.engine.engine import Engine
from outpace.errors import ConfigError
from outpace.sampling import SamplingParams
from tiny import GREEDY, SAMPLED, answers, tiny_engine, write_model


def engine_of(model: Path, **settings: Any) -> Engine:
    settings = {"max_num_batched_tokens": 256, "max_model_len": 256, "spec_policy": "fixed", **settings}
    return Engine.from_config(EngineConfig(str(model), dtype="float32", kernels="reference", **settings))


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_where_the_layers_left_out_add_nothing_every_draft_is_accepted(
    sampling: SamplingParams, tmp_path: Path
) -> None:
    model = write_model(tmp_path, exit_layer=1)
    drafting = engine_of(model, spec_method="self_draft", spec_tokens=5)
    assert answers(drafting, sampling, stagger=2) == answers(engine_of(model), sampling)
    drafts = drafting.metrics.drafts
    assert drafts.num_accepted_tokens == drafts.num_draft_tokens > 100


@pytest.mark.parametrize("num_blocks", [None, 16])
def test_branching_drafts_that_are_mostly_wrong_change_no_answer(num_blocks: int | None) -> None:
    engine = tiny_engine(
        spec_method="self_draft",
        spec_tokens=6,
        speculative_config={"draft_branching": 2, "num_draft_layers": 1},
        num_blocks=num_blocks,
    )
    assert answers(engine, SAMPLED, stagger=2) == answers(tiny_engine(), SAMPLED)
    assert engine.metrics.drafts.num_draft_tokens > 100
    assert (engine.scheduler.num_preemptions > 0) == (num_blocks is not None)


def test_the_first_layers_share_their_weights_with_the_model() -> None:
    decoder = tiny_engine().runner.decoder
    part = decoder.first_layers(1)
    assert part.config.num_layers == 1
    assert decoder.config.num_layers == 2
    assert part._layers[0] is decoder._layers[0]
    assert part._embedding is decoder._embedding


def test_as_many_layers_as_the_model_has_are_refused() -> None:
    with pytest.raises(ConfigError, match="must be below the target's 2 layers, got 2"):
        tiny_engine(spec_method="self_draft", speculative_config={"num_draft_layers": 2})
