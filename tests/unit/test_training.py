"""Runs: interrupted ones, reports, refusals; a draft model; distillation and evaluation."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from outpace.cli import main
from outpace.errors import ConfigError
from outpace.llm import LLM
from outpace.request import Sequence
from outpace.sampling import SamplingParams
from outpace.training import distill as distill_module
from outpace.training import losses, trainer
from outpace.training import method as methods
from outpace.training.data import (
    load_corpus,
)
from outpace.training.distill import DistillConfig, distill
from outpace.training.evaluate import EvaluateConfig, engine_configs
from outpace.training.trainer import train
from outpace.training.trunk import Trunk
from tiny import EOS, GREEDY, answers, byte_tokenizer, tiny_engine, write_model
from training_runs import engine_of, losses_of, row, tiny_run, write_rows


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of `tiny_engine`."""
    return write_model(tmp_path_factory.mktemp("target"))


# --- Runs -----------------------------------------------------------------------------------------------


@pytest.fixture
def texts(tmp_path: Path) -> str:
    sentence = "the quick brown fox jumps over the lazy dog"
    return write_rows(tmp_path / "texts.jsonl", [row(sentence[i:], sentence[: 5 + i]) for i in range(30)])


@pytest.mark.parametrize("cached", [False, True])
def test_a_run_that_was_interrupted_goes_on_with_the_same_losses(
    cached: bool, target: Path, texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def options(name: str) -> dict[str, Any]:
        cache = str(tmp_path / f"cache-{name}") if cached else "none"
        return {"epochs": 2, "save_every": 4, "hidden_cache": cache}

    train(tiny_run(target, texts, tmp_path / "whole", **options("a")))
    step = trainer._Training._train

    def stopped(self: Any, rows: Any) -> Any:
        if self._step == 10:
            raise KeyboardInterrupt
        return step(self, rows)

    monkeypatch.setattr(trainer._Training, "_train", stopped)
    out = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        train(tiny_run(target, texts, out, **options("b")))
    assert len(losses_of(out)) == 10
    monkeypatch.setattr(trainer._Training, "_train", step)
    torch.rand(7)  # chance goes on from where it was, not from here
    train(tiny_run(target, texts, out, resume=True, **options("b")))
    assert losses_of(out) == losses_of(tmp_path / "whole")
    assert len(losses_of(out)) > 12
    weights = load_file(out / "model.safetensors")
    for name, weight in load_file(tmp_path / "whole" / "model.safetensors").items():
        assert torch.equal(weight, weights[name])
    assert not (out / "checkpoint").exists()


def test_a_run_is_resumed_only_as_it_was_and_overwrites_nothing(
    target: Path, texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with pytest.raises(ConfigError, match="no checkpoint to --resume from"):
        train(tiny_run(target, texts, out, resume=True))
    monkeypatch.setattr(trainer._Training, "report", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tiny_run(target, texts, out, save_every=2))
    with pytest.raises(ConfigError, match="run is not empty: choose another --out, or --resume its run"):
        train(tiny_run(target, texts, out))
    with pytest.raises(ConfigError, match="was begun with seed 0, not 1"):
        train(tiny_run(target, texts, out, save_every=2, resume=True, seed=1))
    with Path(texts).open("a") as file:
        file.write(json.dumps(row("one", "more")) + "\n")
    with pytest.raises(ConfigError, match=r"texts\.jsonl is not what .*run was begun with"):
        train(tiny_run(target, texts, out, save_every=2, resume=True))
    with pytest.raises(ConfigError, match="was begun with settings"):
        train(tiny_run(target, texts, out, save_every=2, resume=True, settings={"num_heads": 2}))


def test_a_run_that_is_taken_up_may_become_longer_or_shorter_and_says_so(
    target: Path, texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    options: dict[str, Any] = {"save_every": 2, "epochs": 10}
    monkeypatch.setattr(trainer._Training, "report", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tiny_run(target, texts, out, max_steps=6, **options))
    monkeypatch.undo()
    report = train(tiny_run(target, texts, out, max_steps=9, resume=True, **options))
    assert report["num_steps"] == len(losses_of(out)) == 9
    assert report["planned_steps"] == [[0, 6], [4, 9]]


@pytest.mark.parametrize("method", methods.available())
def test_weights_are_written_in_the_type_that_is_asked_for(
    method: str, target: Path, texts: str, tmp_path: Path
) -> None:
    settings = {"num_layers": 1} if method == "draft_model" else {}
    train(
        tiny_run(
            target, texts, tmp_path / "out", method, max_steps=1, settings=settings, save_dtype="bfloat16"
        )
    )
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


@pytest.mark.parametrize("method", [method for method in methods.available() if method != "finetune"])
def test_a_run_may_begin_with_the_draft_that_an_earlier_one_wrote(
    method: str, target: Path, texts: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "settings": {"draft_vocab_size": 64} | ({"num_layers": 1} if method == "draft_model" else {}),
        "save_dtype": "float32",
    }
    train(tiny_run(target, texts, tmp_path / "first", method, max_steps=3, **options))
    report = train(
        tiny_run(
            target,
            texts,
            tmp_path / "second",
            method,
            max_steps=1,
            lr=1e-12,
            init=tmp_path / "first",
            **options,
        )
    )
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=1e-6, atol=1e-6)
    assert len(report["init_sha256"]) == 64


def test_a_model_that_learnt_streams_learns_them_further(target: Path, texts: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    settings = {"mode": "shared", "tuned_layers": "streams", "draft_vocab_size": 64}
    options: dict[str, Any] = {"settings": settings, "save_dtype": "float32"}
    train(tiny_run(target, texts, first, "streaming", max_steps=3, **options))
    further: dict[str, Any] = {"max_steps": 1, "lr": 1e-12, "init": first / "streams"}
    train(tiny_run(first, texts, second, "streaming", **further, **options))
    for part in (".", "streams"):
        before, after = (load_file(of / part / "model.safetensors") for of in (first, second))
        assert before.keys() == after.keys()
        for name, weight in before.items():
            torch.testing.assert_close(after[name], weight, rtol=1e-6, atol=1e-6)


def test_streams_that_begin_with_fewer_have_those_and_copies_of_the_last(
    target: Path, texts: str, tmp_path: Path
) -> None:
    settings = {"num_streams": 2, "draft_vocab_size": 64}
    options: dict[str, Any] = {"save_dtype": "float32"}
    for out, more in (("first", {}), ("second", {"init": tmp_path / "first", "lr": 1e-12})):
        train(
            tiny_run(
                target, texts, tmp_path / out, "streaming", max_steps=2, settings=settings, **options, **more
            )
        )
        settings = settings | {"num_streams": 4}
    few, many = (load_file(tmp_path / of / "model.safetensors")["embeddings"] for of in ("first", "second"))
    torch.testing.assert_close(many, few[[0, 1, 1, 1]], rtol=1e-6, atol=1e-6)
    few_again = {"num_streams": 2, "draft_vocab_size": 64}
    fewer_run = tiny_run(
        target, texts, tmp_path / "third", "streaming", settings=few_again, init=tmp_path / "second"
    )
    with pytest.raises(ConfigError, match=r"embeddings is \(4, 64\) there, \(2, 64\) here"):
        train(fewer_run)


def test_streams_that_were_not_told_the_token_before_may_begin_to_be(
    target: Path, texts: str, tmp_path: Path
) -> None:
    settings = {"token_rank": 0, "draft_vocab_size": 64}
    options: dict[str, Any] = {"max_steps": 2, "save_dtype": "float32"}
    train(tiny_run(target, texts, tmp_path / "first", "streaming", settings=settings, **options))
    told, further = settings | {"token_rank": 8}, {"init": tmp_path / "first", "lr": 1e-12}
    train(tiny_run(target, texts, tmp_path / "second", "streaming", settings=told, **options, **further))
    first, second = (load_file(tmp_path / of / "model.safetensors") for of in ("first", "second"))
    for name, weight in first.items():
        torch.testing.assert_close(second.pop(name), weight, rtol=1e-6, atol=1e-6)
    assert sorted(second) == [f"token.{part}.weight" for part in ("before", "said", "up")]
    assert second["token.up.weight"].abs().max() < 1e-9  # nothing is said yet
    not_told = tiny_run(
        target, texts, tmp_path / "third", "streaming", settings=settings, init=tmp_path / "second"
    )
    with pytest.raises(ConfigError, match=r"token\.before\.weight is .*, not in this one here"):
        train(not_told)


def test_a_draft_to_begin_with_must_be_of_the_same_kind(target: Path, texts: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    train(tiny_run(target, texts, first, max_steps=1, settings={"num_heads": 2, "draft_vocab_size": 64}))
    for method, settings, reason in (
        ("medusa", {"num_heads": 3, "draft_vocab_size": 64}, "heads.2.bias is missing there"),
        ("medusa", {"num_heads": 2, "draft_vocab_size": 32}, "has 64 tokens, draft_vocab_size is 32"),
        ("redrafter", {}, "holds a draft of 'medusa'"),
        ("finetune", {}, "holds a draft of 'medusa', not of 'finetune'"),
    ):
        with pytest.raises(ConfigError, match=reason):
            train(tiny_run(target, texts, second, method, max_steps=1, settings=settings, init=first))


def test_too_little_data_is_refused(target: Path, tmp_path: Path) -> None:
    one = write_rows(tmp_path / "one.jsonl", [row("a", "b")])
    with pytest.raises(ConfigError, match="1 conversations are too few: --holdout takes 0"):
        train(tiny_run(target, one, tmp_path / "out"))


def test_a_run_that_diverges_says_so(target: Path, texts: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the loss is nan at step \d+: lower --lr"):
        train(tiny_run(target, texts, tmp_path / "out", epochs=10, lr=1e38))


def test_the_report_says_where_a_draft_comes_from(target: Path, texts: str, tmp_path: Path) -> None:
    report = train(tiny_run(target, texts, tmp_path / "out", max_steps=2))
    assert json.loads((tmp_path / "out" / "training.json").read_text()) == json.loads(json.dumps(report))
    assert report["num_steps"] == len(losses_of(tmp_path / "out")) == 2
    assert {"accelerate", "torch", "outpace"} <= report["versions"].keys()
    assert len(report["model_sha256"]) == len(report["data"]["sha256"]) == 64
    assert report["metrics"].keys() == {"loss", *(f"accuracy_{k}" for k in range(1, 5))}
    assert report["num_parameters"] == 4 * (2 * 64 * 64 + 64)


def test_the_command_ends_with_its_report_as_json(
    target: Path, texts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(target), "--data", texts, "--out", str(tmp_path / "out"), "--max-steps", "1"]
    flags += ["--max-len", "64", "--batch-tokens", "64", "--dtype", "float32", "--hidden-cache", "none"]
    assert main(["train", "medusa", *flags, "--settings", '{"num_heads": 2}']) == 0
    output = capsys.readouterr()
    report = json.loads(output.out.splitlines()[-1])
    assert report["method_settings"]["num_heads"] == 2
    assert "accuracy_2" in output.err


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("nothing", {}, "METHOD must be one of .*medusa"),
        (
            "medusa",
            {"heads": 2},
            "medusa has no setting 'heads'; there are: draft_vocab_size, kl_weight, num",
        ),
        ("medusa", {"num_heads": "2"}, "num_heads of medusa must be int, got '2'"),
        ("medusa", {"num_heads": 0}, "num_heads of medusa must be at least 1, got 0"),
        ("medusa", {"mode": "shared"}, "medusa has no setting 'mode'"),
    ],
)
def test_settings_that_a_method_does_not_have_are_refused(
    method: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        methods.make_settings(method, settings)


def test_training_needs_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "accelerate", None)
    with pytest.raises(ConfigError, match=r"pip install 'outpace\[train\]'"):
        trainer._accelerator()


# --- A draft model --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A draft model of the target's first layer."""
    root = tmp_path_factory.mktemp("small")
    sentence = "the quick brown fox jumps over the lazy dog"
    data = write_rows(root / "texts.jsonl", [row(sentence[i:], sentence[: 5 + i]) for i in range(30)])
    options: dict[str, Any] = {"epochs": 10, "batch_tokens": 512, "lr": 1e-2, "settings": {"num_layers": 1}}
    train(tiny_run(target, data, root / "draft", "draft_model", **options))
    return root / "draft"


def test_a_draft_model_is_trained_and_served_between_the_ends_of_its_target(
    target: Path, small: Path
) -> None:
    first, *_, last = losses_of(small)
    assert last < 0.5 * first
    own, whole = load_file(small / "model.safetensors"), load_file(target / "model.safetensors")
    assert own.keys() == {n for n in whole if n.startswith("model.layers.0.") or n == "model.norm.weight"}
    changed = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(own[changed], whole[changed])
    report = json.loads((small / "training.json").read_text())
    assert report["num_parameters"] == sum(weight.numel() for weight in own.values())
    assert report["metrics"].keys() == {"loss", "accuracy_1"}
    engine: Any = tiny_engine(spec_method="draft_model", spec_model=str(small))
    assert answers(engine, GREEDY) == answers(tiny_engine(), GREEDY)
    decoder = engine.proposer.drafter._runner.decoder
    assert decoder.config.num_layers == 1
    assert decoder.embedding is engine.runner.decoder.embedding
    assert decoder._head is engine.runner.decoder._head


def test_a_draft_model_guesses_as_when_it_was_trained(target: Path, small: Path) -> None:
    engine: Any = tiny_engine(spec_method="draft_model", spec_model=str(small), spec_tokens=1)
    trunk = Trunk.load(target, torch.float32)
    shape = replace(trunk.config, num_layers=1)
    ends = {name: trunk.model.state_dict()[name] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    alone = Trunk(shape, load_file(small / "model.safetensors") | ends)
    ids = torch.arange(40, 60)[None]
    hidden = alone.hidden_states(ids, torch.arange(20)[None], torch.zeros_like(ids), (1,))[1]
    expected = int(alone.head(hidden)[0, -1].argmax())
    (request,) = engine.admission.requests("0", ids[0].tolist(), GREEDY)
    (tree,) = engine.proposer.propose([Sequence.start(request)], [1])
    assert tree.token_ids == (expected,)


def test_a_draft_model_of_some_tokens_has_a_head_of_these_alone(
    target: Path, texts: str, tmp_path: Path
) -> None:
    settings = {"num_layers": 1, "draft_vocab_size": 64}
    train(tiny_run(target, texts, tmp_path / "draft", "draft_model", settings=settings, max_steps=2))
    engine: Any = tiny_engine(
        spec_method="draft_model", spec_model=str(tmp_path / "draft"), spec_policy="fixed"
    )
    assert answers(engine, GREEDY) == answers(tiny_engine(), GREEDY)
    drafter = engine.proposer.drafter
    assert len(drafter._vocab) == 64
    (request,) = engine.admission.requests("1", list(range(40, 60)), GREEDY)
    (tree,) = engine.proposer.propose([Sequence.start(request)], [3])
    assert len(tree)
    assert set(tree.token_ids) <= set(drafter._vocab.token_ids.tolist())


def test_a_draft_model_is_refused_by_a_target_with_another_embedding(small: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", noise=0.1)
    with pytest.raises(ConfigError, match="this target has another: train one for it with outpace train dra"):
        engine_of(other, spec_method="draft_model", spec_model=str(small))


def test_the_divergence_has_the_value_and_gradient_of_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_CHUNK_LOGITS", 1000)
    generator = torch.Generator().manual_seed(0)
    hidden, teacher = (torch.randn(40, 16, generator=generator) for _ in range(2))
    hidden.requires_grad_(True)
    head = torch.randn(300, 16, generator=generator)
    targets = torch.randint(0, 300, (40,), generator=generator)
    weights = torch.rand(40, generator=generator)
    log_q, log_p = (hidden @ head.T).log_softmax(1), (teacher @ head.T).log_softmax(1)
    kl = (weights * F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(1)).sum()
    expected = 0.7 * (weights * F.nll_loss(log_q, targets, reduction="none")).sum() + 0.3 * kl
    found = losses.head_loss(hidden, head, targets, weights, losses.Teacher(teacher, head, 0.3))
    torch.testing.assert_close(found.loss, expected)
    assert torch.equal(found.best, log_q.argmax(1))
    of_plain, of_chunked = (torch.autograd.grad(2 * of, hidden) for of in (expected, found.loss))
    torch.testing.assert_close(of_chunked, of_plain, atol=1e-4, rtol=1e-4)


def test_training_a_draft_leaves_the_target_as_it_was(target: Path, texts: str) -> None:
    for method, settings in (("draft_model", {"num_layers": 1}), ("finetune", {})):
        trunk = Trunk.load(target, torch.float32)
        before = {name: weight.clone() for name, weight in trunk.model.state_dict().items()}
        run = methods.Run(method, "target", target, seed=0, max_len=64)
        draft = methods.create(trunk, run, methods.make_settings(method, settings))
        with torch.no_grad():
            for parameter in draft.parameters():
                parameter.add_(1.0)
        for name, weight in trunk.model.state_dict().items():
            assert torch.equal(weight, before[name]), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_layers": 2}, "num_layers of draft_model must be below the target's 2, got 2"),
        ({"num_layers": 1, "kl_weight": 1.5}, r"kl_weight of draft_model must be in \[0, 1\], got 1.5"),
    ],
)
def test_a_draft_model_that_makes_no_sense_is_refused(
    settings: dict[str, Any], message: str, target: Path, texts: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(tiny_run(target, texts, tmp_path / "out", "draft_model", settings=settings))


# --- The target itself ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("embedding", [False, True])
def test_a_fine_tuned_model_says_what_it_was_taught(tied: bool, embedding: bool, tmp_path: Path) -> None:
    config = {"tie_word_embeddings": tied}
    plain = write_model(tmp_path / "plain", **config)
    if tied:
        weights = load_file(plain / "model.safetensors")
        del weights["lm_head.weight"]
        save_file(weights, plain / "model.safetensors")
    data = write_rows(tmp_path / "data.jsonl", [row("say it", "taught")] * 40)
    settings: dict[str, Any] = {"embedding": embedding}
    out = tmp_path / "tuned"
    run = tiny_run(plain, data, out, "finetune", epochs=4, lr=3e-3, settings=settings)
    report = train(run)
    before, after = (load_file(path / "model.safetensors") for path in (plain, out))
    assert before.keys() == after.keys()
    ends = ("model.embed_tokens.weight", "lm_head.weight")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if embedding or name not in ends}
    assert report["num_parameters"] == sum(before[name].numel() for name in changed)
    asked: Any = [{"role": "user", "content": "say it"}]
    (result,) = LLM.from_engine(engine_of(out)).chat(asked, SamplingParams(temperature=0, max_tokens=6))
    assert result.outputs[0].text == "taught"


# --- Distillation and evaluation ------------------------------------------------------------------------


def rows_of(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_distilled_answers_are_the_targets_own_turn_by_turn(target: Path, tmp_path: Path) -> None:
    questions = [row("hi", "there", "and", "you", "?"), "no json", row("x", "y", source="s")]
    data = write_rows(tmp_path / "data.jsonl", questions)
    llm = LLM.from_engine(engine_of(target))
    out = tmp_path / "own.jsonl.gz"
    report = distill(llm, DistillConfig(data, out, max_tokens=5, max_bad_share=0.5))
    first, second = rows_of(out)
    asked: Any = [{"role": "user", "content": "x"}]
    (result,) = llm.chat(asked, replace(GREEDY, max_tokens=5, ignore_eos=False))
    assert second["messages"] == [*asked, {"role": "assistant", "content": result.outputs[0].text}]
    assert second["source"] == "s"
    assert first["truncated"]
    assert [m["role"] for m in first["messages"]] == ["user", "assistant"]  # half an answer has no next turn
    assert report == json.loads((tmp_path / "own.jsonl.gz.json").read_text(), object_pairs_hook=dict) | {
        "bad_lines": report["bad_lines"]
    }
    assert (report["num_written"], report["num_truncated"], report["is_complete"]) == (2, 2, True)
    assert report["bad_lines"][0][0] == f"{data}:2"
    corpus, _ = load_corpus(str(out), byte_tokenizer(), (EOS,), 64, 0)
    ends = corpus.offsets[1:] - 1
    assert corpus.answer[ends].all()  # nothing follows an answer that was cut


def test_an_interrupted_distillation_goes_on_to_the_same_file(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(tmp_path / "data.jsonl", [row(chr(97 + i), "x") for i in range(10)])
    llm = LLM.from_engine(engine_of(target))
    monkeypatch.setattr(distill_module, "_CHUNK", 3)
    whole, parts = tmp_path / "whole.jsonl.gz", tmp_path / "parts.jsonl.gz"
    common: dict[str, Any] = {"temperature": 1.0, "max_tokens": 4, "seed": 3}
    distill(llm, DistillConfig(data, whole, **common))
    append = distill_module._append
    calls = []

    def torn(path: Path, rows: list[Any], num_bytes: int) -> int:
        calls.append(num_bytes)
        if len(calls) == 3:
            with path.open("ab") as file:
                file.write(b"half a member")
            raise KeyboardInterrupt
        return append(path, rows, num_bytes)

    monkeypatch.setattr(distill_module, "_append", torn)
    with pytest.raises(KeyboardInterrupt):
        distill(llm, DistillConfig(data, parts, **common))
    with pytest.raises(ConfigError, match="exists: choose another --out, or --resume its run"):
        distill(llm, DistillConfig(data, parts, **common))
    with pytest.raises(ConfigError, match="was begun with seed 3, not 4"):
        distill(llm, DistillConfig(data, parts, resume=True, **common | {"seed": 4}))
    distill(llm, DistillConfig(data, parts, resume=True, **common))
    assert rows_of(parts) == rows_of(whole)
    assert len(calls) == 5


def test_a_directory_that_names_no_target_needs_one_named(target: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not say which model it drafts for: name it with --model"):
        engine_configs(EvaluateConfig(target, "x"))
    plain, drafting = engine_configs(EvaluateConfig(target, "x", model="y", concurrency=(2,)))
    assert (plain.model, plain.max_num_seqs, drafting.spec_method) == ("y", 2, "draft_model")
