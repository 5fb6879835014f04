"""Faults of a judge: what was answered is kept, what failed does not count, and a rerun asks for nothing else."""

import os
import signal
import subprocess
import sys
import threading

import alpaca_judging
import pytest
from loopback_judge import KillAt, LoopbackJudge

from trl_steer.eval.alpaca_eval.client import MAX_CONSECUTIVE_FAILURES
from trl_steer.eval.alpaca_eval.journal import Journal


@pytest.fixture(scope="module")
def undisturbed(reference_folder, tmp_path_factory):
    """The result of a run in which nothing goes wrong."""
    import alpaca_rows

    outputs = alpaca_rows.write_outputs(
        tmp_path_factory.mktemp("undisturbed") / "model_outputs.json", alpaca_rows.outputs_for(reference_folder)
    )
    previous = os.environ.get("OPENAI_API_KEY")
    with LoopbackJudge() as server:
        alpaca_judging.judge(outputs, reference_folder, server.url)
    assert os.environ.get("OPENAI_API_KEY") == previous
    return alpaca_judging.numbers(alpaca_judging.result(outputs.parent))


def once_for(fault, *numbers):
    """The fault for the requests with these numbers, and for no other."""
    return lambda number, instruction: fault if number in numbers else None


@pytest.mark.parametrize("fault", ["500", "429", "timeout", "malformed", "hang_up", "no_logprobs", "chatter"])
def test_a_fault_that_passes_is_overcome_within_the_run(outputs, reference_folder, undisturbed, fault):
    with LoopbackJudge(once_for(fault, 3, 9)) as server:
        assert alpaca_judging.judge(outputs, reference_folder, server.url, "--timeout", "0.3") == 0
        assert server.requests == 26
        assert set(server.answered.values()) == {1}
    assert alpaca_judging.numbers(alpaca_judging.result(outputs.parent)) == undisturbed


@pytest.mark.parametrize("fault", ["500", "429", "timeout", "malformed", "no_logprobs", "chatter", "400"])
def test_rows_that_fail_do_not_count_and_a_rerun_asks_for_them_alone(
    outputs, reference_folder, undisturbed, fault, capsys
):
    # The package happens to ask for row 11 first. Without logprobs there, nothing more would be asked.
    rows = [4, 7] if fault == "no_logprobs" else [4, 11]
    lost = tuple(f"number {row}." for row in rows)
    broken = threading.Event()
    broken.set()

    def for_some_rows(number, instruction):
        return fault if broken.is_set() and instruction.endswith(lost) else None

    with LoopbackJudge(for_some_rows) as server:
        arguments = (outputs, reference_folder, server.url, "--retries", "1", "--timeout", "0.3")
        assert alpaca_judging.judge(*arguments) == 1
        found = alpaca_judging.result(outputs.parent)
        assert (found["n_total"], found["missing_rows"], found["complete"]) == (22, rows, False)
        assert {record["row"] for record in alpaca_judging.annotations(outputs.parent)} == set(range(24)) - set(rows)
        assert "2 rows without a judgement" in capsys.readouterr().err
        broken.clear()
        before = server.asked.copy()
        assert alpaca_judging.judge(*arguments) == 0
        again = server.asked - before
        assert sorted(again.values()) == [1, 1]
        assert all(instruction.endswith(lost) for instruction in again)
        assert set(server.answered.values()) == {1}
    assert alpaca_judging.numbers(alpaca_judging.result(outputs.parent)) == undisturbed


def test_rows_that_never_succeed_leave_the_result_of_the_others(outputs, reference_folder):
    with LoopbackJudge(lambda number, instruction: "400" if instruction.endswith("number 11.") else None) as server:
        for _ in range(2):
            assert alpaca_judging.judge(outputs, reference_folder, server.url) == 1
            found = alpaca_judging.result(outputs.parent)
            assert (found["n_total"], found["missing_rows"]) == (23, [11])
        assert set(server.answered.values()) == {1}


def test_a_storm_of_429_is_waited_out(outputs, reference_folder, undisturbed):
    with LoopbackJudge(lambda number, instruction: "429" if 5 <= number < 30 else None) as server:
        assert alpaca_judging.judge(outputs, reference_folder, server.url, "--retries", "20") == 0
        assert set(server.answered.values()) == {1}
    assert alpaca_judging.numbers(alpaca_judging.result(outputs.parent)) == undisturbed


