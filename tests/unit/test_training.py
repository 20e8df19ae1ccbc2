"""Training: data, the trunk, losses, interrupted runs, and that what is trained drafts better when served."""

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

from checkpoints import VARIANTS, write_checkpoint
from outpace.cli import main
from outpace.config import EngineConfig
from outpace.engine.engine import Engine
from outpace.errors import ConfigError
from outpace.llm import LLM
from outpace.models.tokenizer import load_tokenizer
from outpace.training import distill as distill_module
from outpace.training import losses, trainer
from outpace.training import method as methods
from outpace.training.data import (
    BadLineError,
    Corpus,
    Report,
    collate,
    encode_conversation,
    epoch_order,
    load_corpus,
    pack,
)
from outpace.training.distill import DistillConfig, distill
from outpace.training.evaluate import EvaluateConfig, engine_configs
from outpace.training.hidden import HiddenStates
from outpace.training.losses import head_cross_entropy
from outpace.training.method import Recipe
from outpace.training.methods.medusa import static_tree
from outpace.training.trainer import TrainConfig, lr_share, train
from outpace.training.trunk import Trunk
from tiny import ASSISTANT, EOS, GREEDY, MODEL, USER, answers, byte_tokenizer, tiny_engine, write_model

ANSWER_LEN, NUM_PROMPTS = 40, 40


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of `tiny_engine`."""
    return write_model(tmp_path_factory.mktemp("target"))


def row(*contents: str, **more: Any) -> dict[str, Any]:
    """A conversation, the user first."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)], **more}


def write_rows(path: Path, rows: list[Any]) -> str:
    """A dataset; what is no text is written as JSON."""
    lines = [line if isinstance(line, str) else json.dumps(line) for line in rows]
    text = "\n".join(lines) + "\n"
    if path.suffix == ".gz":
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.write(text)
    else:
        path.write_text(text, encoding="utf-8")
    return str(path)


# --- Data -----------------------------------------------------------------------------------------------


def test_only_what_the_assistant_answered_counts_up_to_its_end_token() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|eos|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    token_ids, answer = encode_conversation(tokenizer, row("ab", "cd", "e", "f")["messages"], (EOS,))
    newline = 10
    assert token_ids == [
        *(USER, 97, 98, EOS, newline, ASSISTANT, 99, 100, EOS, newline),
        *(USER, 101, EOS, newline, ASSISTANT, 102, EOS, newline),
    ]
    assert [i for i, is_answer in enumerate(answer) if is_answer] == [6, 7, 8, 15, 16]


def test_the_prompt_before_an_answer_is_what_is_served(target: Path) -> None:
    tokenizer = load_tokenizer(target)
    token_ids, answer = encode_conversation(tokenizer, row("hello", "bye")["messages"], (EOS,))
    prompt = tokenizer.apply_chat_template(
        row("hello")["messages"], add_generation_prompt=True, return_dict=False
    )
    assert token_ids[: answer.index(True)] == prompt


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(BadLineError, match="lays out message 2 differently"):
        encode_conversation(tokenizer, row("a", "b", "c", "d")["messages"], (EOS,))


