"""What training sees: conversations as tokens, packed rows, the trunk and its hidden states, the loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from checkpoints import VARIANTS, write_checkpoint
from outpace.errors import ConfigError
from outpace.models.tokenizer import load_tokenizer
from outpace.training import losses
from outpace.training.data import (
    BadLineError,
    Corpus,
    collate,
    encode_conversation,
    epoch_order,
    load_corpus,
    pack,
)
from outpace.training.hidden import HiddenStates
from outpace.training.losses import head_loss
from outpace.training.method import Recipe
from outpace.training.trainer import lr_share
from outpace.training.trunk import Trunk
from tiny import ASSISTANT, EOS, GREEDY, MODEL, USER, byte_tokenizer, tiny_engine, write_model
from training_runs import row, write_rows


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of `tiny_engine`."""
    return write_model(tmp_path_factory.mktemp("target"))


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
    loss, best = head_loss(hidden, head, targets, weights)
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
    alone = HiddenStates(trunk, corpus, (2,), tmp_path).attach(collate(corpus, rows), rows)
    assert torch.equal(alone.hidden[2], again.hidden[2]), "who needs fewer layers finds them"


def test_the_learning_rate_rises_then_falls_to_nothing() -> None:
    cosine = [lr_share(step, 100, Recipe(1.0)) for step in range(100)]
    assert cosine[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert cosine[10] == 1.0
    assert cosine[55] == pytest.approx(0.5)
    assert sorted(cosine[10:], reverse=True) == cosine[10:]
    assert lr_share(60, 110, Recipe(1.0, 10 / 110, "linear")) == pytest.approx(0.5)
