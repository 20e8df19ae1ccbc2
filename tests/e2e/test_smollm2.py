"""SmolLM2-135M-Instruct end to end: the first promise, and agreement with transformers."""

from __future__ import annotations

from pathlib import Path

import lossless
import pytest
import torch
from lossless import Loaded

from outpace.bench.workload import PROMPTS
from outpace.config import DEFAULT_DRAFT_METHODS
from outpace.models.convert import convert
from outpace.sampling import SamplingParams


def test_answers_do_not_depend_on_batch_cache_preemption_chunks_or_drafts(loaded: Loaded) -> None:
    prompts = [lossless.chat_ids(loaded.engine, text) for text in PROMPTS]
    cases = lossless.mixed([*prompts[:6], *prompts[:4]], [0.0, 0.8], max_tokens=40)
    methods = ["prompt_lookup", "streaming", "prompt_lookup,redrafter", "suffix,draft_model"]
    result = lossless.compare(loaded, cases, ["batch", "drafts"], methods)
    assert result["different"] == 0
    assert result["preemptions"] > 0
    assert result["prefix_hits"] > 0
    assert result["accepted_drafts"] > 0
    assert result["tokens"] > 1000


@pytest.mark.parametrize("method", DEFAULT_DRAFT_METHODS)
def test_drafts_that_come_with_the_model_are_right_at_times_and_change_nothing(
    method: str, loaded: Loaded
) -> None:
    prompts = [lossless.chat_ids(loaded.engine, text) for text in PROMPTS[:4]]
    cases = lossless.mixed(prompts, [0.0, 0.8], max_tokens=32)
    expected = lossless.one_by_one(loaded.build(), cases)
    engine = loaded.build(spec_method=method, spec_policy="fixed", spec_tokens=4)
    assert lossless.run(engine, cases, lambda i: i) == expected
    assert engine.metrics.drafts.num_accepted_tokens > 0


def test_one_seed_gives_one_answer_and_another_seed_another(loaded: Loaded) -> None:
    prompt = lossless.chat_ids(loaded.engine, "Write a sentence about rain.")
    cases = [(prompt, SamplingParams(temperature=1.0, seed=seed, max_tokens=24)) for seed in (1, 1, 2, 3)]
    first, again, second, third = lossless.run(loaded.build(), cases, lambda i: 0)
    assert first == again
    assert len({first, second, third}) == 3


def test_logits_agree_with_transformers(tmp_path: Path) -> None:
    """float32 on both sides; the tolerance is 1e-3 on logits of about 20."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = tmp_path / "smollm2"
    convert(None, directory)
    ours = Loaded.default(model=str(directory), dtype="float32", max_model_len=1024)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = "The quick brown fox jumps over the lazy dog. In 1969, three men — Armstrong, Aldrin, Collins"
    ids = tokenizer(text)["input_ids"]
    assert ids == ours.engine.tokenizer(text)["input_ids"]

    engine = ours.build()
    (request,) = engine.admission.requests("r", ids, SamplingParams(temperature=0, max_tokens=32, logprobs=5))
    engine.add([request])
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    tokens = [token for output in outputs for token in output.token_ids]
    with torch.inference_mode():
        logits = theirs(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1]
    assert tokens == logits.argmax(-1).tolist()
    expected = logits.log_softmax(-1)
    for position, logprob in enumerate(entry for output in outputs for entry in output.logprobs or ()):
        for token_id, value in [(logprob.token_id, logprob.logprob), *logprob.top]:
            assert abs(expected[position, token_id].item() - value) < 1e-3