def test_an_endpoint_that_breaks_down_is_given_up_on(outputs, reference_folder, undisturbed, capsys):
    with LoopbackJudge(lambda number, instruction: "500" if number >= 5 else None) as server:
        arguments = (outputs, reference_folder, server.url, "--in-flight", "1", "--retries", "0")
        assert alpaca_judging.judge(*arguments) == 1
        assert server.requests == 5 + MAX_CONSECUTIVE_FAILURES
        assert alpaca_judging.result(outputs.parent)["n_total"] == 5
        assert "Not sent, because of earlier failures" in capsys.readouterr().err
        server.fault = lambda number, instruction: None
        assert alpaca_judging.judge(*arguments) == 0
        assert set(server.answered.values()) == {1}
    assert alpaca_judging.numbers(alpaca_judging.result(outputs.parent)) == undisturbed


def test_a_refused_connection_is_said_after_one_call(outputs, reference_folder, capsys):
    with LoopbackJudge() as server:
        url = server.url
    assert alpaca_judging.judge(outputs, reference_folder, url, "--retries", "0") == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "failed. No connection to" in line


def test_a_judge_without_logprobs_is_said_after_one_row(outputs, reference_folder, capsys):
    with LoopbackJudge(lambda number, instruction: "no_logprobs") as server:
        assert alpaca_judging.judge(outputs, reference_folder, server.url) == 1
        assert server.requests == 1
    assert "no log-probabilities" in capsys.readouterr().err


def test_a_rejected_key_stops_the_run(outputs, reference_folder):
    with LoopbackJudge(lambda number, instruction: "rejected_key" if number >= 4 else None) as server:
        assert alpaca_judging.judge(outputs, reference_folder, server.url, "--in-flight", "2") == 1
        assert 5 <= server.requests <= 6
    assert alpaca_judging.result(outputs.parent)["n_total"] == 4


def test_killed_run_continues_without_repeating_requests(outputs, reference_folder, undisturbed):
    kill = KillAt(12)
    with LoopbackJudge(kill) as server:
        arguments = alpaca_judging.arguments(outputs, reference_folder, server.url, "--in-flight", "2")
        kill.process = subprocess.Popen([sys.executable, "-m", "trl_steer.cli", "alpaca-eval", *arguments])
        assert kill.process.wait(timeout=120) == -signal.SIGKILL
        (journal,) = (outputs.parent / "cache").rglob("answers.jsonl")
        written = len(Journal(journal).read())
        assert written >= 11
        assert not (outputs.parent / "judged" / "result.json").exists()
        before = server.asked.copy()
        assert alpaca_judging.judge(outputs, reference_folder, server.url) == 0
        assert sum((server.asked - before).values()) == 24 - written
        assert sum(count > 1 for count in server.asked.values()) <= 2  # those that were in flight
    assert alpaca_judging.numbers(alpaca_judging.result(outputs.parent)) == undisturbed


def test_a_line_that_was_cut_off_costs_only_itself(outputs, reference_folder, judge, undisturbed):
    alpaca_judging.judge(outputs, reference_folder, judge.url)
    (journal,) = (outputs.parent / "cache").rglob("answers.jsonl")
    journal.write_bytes(journal.read_bytes()[:-40])
    assert alpaca_judging.judge(outputs, reference_folder, judge.url) == 0
    assert sorted(judge.asked.values()) == [1] * 23 + [2]
    assert alpaca_judging.judge(outputs, reference_folder, judge.url) == 0
    assert judge.requests == 25
    assert alpaca_judging.numbers(alpaca_judging.result(outputs.parent)) == undisturbed


def test_two_processes_do_not_pay_twice(outputs, reference_folder, judge, capsys):
    from filelock import FileLock

    (outputs.parent / "judged").mkdir()
    with FileLock(outputs.parent / "judged" / ".lock"):
        assert alpaca_judging.judge(outputs, reference_folder, judge.url) == 1
    assert "in use by another process" in capsys.readouterr().err
    assert judge.requests == 0


def whole(**choice):
    """A completion, of which the choice is as given."""
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    message = {"role": "assistant", "content": "m"}
    choices = [{"index": 0, "finish_reason": "stop", "message": message, **choice}]
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": choices, "usage": usage}


@pytest.mark.parametrize("content", [None, [], [{"token": "m", "logprob": -0.1, "bytes": None, "top_logprobs": []}]])
def test_a_frame_for_logprobs_with_nothing_in_it_is_said_after_one_row(outputs, reference_folder, content, capsys):
    with LoopbackJudge(lambda number, instruction: whole(logprobs={"content": content})) as server:
        assert alpaca_judging.judge(outputs, reference_folder, server.url) == 1
        assert server.requests == 1
    assert "no log-probabilities" in capsys.readouterr().err


@pytest.mark.parametrize("logprobs", [True, {"content": 3}, {"content": "m"}, {"content": [None]}, {"content": ["m"]}])
def test_logprobs_of_another_form_cost_one_answer_and_not_the_run(outputs, reference_folder, undisturbed, logprobs):
    with LoopbackJudge(once_for(whole(logprobs=logprobs), 3, 9)) as server:
        assert alpaca_judging.judge(outputs, reference_folder, server.url) == 0
        assert server.requests == 26
    assert alpaca_judging.numbers(alpaca_judging.result(outputs.parent)) == undisturbed