BAD_LINES = [
    ("{", "is no JSON"),
    ("[1]", "holds a list"),
    ({"prompt": "x"}, "has no list of messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "message 1 has no role"),
    (row("a", " "), r"message 2 \(assistant\) has no text"),
    ({"messages": [{"role": "user", "content": "x"}]}, "has no answer of the assistant"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_bad_lines_are_reported_by_number_and_passed_over(
    line: Any, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_rows(tmp_path / "data.jsonl.gz", [row("a", "b"), "", line, row("c", "d")])
    corpus, report = load_corpus(source, byte_tokenizer(), (EOS,), 64, max_bad_share=0.5)
    assert (len(corpus), report.num_lines) == (2, 3)
    ((where, _),) = report.bad
    assert where == f"{source}:3"
    assert caplog.messages[0].startswith(f"{source}:3: ")
    with pytest.raises(ConfigError, match=f"1 of 3 lines .* {source}:3: .*{reason}"):
        load_corpus(source, byte_tokenizer(), (EOS,), 64, max_bad_share=0.1)


def test_what_a_row_cuts_off_is_counted(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "data.jsonl", [row("a", "b" * 100), row("a" * 100, "b"), row("a", "b")])
    corpus, report = load_corpus(source, byte_tokenizer(), (EOS,), 32, 0)
    assert corpus.lengths().tolist() == [32, 4]
    assert (report.num_cut, report.num_without_answer) == (2, 1)


def test_data_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"has no lines"):
        load_corpus(write_rows(tmp_path / "e.jsonl", []), byte_tokenizer(), (EOS,), 32, 0)
    broken = tmp_path / "data.jsonl.gz"
    broken.write_bytes(b"no gzip")
    with pytest.raises(ConfigError, match=r"cannot read the data .*data\.jsonl\.gz"):
        load_corpus(str(broken), byte_tokenizer(), (EOS,), 32, 0)


def test_packing_keeps_every_document_once_and_whole() -> None:
    lengths = [int(x) for x in torch.randint(1, 17, (200,), generator=torch.Generator().manual_seed(3))]
    order = epoch_order(200, epoch=1, seed=5)
    batches = pack(lengths, order, max_len=16, num_rows=4)
    assert sorted(d for rows in batches for documents in rows for d in documents) == list(range(200))
    rows = [sum(lengths[d] for d in documents) for batch in batches for documents in batch]
    assert max(rows) <= 16
    assert sum(rows) / (16 * len(rows)) > 0.75  # one document a row: 0.53
    assert order == epoch_order(200, 1, 5) != epoch_order(200, 2, 5)


def test_packed_documents_have_positions_and_targets_of_their_own() -> None:
    corpus = Corpus.of([([1, 2, 3], [False, True, True]), ([4, 5, 6, 7], [False, False, True, True])])
    batch = collate(corpus, [[0, 1], [1]])
    assert batch.token_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7], [4, 5, 6, 7, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 0, 0, 0]]
    assert batch.documents.tolist() == [[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, -1, -1, -1]]
    for depth, expected in enumerate([{(0, 0): 2, (0, 1): 3, (0, 4): 6, (0, 5): 7}, {(0, 0): 3, (0, 4): 7}]):
        tokens, valid = batch.future(depth)
        first = {(r, c): int(tokens[r, c]) for r, c in valid.nonzero().tolist() if r == 0}
        assert first == expected
    assert not batch.future(9)[1].any()


# --- The trunk and the loss -----------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["llama-tied", "qwen2-sliding", "qwen3-biases", "llama-yarn-mscale"])
def test_the_trunk_computes_what_transformers_does_for_each_packed_document(
    variant: str, tmp_path: Path
) -> None:
    import transformers

    assert variant in VARIANTS
    path = write_checkpoint(tmp_path, variant)
    trunk = Trunk.load(path, torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    one, two = torch.arange(3, 33), torch.arange(40, 60)
    token_ids = torch.cat((one, two))[None]
    positions = torch.cat((torch.arange(30), torch.arange(20)))[None]
    documents = torch.tensor([[0] * 30 + [1] * 20])
    states = trunk.hidden_states(token_ids, positions, documents, (2, 3))
    logits = trunk.head(states[3])[0]
    with torch.no_grad():
        expected = torch.cat((model(one[None]).logits[0], model(two[None]).logits[0]))
        between = model(one[None], output_hidden_states=True).hidden_states[2][0]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(states[2][0, :30], between, atol=1e-4, rtol=1e-4)


def test_the_trunk_agrees_with_the_decoder_that_serves(target: Path) -> None:
    trunk = Trunk.load(target, torch.float32)
    engine = tiny_engine()
    (request,) = engine.admission.requests("0", list(range(50)), replace(GREEDY, max_tokens=1))
    seen: list[torch.Tensor] = []
    observe = engine.proposer.observe
    engine.proposer.observe = lambda b, t, v: (seen.append(t.hidden), observe(b, t, v))[1]  # type: ignore
    engine.add([request])
    engine.step()
    token_ids, zeros = torch.arange(50)[None], torch.zeros(1, 50, dtype=torch.int64)
    states = trunk.hidden_states(token_ids, token_ids, zeros, (MODEL.num_layers,))
    torch.testing.assert_close(states[MODEL.num_layers][0], seen[0], atol=1e-4, rtol=1e-4)


def test_the_chunked_cross_entropy_has_the_value_and_gradients_of_the_plain_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(losses, "_CHUNK_LOGITS", 1000)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 16, generator=generator, requires_grad=True)
    head = torch.randn(300, 16, generator=generator, requires_grad=True)
    targets = torch.randint(0, 300, (40,), generator=generator)
    weights = torch.rand(40, generator=generator)
    logits = hidden @ head.T
    expected = (F.cross_entropy(logits, targets, reduction="none") * weights).sum()
    loss, best = head_cross_entropy(hidden, head, targets, weights)
    torch.testing.assert_close(loss, expected)
    assert torch.equal(best, logits.argmax(dim=1))
    of_plain = torch.autograd.grad(0.3 * expected, (hidden, head))
    of_chunked = torch.autograd.grad(0.3 * loss, (hidden, head))
    torch.testing.assert_close(of_chunked, of_plain)


def test_hidden_states_are_computed_once_and_come_back_the_same(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk = Trunk.load(target, torch.float32)
    corpus = Corpus.of([([1, 2, 3], [True] * 3), ([4, 5], [True] * 2), ([6] * 7, [True] * 7)])
    rows = [[0, 1], [2]]
    plain = HiddenStates(trunk, corpus, (1, 2), None).attach(collate(corpus, rows), rows)
    first = HiddenStates(trunk, corpus, (1, 2), tmp_path).attach(collate(corpus, rows), rows)
    monkeypatch.setattr(Trunk, "hidden_states", None)
    rows = [[2], [1]]
    again = HiddenStates(trunk, corpus, (1, 2), tmp_path).attach(collate(corpus, rows), rows)
    for layer in (1, 2):
        assert torch.equal(plain.hidden[layer][0, :5], first.hidden[layer][0, :5])
        assert torch.equal(again.hidden[layer][0, :7], first.hidden[layer][1, :7])
        assert torch.equal(again.hidden[layer][1, :2], first.hidden[layer][0, 3:5])


def test_the_learning_rate_rises_then_falls_to_nothing() -> None:
    cosine = [lr_share(step, 100, Recipe(1.0)) for step in range(100)]
    assert cosine[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert cosine[10] == 1.0
    assert cosine[55] == pytest.approx(0.5)
    assert sorted(cosine[10:], reverse=True) == cosine[10:]
    assert lr_share(60, 110, Recipe(1.0, 10 / 110, "linear")) == pytest.approx(0.5)


# --- Runs -----------------------------------------------------------------------------------------------


def config(target: Path, data: str, out: Path, **more: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "model": str(target),
        "max_len": 64,
        "batch_tokens": 128,
        "holdout": 4,
        "dtype": "float32",
        "hidden_cache": "none",
    }
    return TrainConfig("medusa", data, out, **settings | more)


def losses_of(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


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

    train(config(target, texts, tmp_path / "whole", **options("a")))
    step = trainer._Training._train

    def stopped(self: Any, rows: Any) -> Any:
        if self._step == 10:
            raise KeyboardInterrupt
        return step(self, rows)

    monkeypatch.setattr(trainer._Training, "_train", stopped)
    out = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        train(config(target, texts, out, **options("b")))
    assert len(losses_of(out)) == 10
    monkeypatch.setattr(trainer._Training, "_train", step)
    torch.rand(7)  # chance goes on from where it was, not from here
    train(config(target, texts, out, resume=True, **options("b")))
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
        train(config(target, texts, out, resume=True))
    monkeypatch.setattr(trainer._Training, "report", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(config(target, texts, out, save_every=2))
    with pytest.raises(ConfigError, match="run is not empty: choose another --out, or --resume its run"):
        train(config(target, texts, out))
    with pytest.raises(ConfigError, match="was begun with seed 0, not 1"):
        train(config(target, texts, out, save_every=2, resume=True, seed=1))
    with pytest.raises(ConfigError, match="was begun with settings"):
        train(config(target, texts, out, save_every=2, resume=True, settings={"num_heads": 2}))


def test_the_report_says_where_a_draft_comes_from(target: Path, texts: str, tmp_path: Path) -> None:
    report = train(config(target, texts, tmp_path / "out", max_steps=2))
    assert json.loads((tmp_path / "out" / "training.json").read_text()) == json.loads(json.dumps(report))
    assert report["num_steps"] == len(losses_of(tmp_path / "out")) == 2
    assert {"accelerate", "torch", "outpace"} <= report["versions"].keys()
    assert len(report["model_sha256"]) == len(report["data"]["sha256"]) == 64
    assert report["metrics"].keys() == {"loss", *(f"accuracy_{k}" for k in range(1, 5))}
    assert report["num_parameters"] == 4 * (64 * 64 + 64)


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


# --- Medusa ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simple(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers add nothing, so that a token follows from the one before: something to learn."""
    return write_model(tmp_path_factory.mktemp("simple"), exit_layer=0)


def engine_of(model: Path, **settings: Any) -> Engine:
    policy = {"spec_policy": "fixed"} if "spec_method" in settings else {}
    common: Any = {"dtype": "float32", "kernels": "reference", "max_model_len": 128, "num_threads": 1}
    return Engine.from_config(EngineConfig(model=str(model), **common, **policy, **settings))


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
        return train(config(simple, "own answers", out, batch_tokens=2048, lr=1e-2, **more))


@pytest.fixture(scope="module")
def chain(own_answers: Corpus, simple: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained heads with a tree that is a chain."""
    out = tmp_path_factory.mktemp("chain") / "medusa"
    trained_on(own_answers, simple, out, epochs=60, settings={"num_ranks": 1})
    return out


def served(simple: Path, draft: Path, corpus: Corpus, documents: range, num_nodes: int = 4) -> Engine:
    """An engine that has answered the prompts of some documents, and answered them as they are."""
    engine = engine_of(simple, spec_method="medusa", spec_model=str(draft), spec_tokens=num_nodes)
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
    trained_on(own_answers, simple, tmp_path / "new", max_steps=1, settings={"num_ranks": 1})
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
        hidden = trunk.hidden_states(ids, torch.arange(len(tokens))[None], zeros, (2,))[2][0]
        guesses = [
            trunk.head(
                hidden + F.silu(F.linear(hidden, weights[f"heads.{k}.weight"], weights[f"heads.{k}.bias"]))
            )
            for k in range(4)
        ]
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
    options: dict[str, Any] = {"epochs": 4}
    trained_on(own_answers, simple, tmp_path / "tree", **options)
    trained_on(own_answers, simple, tmp_path / "chain", settings={"num_ranks": 1}, **options)
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
    assert proposer._hidden == {}


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
        (lambda c: c["speculators_config"].update(algorithm="eagle3"), "holds a draft of 'eagle3', --spec-m"),
        (lambda c: c.pop("speculators_config"), "is no trained draft: .* outpace train medusa"),
        (lambda c: c["medusa"].update(num_heads=5), r"missing heads\.4\.bias, heads\.4\.weight"),
        (lambda c: c["medusa"].update(tree=[[0, 0]]), r"node \[0, 0\] of the tree .* after its parent"),
        (lambda c: c["medusa"].pop("tree"), "config.json has no 'tree' of medusa"),
    ],
)
def test_a_draft_that_does_not_fit_is_refused_in_words(
    change: Any, message: str, chain: Path, tmp_path: Path
) -> None:
    draft = edited(chain, tmp_path / "copy", change)
    with pytest.raises(ConfigError, match=message):
        tiny_engine(spec_method="medusa", spec_model=draft)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("nothing", {}, "method must be one of .*medusa"),
        ("medusa", {"heads": 2}, "medusa has no setting 'heads'; there are: num_heads"),
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


def test_a_draft_model_is_trained_saved_as_a_model_and_served(
    target: Path, texts: str, tmp_path: Path
) -> None:
    options = {"max_len": 64, "batch_tokens": 512, "holdout": 4, "dtype": "float32", "lr": 1e-2}
    out = tmp_path / "small"
    run = TrainConfig("draft_model", texts, out, str(target), {"num_layers": 1}, epochs=10, **options)  # type: ignore[arg-type]
    report = train(run)
    first, *_, last = losses_of(out)
    assert last < 0.5 * first
    small, whole = load_file(out / "model.safetensors"), load_file(target / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(small[name], whole[name])
    changed = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(small[changed], whole[changed])
    assert not any(name.startswith("model.layers.1.") for name in small)
    assert report["num_parameters"] == sum(small[n].numel() for n in small if "layers" in n or "norm" in n)
    engine = tiny_engine(spec_method="draft_model", spec_model=str(out))
    assert answers(engine, GREEDY) == answers(tiny_engine(), GREEDY)


def test_a_draft_model_is_smaller_than_its_target(target: Path, texts: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_layers of draft_model must be below the target's 2, got 2"):
        train(TrainConfig("draft_model", texts, tmp_path / "o", str(target), {"num_layers": 2}, max_len=64))


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


def test_evaluation_reports_what_the_engine_accepted(
    simple: Path, chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "data.jsonl", [row(chr(97 + i), "x") for i in range(6)])
    flags = ["--data", data, "--concurrency", "1", "4", "--spec-policy", "fixed", "--spec-tokens", "3"]
    flags += ["--max-tokens", "20", "--num-threads", "1", "--json", str(tmp_path / "out.json")]
    assert main(["evaluate", str(chain), *flags]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report == json.loads((tmp_path / "out.json").read_text())
    assert [result["concurrency"] for result in report["results"]] == [1, 4]
    for result in report["results"]:
        assert result["num_answers"] == result["num_same_answers"] == 6
        assert 1 <= result["tokens_per_step"] <= 4
        assert result["speed_up"] > 0
        by_depth = result["acceptance_by_depth"]
        assert result["acceptance_length"] == pytest.approx(1 + sum(by_depth))
        assert by_depth == sorted(by_depth, reverse=True)
    alone, beside = report["results"]
    assert alone["acceptance_by_depth"] == beside["acceptance_by_depth"]


def test_a_directory_that_names_no_target_needs_one_named(target: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not say which model it drafts for: name it with --model"):
        engine_configs(EvaluateConfig(target, "x"))
    plain, drafting = engine_configs(EvaluateConfig(target, "x", model="y", concurrency=(2,)))
    assert (plain.model, plain.max_num_seqs, drafting.spec_method) == ("y", 2, "draft_model")
