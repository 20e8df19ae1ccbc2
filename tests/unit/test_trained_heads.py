"""Medusa and ReDrafter: what is trained drafts better when served, and as well as worked out offline."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from outpace.cli import main
from outpace.config import EngineConfig
from outpace.engine.engine import Engine
from outpace.errors import ConfigError
from outpace.llm import LLM
from outpace.policy.base import StepRecord
from outpace.spec.last_hidden import unit_rms
from outpace.training import evaluate as evaluation
from outpace.training import trainer
from outpace.training.data import Corpus, Report, collate
from outpace.training.method import make_settings
from outpace.training.methods.medusa import static_tree
from outpace.training.trainer import train
from outpace.training.trunk import Trunk
from tiny import GREEDY, MODEL, answers, tiny_engine, write_model
from training_runs import engine_of, losses_of, row, tiny_run, write_rows

ANSWER_LEN, NUM_PROMPTS = 40, 40
# a tiny random model is hardly sure of anything: its distribution would teach that
CHAIN = {"num_ranks": 1, "kl_weight": 0.0}


@pytest.fixture(scope="module")
def simple(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers add nothing, so that a token follows from the one before: something to learn."""
    return write_model(tmp_path_factory.mktemp("simple"), exit_layer=0)


@pytest.fixture(scope="module")
def own_answers(simple: Path) -> Corpus:
    """Prompts of two tokens and the model's own greedy answers: those to the first four are held out."""
    prompts = [[97 + i % 7, 97 + i // 7] for i in range(NUM_PROMPTS)]
    results = LLM.from_engine(engine_of(simple)).generate(prompts, replace(GREEDY, max_tokens=ANSWER_LEN))
    documents = [
        ([*result.prompt_token_ids, *result.outputs[0].token_ids], [False] * 2 + [True] * ANSWER_LEN)
        for result in results
    ]
    return Corpus.of(documents)


def trained_on(corpus: Corpus, simple: Path, out: Path, **more: Any) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "load_corpus", lambda *_: (corpus, Report(len(corpus))))
        return train(tiny_run(simple, "own answers", out, **{"batch_tokens": 2048, "lr": 1e-2} | more))


@pytest.fixture(scope="module")
def chain(own_answers: Corpus, simple: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained heads with a tree that is a chain."""
    out = tmp_path_factory.mktemp("chain") / "medusa"
    trained_on(own_answers, simple, out, epochs=25, settings=CHAIN)
    return out


def served(
    simple: Path, draft: Path, corpus: Corpus, documents: range, num_nodes: int = 4, method: str = "medusa"
) -> Engine:
    """An engine that has answered the prompts of some documents, and answered them as they are."""
    engine = engine_of(simple, spec_method=method, spec_model=str(draft), spec_tokens=num_nodes)
    texts = [corpus.token_ids[slice(*corpus.offsets[d : d + 2])].tolist() for d in documents]
    results = LLM.from_engine(engine).generate(
        [text[:2] for text in texts], replace(GREEDY, max_tokens=ANSWER_LEN)
    )
    assert [result.outputs[0].token_ids for result in results] == [text[2:] for text in texts]
    return engine


def acceptance_length(engine: Engine) -> float:
    drafts = engine.metrics.drafts
    return 1 + drafts.num_accepted_tokens / drafts.num_drafts


def test_training_lowers_the_loss_and_lengthens_what_is_accepted_when_served(
    own_answers: Corpus, simple: Path, chain: Path, tmp_path: Path
) -> None:
    trained_on(own_answers, simple, tmp_path / "new", max_steps=1, settings=CHAIN)
    (first, *_, last) = losses_of(chain)
    assert last < 0.2 * first
    documents = range(4, NUM_PROMPTS)
    before = acceptance_length(served(simple, tmp_path / "new", own_answers, documents))
    after = acceptance_length(served(simple, chain, own_answers, documents))
    assert before < 1.3
    assert after > 3


def test_acceptance_that_is_worked_out_offline_is_what_is_served(
    own_answers: Corpus, simple: Path, chain: Path
) -> None:
    trunk = Trunk.load(simple, torch.float32)
    weights = load_file(chain / "model.safetensors")
    num_drafts, accepted = 0, [0] * 4
    for document in range(NUM_PROMPTS):
        tokens = own_answers.token_ids[slice(*own_answers.offsets[document : document + 2])]
        ids, zeros = torch.from_numpy(tokens)[None], torch.zeros(1, len(tokens), dtype=torch.int64)
        hidden = unit_rms(trunk.hidden_states(ids, torch.arange(len(tokens))[None], zeros, (2,))[2][0])
        guesses = []
        for k in range(4):
            w, b, p = (weights[f"heads.{k}.{name}"] for name in ("weight", "bias", "output"))
            guesses.append(trunk.head(F.linear(hidden + F.silu(F.linear(hidden, w, b)), p)))
        here = 1  # the row whose next token is known
        while (room := len(tokens) - here - 3) > 0:  # the target adds one
            right = 0
            while right < min(4, room) and guesses[right][here].argmax() == tokens[here + 2 + right]:
                accepted[right] += 1
                right += 1
            num_drafts += 1
            here += right + 1
    drafts = served(simple, chain, own_answers, range(NUM_PROMPTS)).metrics.drafts
    assert drafts.num_drafts == pytest.approx(num_drafts, rel=0.02)
    assert drafts.num_accepted_per_depth == pytest.approx(accepted, rel=0.02)


def test_a_tree_beside_the_chain_accepts_more(own_answers: Corpus, simple: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 2}
    trained_on(own_answers, simple, tmp_path / "tree", **options)
    trained_on(own_answers, simple, tmp_path / "chain", settings=CHAIN, **options)
    lengths = [
        acceptance_length(served(simple, tmp_path / name, own_answers, range(NUM_PROMPTS), 12))
        for name in ("chain", "tree")
    ]
    assert lengths[0] < lengths[1]


def test_heads_of_their_own_are_trained_saved_and_served(
    own_answers: Corpus, simple: Path, tmp_path: Path
) -> None:
    out = tmp_path / "own"
    own = {"own_heads": True, "num_heads": 2}
    trained_on(own_answers, simple, out, epochs=20, settings=own)
    weights = load_file(out / "model.safetensors")
    assert weights["heads.1.output"].shape == (MODEL.vocab_size, MODEL.hidden_size)
    assert acceptance_length(served(simple, out, own_answers, range(4, NUM_PROMPTS))) > 1.5


@pytest.mark.parametrize("method", ["medusa", "redrafter"])
def test_few_positions_of_each_row_are_learnt_from_where_asked_and_all_are_measured(
    method: str, own_answers: Corpus
) -> None:
    batch = collate(own_answers, [[0, 1], [2]])
    _, valid = batch.future(1)
    few, every = (make_settings(method, {"num_anchors": num}) for num in (5, 0))
    drawn = few.rows(batch, 0)
    assert int(drawn.sum()) == 10
    assert bool(valid[drawn].all())
    assert torch.equal(every.rows(batch, 0), valid)
    with torch.no_grad():
        assert torch.equal(few.rows(batch, 0), valid)


def test_the_static_tree_takes_the_likeliest_paths_first() -> None:
    accuracies = [[0.6, 0.2, 0.1], [0.5, 0.3, 0.0]]
    assert static_tree(accuracies, 5) == [[0], [0, 0], [1], [0, 1], [2]]
    assert static_tree([[0.5, 0.1, 0.3]], 3) == [[0], [1], [2]]  # a rank never before an earlier one
    assert static_tree(accuracies, 99) == static_tree(accuracies, 99)[:9]


def test_heads_without_a_limit_compute_nothing_and_forget_who_ended(
    chain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine(spec_method="medusa", spec_model=str(chain), spec_policy="off")
    proposer: Any = engine.proposer
    monkeypatch.setattr(proposer, "_candidates", None)
    assert answers(engine, GREEDY) == answers(tiny_engine(), GREEDY)
    assert proposer._hidden._states == {}


def edited(draft: Path, copy: Path, change: Any) -> str:
    """A copy of a checkpoint whose config.json was changed."""
    copy.mkdir()
    content = json.loads((draft / "config.json").read_text())
    change(content)
    (copy / "config.json").write_text(json.dumps(content))
    save_file(load_file(draft / "model.safetensors"), copy / "model.safetensors")
    return str(copy)


def verifier(content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = content["speculators_config"]["verifier"]
    return found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: verifier(c).update(hidden_size=32), "with hidden_size 32, this target has 64"),
        (lambda c: verifier(c).update(vocab_size=32), "with vocab_size 32, this target has 259"),
        (lambda c: c["speculators_config"].update(algorithm="eagle3"), "holds a draft of 'eagle3', not of"),
        (lambda c: c.pop("speculators_config"), "is no trained draft: .* outpace train medusa"),
        (
            lambda c: c["medusa"].update(num_heads=5),
            r"missing heads\.4\.bias, heads\.4\.output, heads\.4\.weight",
        ),
        (lambda c: c["medusa"].update(tree=[[0, 0]]), r"node \[0, 0\] of the tree .* after its parent"),
        (lambda c: c["medusa"].pop("tree"), "config.json has no 'tree' of medusa"),
        (
            lambda c: c["medusa"].update(num_heads="3"),
            "num_heads of medusa in config.json must be int, got '3'",
        ),
    ],
)
def test_a_draft_that_does_not_fit_is_refused_in_words(
    change: Any, message: str, chain: Path, tmp_path: Path
) -> None:
    draft = edited(chain, tmp_path / "copy", change)
    with pytest.raises(ConfigError, match=message):
        tiny_engine(spec_method="medusa", spec_model=draft)


# --- ReDrafter ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recurrent(own_answers: Corpus, simple: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("recurrent") / "redrafter"
    settings = {"num_tokens": 3, "num_blocks": 1}
    trained_on(own_answers, simple, out, method="redrafter", epochs=30, settings=settings)
    return out


def test_a_recurrent_drafter_that_was_trained_is_accepted_more_when_served(
    own_answers: Corpus, simple: Path, recurrent: Path, tmp_path: Path
) -> None:
    new, settings = tmp_path / "new", {"num_tokens": 3, "num_blocks": 1}
    trained_on(own_answers, simple, new, method="redrafter", max_steps=1, settings=settings)
    first, *_, last = losses_of(recurrent)
    assert last < 0.5 * first
    documents = range(4, NUM_PROMPTS)
    before, after = (
        acceptance_length(served(simple, draft, own_answers, documents, 3, "redrafter"))
        for draft in (new, recurrent)
    )
    assert before < 1.5
    assert after > 2.5


def test_what_a_recurrent_drafter_expects_of_a_node_follows_from_the_equations(
    simple: Path, recurrent: Path
) -> None:
    engine = engine_of(simple, spec_method="redrafter", spec_model=str(recurrent), spec_tokens=9)
    propose = engine.proposer.propose
    drafted: list[tuple[list[int], Any]] = []

    def noted(sequences: list[Any], limits: list[int]) -> list[Any]:
        trees = propose(sequences, limits)
        drafted.extend((list(s.token_ids), tree) for s, tree in zip(sequences, trees, strict=True))
        return trees

    engine.proposer.propose = noted  # type: ignore[method-assign]
    LLM.from_engine(engine).generate([[97, 98], [99, 100, 101]], replace(GREEDY, max_tokens=12))
    trunk, w = Trunk.load(simple, torch.float32), load_file(recurrent / "model.safetensors")
    drafted = [(known, tree) for known, tree in drafted if len(tree)]
    assert max(len(tree) for _, tree in drafted) == 9
    assert not all(tree.is_chain() for _, tree in drafted)
    for known, tree in drafted:
        ids = torch.tensor(known[:-1])[None]
        states = trunk.hidden_states(ids, torch.arange(ids.shape[1])[None], torch.zeros_like(ids), (2,))[2]
        h = unit_rms(states[0, -1])
        for path, confidence in zip(tree.paths(), tree.confidence, strict=True):
            state = torch.zeros_like(h)
            for token in (known[-1], *path[:-1]):
                taken_in = w["token.weight"] @ unit_rms(trunk.embed(torch.tensor(token)))
                state = F.silu(taken_in + w["state.weight"] @ state + w["state.bias"])
            x = torch.cat((h, state))
            x = x + F.silu(w["blocks.0.weight"] @ x + w["blocks.0.bias"])
            probs = trunk.head(w["output.weight"] @ x).softmax(dim=0)
            assert float(probs[path[-1]]) == pytest.approx(confidence, rel=1e-3, abs=1e-5)


def test_beams_are_as_wide_as_the_limit_allows(simple: Path, recurrent: Path) -> None:
    engine = engine_of(simple, spec_method="redrafter", spec_model=str(recurrent), spec_tokens=12)
    widths: dict[int, int] = {}
    propose = engine.proposer.propose
    asked = iter([2, 3, 6, 12] * 100)

    def noted(sequences: list[Any], limits: list[int]) -> list[Any]:
        limit = next(asked)
        (tree,) = propose(sequences, [min(limit, *limits)])
        if len(tree):
            depths = tree.depths()
            widths[limit] = max(widths.get(limit, 0), max(map(depths.count, depths)))
        return [tree]

    engine.proposer.propose = noted  # type: ignore[method-assign]
    LLM.from_engine(engine).generate([[97, 98]], replace(GREEDY, max_tokens=40))
    assert widths[2] == 1
    assert [widths[limit] <= 1 + limit // 3 for limit in (3, 6, 12)] == [True] * 3
    assert widths[12] > widths[3]


# --- Evaluation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("turn_s", [1.0, 0.0])
def test_evaluation_reports_what_the_engine_accepted(
    chain: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    turn_s: float,
) -> None:
    monkeypatch.setattr(evaluation, "_TURN_S", turn_s)  # 0: engines in turn after each step
    data = write_rows(tmp_path / "data.jsonl", [row(chr(97 + i), "x") for i in range(6)])
    flags = ["--data", data, "--concurrency", "1", "4", "--spec-policy", "fixed", "--spec-tokens", "3"]
    flags += ["--max-tokens", "20", "--num-threads", "1", "--json", str(tmp_path / "out.json")]
    flags += ["--step-log", str(tmp_path / "steps.jsonl")]
    assert main(["evaluate", str(chain), *flags]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report == json.loads((tmp_path / "out.json").read_text())
    assert [result["concurrency"] for result in report["results"]] == [1, 4]
    for result in report["results"]:
        assert result["num_answers"] == result["num_same_answers"] == 6
        assert 1 <= result["tokens_per_step"] <= 4
        assert result["speed_up"] > 0
        assert result["tpot_speed_up"] == pytest.approx(result["tpot_ms_plain"] / result["tpot_ms"])
        by_depth = result["acceptance_by_depth"]
        assert result["acceptance_length"] == pytest.approx(1 + sum(by_depth))
        assert by_depth == sorted(by_depth, reverse=True)
    alone, beside = report["results"]
    assert alone["acceptance_by_depth"] == beside["acceptance_by_depth"]
    steps = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    num_drafts = sum(result["num_drafts"] for result in report["results"])
    assert sum(step["drafting"] for step in steps) >= num_drafts > 0  # and those of the warm-up


def test_what_others_do_between_an_engines_turns_is_not_counted(
    simple: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "_TURN_S", 0.0)
    engine = Engine.from_config(EngineConfig(str(simple), spec_method="none", num_threads=1))
    records: list[StepRecord] = []
    monkeypatch.setattr(engine, "_learn", records.append)
    config = evaluation.EvaluateConfig(simple, "unread", max_tokens=8)
    prompts = [[{"role": "user", "content": letter}] for letter in "ab"]
    begin, others_s, result = time.perf_counter(), 0.0, evaluation._Pass()
    for turn in evaluation._Answerer(engine, prompts, config).run(1):
        others, result = time.perf_counter(), turn
        time.sleep(0.05)
        others_s += time.perf_counter() - others
    assert others_s > 0.05 * len(records) > 0.5
    assert result.seconds + others_s < time.perf_counter() - begin
    (first, second), (end, last) = result.first_s.values(), result.last_s.values()
    assert first < end < second < last <= result.seconds
    assert max(record.seconds.get("between", 0.0) for record in records) < 0.05