@pytest.mark.parametrize("fault", ["hang_up", "no_logprobs", "403"])
def test_a_row_that_never_succeeds_does_not_keep_others_from_another_try(outputs, reference_folder, fault):
    broken = threading.Event()
    broken.set()

    def for_some_rows(number, instruction):
        lost = "number 4." if not broken.is_set() else ("number 4.", "number 7.")
        return fault if instruction.endswith(lost) else None

    with LoopbackJudge(for_some_rows) as server:
        arguments = (outputs, reference_folder, server.url, "--retries", "0")
        assert alpaca_judging.judge(*arguments) == 1
        assert alpaca_judging.result(outputs.parent)["missing_rows"] == [4, 7]
        broken.clear()
        assert alpaca_judging.judge(*arguments) == 1
        assert alpaca_judging.result(outputs.parent)["missing_rows"] == [4]
        assert set((+server.answered).values()) == {1}


def test_a_draw_counts_as_one_with_judges_that_write_it_as_zero(outputs, reference_folder):
    def scores(number, instruction):
        draw = "number 5." in instruction
        return whole(message={"role": "assistant", "content": "5 5" if draw else "8 3"}, logprobs=None)

    with LoopbackJudge(scores) as server:
        assert alpaca_judging.judge(outputs, reference_folder, server.url, "--judge", "lmsys_gpt4") == 0
    preferences = {row["row"]: row["preference"] for row in alpaca_judging.annotations(outputs.parent)}
    assert preferences.pop(5) == 1.5
    assert set(preferences.values()) <= {1.0, 2.0}


def test_interrupted_run_sends_no_more_requests_or_retries(outputs, reference_folder):
    with LoopbackJudge(lambda number, instruction: "500" if number >= 6 else None) as server:
        arguments = alpaca_judging.arguments(outputs, reference_folder, server.url, "--retries", "60")
        # A shell starts what runs in its background, tests perhaps, without an ear for interrupts.
        run = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        run += "from trl_steer.eval.alpaca_eval import cli; sys.exit(cli.main(sys.argv[1:]))"
        command = [sys.executable, "-c", run, *arguments]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while server.requests < 12:
            assert process.poll() is None
            server.stopping.wait(0.02)
        process.send_signal(signal.SIGINT)
        _, shown = process.communicate(timeout=60)
        assert process.returncode == 130
        assert (
            "Interrupted. The judge's answers are kept. Run the same command again to request the missing ones."
            in shown
        )
        assert "Traceback" not in shown
        before = server.requests
        server.stopping.wait(0.5)
        assert server.requests == before < 200


@pytest.mark.parametrize("body", [b"<html>a page</html>", b"null", {"id": "x", "choices": []}])
def test_answer_that_is_not_a_completion_is_reported(outputs, reference_folder, body, capsys):
    with LoopbackJudge(lambda number, instruction: body) as server:
        assert alpaca_judging.judge(outputs, reference_folder, server.url) == 1
    assert "does not answer with a completion of OpenAI's API" in capsys.readouterr().err


def test_text_that_no_file_can_hold_costs_one_answer_and_not_the_run(outputs, reference_folder, undisturbed):
    broken = whole(message={"role": "assistant", "content": "\ud83d"}, logprobs=None)
    with LoopbackJudge(once_for(broken, 3)) as server:
        assert alpaca_judging.judge(outputs, reference_folder, server.url) == 0
        assert server.requests == 25
    assert alpaca_judging.numbers(alpaca_judging.result(outputs.parent)) == undisturbed


def test_a_full_disk_ends_the_run_and_what_was_written_counts(outputs, reference_folder, judge, undisturbed):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); import signal; "
    limit += "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    run = "import sys; from trl_steer.eval.alpaca_eval import cli; sys.exit(cli.main(sys.argv[1:]))"
    arguments = alpaca_judging.arguments(outputs, reference_folder, judge.url, "--in-flight", "1")
    ran = subprocess.run([sys.executable, "-c", limit + run, *arguments], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 2
    assert "[Errno" in ran.stderr
    assert "Traceback" not in ran.stderr
    (journal,) = (outputs.parent / "cache").rglob("answers.jsonl")
    written = len(Journal(journal).read())
    assert 0 < written < 24
    before = judge.requests
    assert before == written + 1  # the answer that did not fit, and no other after it
    assert alpaca_judging.judge(outputs, reference_folder, judge.url) == 0
    assert judge.requests - before == 24 - written
    assert alpaca_judging.numbers(alpaca_judging.result(outputs.parent)) == undisturbed
