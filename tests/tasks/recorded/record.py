"""Records what SmolLM2-135M-Instruct writes for the six tasks: plain, in its chat template, and steered.

    TRL_STEER_HUB_MIRROR=HUB python tests/tasks/recorded/record.py [base] [chat] [steered]

writes `<task>.jsonl` beside this file: 21 test rows with each of the models, other rows for each. The steered model is
trained first, on 30 short rows of each task, which is enough to know the form of the answers. All of it takes ten
minutes on two cores.

A new text has no label. Labels are written by hand, from the text alone, before any reader has seen it: the answer
that a careful reader finds in it, in the spelling of the task, or null. Where a text gives several, the last one
counts; where it breaks off in the middle, there is none. A label is kept as long as its text stays the same. Where
`flexible` is known to read something else, the row has that as `read`, and the reason as `why`.
"""

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

# The mirror's training rows: BoolQ's with their passages, and AQuA's.
os.environ["TRL_STEER_DATASETS"] = json.dumps(
    {"boolq": {"config": "boolq_offline"}, "aqua": {"config": "raw_offline"}}
)

import torch
from datasets import Dataset, interleave_datasets
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from trl_steer import PostBlockSteeringConfig
from trl_steer.eval.models import resolve
from trl_steer.tasks import SIX, load_task

HERE = Path(__file__).parent
MODELS = ("base", "chat", "steered")
ROWS = 21
TRAINED_ROWS, TRAINED_LENGTH = 30, 400  # of each task; characters
# Shorter than the tasks' own bounds, where these leave room for rambling.
BOUNDS = {"boolq": 32, "winogrande": 32, "arc_challenge": 64, "gsm8k": 200, "aqua": 200, "listops": 32}


def main(names: Sequence[str]) -> None:
    checkpoint = resolve("embedded")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for name in names:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        if name == "steered":
            model = steered(model, tokenizer)
        first = ROWS * MODELS.index(name)
        for task, texts in generate(model, tokenizer, range(first, first + ROWS), chat=name == "chat"):
            write(task, name, [{"model": name, "row": f"test/{row}", "text": text} for row, text in texts.items()])


def write(task: str, model: str, rows: list[dict]) -> None:
    path = HERE / f"{task}.jsonl"
    known = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    labelled = {(row["row"], row["text"]): row for row in known if row["model"] == model}
    rows = [labelled.get((row["row"], row["text"]), row) for row in rows]
    rows += [row for row in known if row["model"] != model]
    rows.sort(key=lambda row: MODELS.index(row["model"]))
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def steered(model, tokenizer):
    """The model with a steering adapter, trained on a few short rows of all tasks in turn."""
    parts = []
    for task in SIX:
        rows = load_task(task.name)["train"]
        short = [row for row in rows if len(row["prompt"] + row["completion"]) < TRAINED_LENGTH]
        parts.append(Dataset.from_list(short[:TRAINED_ROWS]))
    config = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        num_train_epochs=1,
        per_device_train_batch_size=3,
        learning_rate=5e-3,
        train_sampling_strategy="sequential",
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_steps=10,
    )
    peft_config = PostBlockSteeringConfig(task_type="CAUSAL_LM", r=8)
    dataset = interleave_datasets(parts)
    trainer = SFTTrainer(model, config, train_dataset=dataset, processing_class=tokenizer, peft_config=peft_config)
    trainer.train()
    return trainer.model.eval()


def generate(model, tokenizer, rows: range, chat: bool):
    """Yields each task's name with the texts by number of the test row, as the task's stop strings leave them."""
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=7, device="cpu")
    manager = TaskManager(include_path=str(files("trl_steer.eval") / "tasks"), include_defaults=False)
    for task in SIX:
        name = f"steer_{task.name}"
        found = simple_evaluate(
            lm,
            tasks=[name],
            samples={name: list(rows)},
            gen_kwargs={"max_gen_toks": BOUNDS[task.name]},
            apply_chat_template=chat,
            task_manager=manager,
            bootstrap_iters=0,
        )
        yield task.name, {sample["doc_id"]: sample["resps"][0][0] for sample in found["samples"][name]}


if __name__ == "__main__":
    main(sys.argv[1:] or MODELS)
