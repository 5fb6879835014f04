"""Prompt, completion and answer of each task, to the byte, on written rows and on every real one."""

import doctest
import sys

import pytest
import task_rows

from trl_steer.tasks import SIX, TASKS, get_task

BENCHMARKS = [task.name for task in SIX]

CASES = {
    "boolq": (
        {"passage": "Ice floats.\nIt is less dense.", "question": "does ice float", "answer": True},
        "Answer the question with a true/false based on the given passage.\n"
        "Passage: Ice floats.\nIt is less dense.\nQuestion: does ice float\n",
        "Answer: True.",
        "True",
    ),
    "winogrande": (
        {"sentence": "Ada thanked Ben as _ had helped.", "option1": "Ada", "option2": "Ben", "answer": "2"},
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        "Ada thanked Ben as _ had helped.\nOption1: Ada\nOption2: Ben\n",
        "Answer: Option2.",
        "Option2",
    ),
    "arc_challenge": (
        {
            "question": "Which is a metal?",
            "choices": {"text": ["iron", "wood", "glass"], "label": ["A", "B", "C"]},
            "answerKey": "A",
        },
        "Answer the following multiple-choice question.\nQuestion: Which is a metal?\n(A) iron\n(B) wood\n(C) glass\n",
        "Answer: (A) iron.",
        "A",
    ),
    "gsm8k": (
        {"question": "What is 2 times 600?", "answer": "It is 2*600 = <<2*600=1200>>1200.\n#### 1,200"},
        "What is 2 times 600?\n",
        "It is 2*600 = <<2*600=1200>>1200.\nAnswer: 1,200",
        "1200",
    ),
    "aqua": (
        {
            "question": "What is half of 6?",
            "options": ["A)1", "B) 2", "C)3 ", "D)4", "E)None of these"],
            "rationale": "6/2 = 3.\nAnswer: C\n",
            "correct": "C",
        },
        "Answer the following multiple-choice math question.\n"
        "Question: What is half of 6?\n(A) 1\n(B) 2\n(C) 3\n(D) 4\n(E) None of these\n",
        "6/2 = 3.\nAnswer: C\nAnswer: C.",
        "C",
    ),
    "listops": (
        {"Source": "[MIN 2 9 [MAX 4 7 ] 0 ]", "Target": 0},
        "Evaluate the value of the following nested list expression.\n"
        "Return only the final numeric result inside <answer>...</answer>.\n\n"
        "Expression:\n[MIN 2 9 [MAX 4 7 ] 0 ]\n",
        "<answer>0</answer>",
        "0",
    ),
}


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_prompt_and_completion_are_the_papers_to_the_byte(benchmark):
    row, prompt, completion, answer = CASES[benchmark]
    task = get_task(benchmark)
    assert task.prompt(row) == prompt
    assert task.completion(row) == completion
    assert task.answer(row) == answer
    assert task.strict(completion) == task.flexible(completion) == answer


def test_digit_labels_stay_digits():
    row = {"question": "?", "choices": {"text": ["one", "two"], "label": ["1", "2"]}, "answerKey": "2"}
    task = get_task("arc_challenge")
    assert task.prompt(row).endswith("(1) one\n(2) two\n")
    assert task.completion(row) == "Answer: (2) two."
    assert task.strict(task.completion(row)) == task.flexible(task.completion(row)) == task.answer(row) == "2"


@pytest.mark.parametrize("name", TASKS)
def test_example_in_each_task_module_equals_the_output_of_its_code(name):
    module = sys.modules[TASKS[name].prompt.__module__]
    assert ">>> row = " in module.__doc__
    assert doctest.testmod(module).failed == 0


def test_gsm8k_solution_without_an_answer_mark_is_an_error_that_shows_it():
    with pytest.raises(ValueError, match=r"####.*no mark here"):
        get_task("gsm8k").completion({"question": "?", "answer": "no mark here"})


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_conversational_form_is_one_message_each_with_the_same_text(benchmark):
    row, prompt, completion, _ = CASES[benchmark]
    assert get_task(benchmark).example(row, conversational=True) == {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": completion}],
    }


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_documents_options_are_beginnings_of_the_completion_for_the_right_one_alone(benchmark):
    task = get_task(benchmark)
    for row in task_rows.rows_of(benchmark):
        document = task.document(row)
        assert task.strict(document["completion"]) == task.flexible(document["completion"]) == document["answer"]
        if task.choices is None:
            assert "choices" not in document
            continue
        right = document["choices"][document["label"]]
        answer_line = document["completion"].splitlines()[-1]
        assert [choice for choice in document["choices"] if answer_line.startswith(choice)] == [right]


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_prompt_ends_and_completion_begins_so_that_no_tokenizer_merges_across(benchmark):
    task = get_task(benchmark)
    for row in task_rows.rows_of(benchmark):
        assert task.prompt(row).endswith("\n")
        assert task.completion(row) == task.completion(row).strip()


def test_unknown_task_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match=r"no task 'booq'.*boolq, winogrande"):
        get_task("booq")


@pytest.mark.parametrize(
    ("benchmark", "configs"),
    [
        ("boolq", [None, "boolq_offline"]),
        ("winogrande", ["winogrande_debiased", "winogrande_xl", "winogrande_offline"]),
        ("arc_challenge", ["ARC-Challenge", "ARC-Easy"]),
        ("gsm8k", ["main"]),
        ("aqua", ["raw", "raw_offline"]),
        ("listops", [None]),
    ],
)
def test_answer_is_read_from_the_completion_of_every_real_row(mirror, benchmark, configs):
    task = TASKS[benchmark]
    for config in configs:
        published = task.read(task.source["dataset_path"], config)
        for name, rows in published.items():
            for read in (task.strict, task.flexible):
                wrong = [row for row in rows if read(task.completion(row)) != task.answer(row)]
                assert not wrong, (config, name, len(wrong), wrong[0])
