"""`outpace bench serve` against a small OpenAI server that misbehaves on demand."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_openai import TEXTS, FakeServer

from outpace import cli
from outpace.bench import client, report, workload
from outpace.bench.client import Answer, Endpoint, Run
from outpace.bench.workload import Closed, Open, Phase, Phased, Query
from outpace.errors import ConfigError


@pytest.fixture
def server() -> Iterator[tuple[FakeServer, str]]:
    fake, loop = FakeServer(), asyncio.new_event_loop()
    listening = loop.run_until_complete(asyncio.start_server(fake.handle, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield fake, f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    asyncio.run_coroutine_threadsafe(close(listening), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


async def close(listening: asyncio.Server) -> None:
    listening.close()
    handlers = asyncio.all_tasks() - {asyncio.current_task()}
    for handler in handlers:
        handler.cancel()
    await asyncio.gather(*handlers, return_exceptions=True)


def queries(*texts: str) -> list[Query]:
    return [Query(({"role": "user", "content": text},), 5, seed) for seed, text in enumerate(texts)]


def send(url: str, *texts: str, load: workload.Load = Closed(1), timeout_s: float = 5, **options: Any) -> Run:  # noqa: B008
    return client.run(Endpoint(url, "fake", **options), queries(*texts), load, timeout_s)


# --- Answers --------------------------------------------------------------------------------------------


def test_an_answer_has_the_servers_counts_and_times_in_order(server: tuple[FakeServer, str]) -> None:
    (answer,) = send(server[1], "hi").answers
    assert answer.error is None
    assert (answer.prompt_tokens, answer.output_tokens, answer.has_usage) == (7, 5, True)
    assert len(answer.chunks_s) == len(TEXTS), "the empty first delta is no text"
    times = [0.0, answer.due_s, answer.sent_s, *answer.chunks_s, answer.end_s]
    assert times == sorted(times)
    assert answer.tpot_s == (answer.end_s - answer.chunks_s[0]) / 4
    assert len(answer.itl_s) == len(TEXTS) - 1


def test_without_usage_chunks_are_counted_and_the_summary_says_so(server: tuple[FakeServer, str]) -> None:
    run = send(server[1], "uncounted")
    assert run.answers[0].output_tokens == len(TEXTS)
    summary = report.summarise(run, (), None)
    assert summary["tokens_are"] == "chunks"
    assert summary["client_cpu_share"] > 0
    assert summary["prompt_tokens"] is None
    both = report.summarise(send(server[1], "uncounted", "hi"), (), None)
    assert both["tokens_are"].startswith("partly")


def test_a_slow_first_token_shows_in_the_ttft_and_not_in_the_tpot(server: tuple[FakeServer, str]) -> None:
    (slow,) = send(server[1], "slow").answers
    assert slow.ttft_s >= 0.15
    assert slow.tpot_s is not None
    assert slow.ttft_s + 4 * slow.tpot_s == pytest.approx(slow.e2e_s)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("busy", "HTTP 429 Too Many Requests: the queue is full"),
        ("sick", "the engine died"),
        ("nonsense", "no event of an answer: {not json"),
        ("unfinished", "the stream ended before the answer did"),
        ("broken", "the stream ended before the answer did|connection lost"),
    ],
)
def test_what_goes_wrong_is_counted_by_its_reason(
    server: tuple[FakeServer, str], text: str, error: str
) -> None:
    summary = report.summarise(send(server[1], "hi", text, text), (), None)
    assert (summary["num_requests"], summary["num_completed"], summary["num_failed"]) == (3, 1, 2)
    assert sum(summary["errors"].values()) == 2
    assert all(any(part in reason for part in error.split("|")) for reason in summary["errors"])
    assert summary["output_tokens"] == 5, "tokens of failed answers do not count"


def test_a_server_that_never_ends_is_given_up(server: tuple[FakeServer, str]) -> None:
    (answer,) = send(server[1], "hang", timeout_s=0.05).answers
    assert answer.error == "no complete answer after 0.05 s"
    assert answer.e2e_s >= 0.05


def test_a_closed_port_is_an_error_of_each_request() -> None:
    run = send("http://127.0.0.1:9", "hi", "hi")
    assert [answer.error is None for answer in run.answers] == [False, False]


def test_completions_send_the_text_and_extra_fields_overrule(server: tuple[FakeServer, str]) -> None:
    fake, url = server
    run = send(f"{url}/v1/", "hi", kind="completions", ignore_eos=True, extra_body={"top_k": 1, "seed": 9})
    assert run.answers[0].error is None
    assert fake.paths == ["/v1/completions"]
    (body,) = fake.bodies
    assert (body["prompt"], body["ignore_eos"], body["top_k"], body["seed"]) == ("hi", True, 1, 9)
    assert (body["max_tokens"], body["stream"]) == (5, True)


# --- Loads ----------------------------------------------------------------------------------------------


def test_a_closed_loop_sends_every_query_once_and_never_more_at_a_time(
    server: tuple[FakeServer, str],
) -> None:
    fake, url = server
    run = send(url, *["hi"] * 9, load=Closed(3))
    assert sorted(answer.index for answer in run.answers) == list(range(9))
    assert fake.most_open <= 3


def test_an_open_loop_does_not_wait_for_answers(server: tuple[FakeServer, str]) -> None:
    run = send(server[1], "slow", "hi", load=Open((0.0, 0.01)))
    assert [answer.index for answer in run.answers] == [1, 0]
    by_index = {answer.index: answer for answer in run.answers}
    assert by_index[1].due_s == pytest.approx(0.01)
    assert by_index[1].sent_s >= by_index[1].due_s


def test_phases_change_the_number_of_clients_and_begin_the_queries_anew(
    server: tuple[FakeServer, str],
) -> None:
    load = Phased((Phase(1, 0.1), Phase(4, 0.2), Phase(1, 0.1)))
    run = send(server[1], "hi", "hi", load=load)
    assert {answer.index for answer in run.answers} == {0, 1}
    assert len(run.answers) > 2

    def under_way(time_s: float) -> int:
        return sum(answer.sent_s <= time_s < answer.end_s for answer in run.answers)

    first = [under_way(t / 1000) for t in range(0, 100)]
    second = [under_way(t / 1000) for t in range(110, 290)]
    assert max(first) <= 1
    assert 1 < max(second) <= 4
    parts = report.phase_throughput(run, load)
    assert [part["concurrency"] for part in parts] == [1, 4, 1]
    total = sum(part["output_throughput"] * part["seconds"] for part in parts)
    late = sum(a.output_tokens * sum(c >= 0.4 for c in a.chunks_s) / len(a.chunks_s) for a in run.answers)
    assert total + late == pytest.approx(sum(answer.output_tokens for answer in run.answers))


# --- The command ----------------------------------------------------------------------------------------


def bench(url: str, *arguments: str) -> int:
    return cli.main(["bench", "serve", "--base-url", url, *arguments])


def test_the_last_line_is_json_and_the_file_has_each_request(
    server: tuple[FakeServer, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "result.json"
    flags = ["--max-concurrency", "2", "--num-prompts", "6", "--num-warmups", "2", "--goodput", "ttft:5000"]
    assert bench(server[1], *flags, "--seed", "3", "--api-key", "hidden", "--json", str(out)) == 0
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert "TTFT" in printed
    assert (result["num_completed"], result["goodput_share"], result["model"]) == (6, 1.0, "fake")
    assert {"command", "commit", "versions", "hardware", "seed"} <= result.keys()
    drafts = result["speculation"]
    assert (drafts["drafts"], drafts["mean_acceptance_length"]) == (6, 3.0), "warm-ups are not counted"
    assert drafts["acceptance_per_position"] == [1.0, 1.0]
    written = json.loads(out.read_text())
    assert len(written["requests"]) == 6
    assert written["windows"]
    assert "hidden" not in out.read_text()


def test_a_run_without_any_answer_fails_and_says_why(
    server: tuple[FakeServer, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = tmp_path / "busy.jsonl"
    dataset.write_text('{"prompt": "busy"}\n')
    assert bench(server[1], "--request-rate", "inf", "--num-prompts", "2", "--dataset", str(dataset)) == 1
    printed = capsys.readouterr()
    assert "FAILED 2 times: HTTP 429" in printed.out
    result = json.loads(printed.out.splitlines()[-1])
    assert (result["num_failed"], result["settings"]["request_rate"]) == (2, "inf")
    assert "no request was answered" in printed.err


def test_a_trace_gives_arrivals_and_lengths_of_answers(
    server: tuple[FakeServer, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.csv.gz"
    with gzip.open(trace, "wt") as file:
        file.write("timestamp_s,prompt_tokens,output_tokens\n5.0,10,3\n6.0,10,4\n50.0,10,5\n")
    assert bench(server[1], "--trace", str(trace), "--trace-speed", "100", "--duration", "0.1") == 0
    assert [body["max_tokens"] for body in server[0].bodies] == [3, 4]
    capsys.readouterr()


def test_phases_take_the_whole_dataset(
    server: tuple[FakeServer, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(server[1], "--phases", "8:0.3s,1:0.1s", "--output-len", "2") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [phase["concurrency"] for phase in result["phases"]] == [8, 1]
    assert len({body["messages"][-1]["content"] for body in server[0].bodies}) == len(workload.PROMPTS)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-concurrency", "0"], "must be an integer of at least 1, got '0'"),
        (["--request-rate", "nan"], "must be a number above 0, got 'nan'"),
        (["--max-concurrency", "1", "--timeout", "inf"], "must be a number above 0, got 'inf'"),
        (["--max-concurrency", "1", "--extra-body", "[]"], "must be a JSON object, got '[]'"),
        (["--max-concurrency", "1", "--request-rate", "2"], "not allowed with argument"),
        ([], "one of the arguments --max-concurrency --request-rate --trace --phases is required"),
        (["--max-concurrency", "1", "--duration", "5"], "--duration goes with --request-rate or --trace"),
        (["--max-concurrency", "1", "--trace-speed", "2"], "--trace-speed goes with --trace"),
        (["--max-concurrency", "1", "--burstiness", "2"], "--burstiness goes with --request-rate"),
        (["--max-concurrency", "1", "--goodput", "speed:5"], "--goodput takes each of ttft, tpot, e2el"),
        (["--max-concurrency", "1", "--dataset", "/no/such"], "cannot read the dataset /no/such"),
        (["--request-rate", "inf", "--duration", "5"], "a rate of inf needs --num-prompts"),
        (["--phases", "4:60s,x"], "a phase is CLIENTS:SECONDS, as 4:60s, both above 0; got 'x'"),
    ],
)
def test_bad_flags_are_one_line_and_code_2(
    server: tuple[FakeServer, str], flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = bench(server[1], *flags)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    assert code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("url", ["ftp://x", "127.0.0.1:8000", "http://", "http://x:port"])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="--base-url must be like"):
        client.root_url(url)


def test_a_server_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("http://127.0.0.1:9", "--max-concurrency", "1") == 2
    assert "cannot reach http://127.0.0.1:9/v1/models" in capsys.readouterr().err


# --- Datasets, arrivals, traces -------------------------------------------------------------------------


def dataset(tmp_path: Path, *rows: Any) -> list[workload.Messages]:
    file = tmp_path / "rows.jsonl.gz"
    with gzip.open(file, "wt", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)
    return workload.read_dataset(file)


def test_every_shape_of_row_gives_a_conversation_that_ends_with_the_user(tmp_path: Path) -> None:
    user, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    rows = [
        {"messages": [user, answer]},
        {"messages": [user, answer, user]},
        {"turns": ["q", "later"]},
        {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"},
                           {"from": "gpt", "value": "a"}]},
        {"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "q"}]},
        {"prompt": "q"},
    ]  # fmt: skip
    system = {"role": "system", "content": "s"}
    expected = [(user,), (user, answer, user), (user,), (system, user), (user,), (user,)]
    assert dataset(tmp_path, *rows) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "q"}, "line 1 has none of messages, turns, conversations, prompt; it has text"),
        ({"prompt": 5}, "line 1 cannot be read as a prompt"),
        ({"turns": []}, "line 1 cannot be read as a prompt"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "line 1 cannot be read as a prompt"),
        ({"conversations": [{"from": "nobody", "value": "a"}]}, "line 1 cannot be read as a prompt"),
        (5, "line 1 cannot be read as a prompt"),
    ],
)
def test_a_row_that_is_no_prompt_is_named(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataset(tmp_path, row)


def test_prompts_that_are_too_long_are_left_out_and_at_least_one_must_stay(tmp_path: Path) -> None:
    read = dataset(tmp_path, {"prompt": "short"}, {"prompt": "much longer"}, {"turns": ["fits"]})
    assert workload.up_to(read, 5) == [read[0], read[2]]
    with pytest.raises(ConfigError, match="leaves no prompt: the shortest has 4 characters"):
        workload.up_to(read, 3)


def test_an_empty_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no rows"):
        dataset(tmp_path)


def test_choices_are_seeded_go_on_where_others_ended_and_repeat_late() -> None:
    rows: list[workload.Messages] = [({"role": "user", "content": str(i)},) for i in range(10)]
    ten = workload.choose(rows, 10, seed=1)
    assert workload.choose(rows, 10, seed=1) == ten
    assert workload.choose(rows, 10, seed=2) != ten
    assert sorted(ten, key=str) == rows
    assert workload.choose(rows, 4, seed=1, skip=3) == ten[3:7]
    assert workload.choose(rows, 4, seed=1, skip=8) == ten[8:] + ten[:2]
    made = workload.make_queries(rows, [5, 6], seed=1, skip=3)
    assert [(q.messages, q.output_len, q.seed) for q in made] == [(ten[3], 5, 4), (ten[4], 6, 5)]


@pytest.mark.parametrize("burstiness", [0.5, 1.0, 4.0])
def test_gaps_have_the_rates_mean_and_the_burstiness_variance(burstiness: float) -> None:
    number, rate = 40_000, 5.0
    arrivals = workload.poisson(rate, number, seed=0, burstiness=burstiness).arrivals_s
    gaps = [later - earlier for earlier, later in zip((0.0, *arrivals), arrivals, strict=False)]
    mean = sum(gaps) / number
    variance = sum((gap - mean) ** 2 for gap in gaps) / number
    # 5 standard errors of the mean; the variance's relative error is about sqrt((2 + 6 / shape) / n) < 2 %.
    assert mean == pytest.approx(1 / rate, abs=5 * (1 / rate) / (burstiness * number) ** 0.5)
    assert variance == pytest.approx(1 / rate**2 / burstiness, rel=0.1)
    assert workload.poisson(rate, 3, seed=0) == workload.poisson(rate, 3, seed=0)
    within = workload.poisson(rate, None, 0, burstiness, duration_s=100)
    assert within.arrivals_s == tuple(t for t in arrivals if t <= 100)
    assert workload.poisson(float("inf"), 3, seed=0).arrivals_s == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("time,tokens\n1,2\n", "no column timestamp_s, prompt_tokens, output_tokens"),
        ("timestamp_s,prompt_tokens,output_tokens\n", "has no rows"),
        ("timestamp_s,prompt_tokens,output_tokens\n1,2\n", "line 2: three numbers were expected"),
        ("timestamp_s,prompt_tokens,output_tokens\n2,2,2\n1,2,2\n", "line 3: times must not decrease"),
    ],
)
def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        workload.read_trace(file)


def test_phases_are_read_with_and_without_the_unit() -> None:
    assert workload.parse_phases("4:60s,32:0.5") == Phased((Phase(4, 60), Phase(32, 0.5)))
    assert workload.parse_phases("4:60s,32:0.5").seconds == 60.5
    for text in ("", "0:5s", "4:0s", "4", "4:60m"):
        with pytest.raises(ConfigError, match="a phase is"):
            workload.parse_phases(text)


# --- Statistics -----------------------------------------------------------------------------------------


def answer(sent: float, chunks: tuple[float, ...], tokens: int, error: str | None = None) -> Answer:
    return Answer(0, sent, sent, chunks, chunks[-1] if chunks else sent, 10, tokens, True, error)


def test_distributions_and_spreads_are_those_of_small_samples() -> None:
    assert report.distribution([]) is None
    assert report.distribution([1, 2, 3, 4, 5]) == {"mean": 3, "p50": 3, "p90": 4.6, "p99": 4.96}
    assert report.spread([4, 1, 3, 2, 5]) == {"median": 3, "q1": 2, "q3": 4, "min": 1, "max": 5, "n": 5}
    assert report.spread([]) is None
    assert report.geometric_mean([1, 4]) == pytest.approx(2)
    assert report.geometric_mean([]) == 1


def test_a_summary_of_known_answers() -> None:
    run = Run((answer(0, (1.0, 3.0), 5), answer(1, (2.0, 4.0), 1), answer(0, (), 0, "lost")), 0.0, 4.0)
    goals = report.parse_goals(["ttft:1000", "tpot:500", "e2el:2999"])
    summary = report.summarise(run, goals, None)
    assert (summary["num_completed"], summary["num_failed"], summary["errors"]) == (2, 1, {"lost": 1})
    assert summary["output_throughput"] == 6 / 4
    assert summary["total_throughput"] == 26 / 4
    assert summary["ttft_ms"]["mean"] == 1000
    assert summary["tpot_ms"]["mean"] == 500, "an answer of one token has none"
    assert summary["itl_ms"]["p50"] == 2000
    assert summary["goodput"] == 0, "both end after 2,999 ms"
    relaxed = report.summarise(run, report.parse_goals(["tpot:500"]), None)
    assert relaxed["goodput"] == 2 / 4
    assert relaxed["goodput_share"] == 2 / 3, "failed requests are not good"


def test_windows_add_up_to_the_tokens_and_the_time_under_way() -> None:
    run = Run((answer(0.5, (1.2, 2.7), 4), answer(0.0, (0.1,), 3)), 0.0, 2.7)
    parts = report.windows(run, 1.0)
    assert [part["output_throughput"] for part in parts] == [3, 2, 2]
    assert [part["running"] for part in parts] == pytest.approx([0.6, 1.0, 0.7])


def test_speculation_is_the_difference_of_two_scrapes_and_none_without_drafts() -> None:
    text = "vllm:spec_decode_num_{}_total 4\n"
    before = report.parse_drafts(text.format("drafts"))
    assert before is not None
    assert report.speculation(before, before) is None
    assert report.speculation(None, before) is None
    assert report.parse_drafts("up 1\n") is None
    after = report.parse_drafts(
        "outpace:spec_decode_num_drafts_total 8\noutpace:spec_decode_num_draft_tokens_total 12\n"
        "outpace:spec_decode_num_accepted_tokens_total 6\n"
        'outpace:spec_decode_num_accepted_tokens_per_pos_total{position="0"} 4\n'
    )
    assert report.speculation(before, after) == {
        "drafts": 4,
        "draft_tokens": 12,
        "accepted_tokens": 6,
        "acceptance_rate": 0.5,
        "mean_acceptance_length": 2.5,
        "acceptance_per_position": [1.0],
    }
