"""Generate, judge, report and submit, with a real small model on real prompts, from the command line alone."""

import json
import subprocess
import sys

import alpaca_judging
import alpaca_rows
import pytest

from trl_steer.eval.alpaca_eval.reference import BASELINE
from trl_steer.eval.models import EMBEDDED, resolve

PROMPTS = [
    "What is the capital of Australia, and why is it not Sydney?",
    "Write a two-sentence bedtime story about a lighthouse.",
    "Explain to a ten-year-old why the sky is blue.",
    "List three ways to save water at home.",
    "Turn this into a polite e-mail: I need the report today.",
    "How do I boil an egg so that the yolk stays soft?",
    "Give me a haiku about autumn.",
    "What is the difference between weather and climate?",
    "Suggest a name for a bakery run by twins.",
    "Write a Python function that reverses a list without using slices.",
    "Summarize the plot of Romeo and Juliet in one sentence.",
    "Which is heavier, a kilogram of feathers or a kilogram of iron?",
    "Plan a day in Rome for someone who dislikes crowds.",
    "Translate into French: Where is the nearest train station?",
    "What should I think about before adopting a cat?",
    "Explain recursion with an example from everyday life.",
    "Write a short complaint about a late delivery.",
    "Name four instruments of a string quartet and what each does.",
    "How can I fall asleep more easily?",
    "Is it true that we use only ten percent of our brain?",
    "Write a limerick about a programmer.",
    "What are the main causes of the First World War?",
    "Give step-by-step instructions for repotting a houseplant.",
    "How would you compare tea with coffee?",
]


def trl_steer(*arguments: str) -> str:
    command = [sys.executable, "-m", "trl_steer.cli", "alpaca-eval", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.slow
def test_a_real_model_from_its_first_token_to_a_submission(tmp_path, judge):
    reference = alpaca_rows.write_reference(tmp_path / "reference", len(PROMPTS))
    rows = json.loads((reference / BASELINE).read_text())
    rows = [{**row, "instruction": prompt} for row, prompt in zip(rows, PROMPTS, strict=True)]
    (reference / BASELINE).write_text(json.dumps(rows))
    run, shared = tmp_path / "SmolLM2-135M", ["--reference", str(reference)]
    size = ["--max-new-tokens", "48", "--batch-size", "8", "--device", "cpu"]
    trl_steer("generate", "--model", resolve(EMBEDDED), "--output", str(run), *shared, *size)
    outputs = json.loads((run / "model_outputs.json").read_text())
    assert [row["instruction"] for row in outputs] == PROMPTS
    assert "Canberra" in outputs[0]["output"]
    trl_steer(*alpaca_judging.arguments(run / "model_outputs.json", reference, judge.url))
    assert judge.requests == len(PROMPTS)
    found = alpaca_judging.result(run)
    assert (found["n_total"], found["complete"], found["comparable"]) == (len(PROMPTS), True, False)
    table = trl_steer("report", str(run), "--paper")
    assert f"| {found['length_controlled_winrate']:.2f} | {found['lc_standard_error']:.2f} |" in table
    trl_steer("submit", str(run / "judged"), "--output", str(tmp_path / "sent"), "--not-comparable", *shared)
    assert (tmp_path / "sent" / "leaderboard_row.csv").is_file()
