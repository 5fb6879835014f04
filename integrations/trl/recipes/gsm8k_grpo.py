"""GRPO on GSM8K with a steering adapter, by TRL's `GRPOTrainer`.

    accelerate launch gsm8k_grpo.py --config gsm8k_grpo.yaml

takes all arguments of [`~trl.GRPOConfig`] and [`~trl.ModelConfig`], and those of [`RecipeArguments`]. The rewards are
those of the authors' code, 1 for the format and 2 for the right answer, with the format of our task: the last line is
`Answer: <number>`, which `steer_gsm8k` scores too.
"""

from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, ModelConfig, TrlParser, get_quantization_config

from trl_steer import DivergenceCallback, PostBlockSteeringConfig
from trl_steer.tasks import BENCHMARKS

GSM8K = BENCHMARKS["gsm8k"]
# The prompts of the task do not name the format, which GRPO could only find by chance.
FORMAT = "Solve the problem step by step. End with a line `Answer: <number>`."


@dataclass
class RecipeArguments:
    """The arguments of the recipe in addition to TRL's."""

    steering_r: int = field(default=8, metadata={"help": "Rank of steering."})
    steering_activation: str | None = field(default="silu", metadata={"help": "Activation of steering, or none."})
    steering_init_scale: float = field(default=1e-3, metadata={"help": "Scale of the initial `W_down`."})
    init_from: str | None = field(default=None, metadata={"help": "Folder of a steering adapter to start from."})


def prompts(split: str = "train") -> Dataset:
    """GSM8K as GRPO reads it: `prompt`, a list of messages, and `answer`, the number in its canonical form."""
    rows = GSM8K.rows()[split]
    return rows.map(
        lambda row: {
            "prompt": [
                {"role": "system", "content": FORMAT},
                {"role": "user", "content": GSM8K.prompt(row).strip()},
            ],
            "answer": GSM8K.answer(row),
        },
        remove_columns=rows.column_names,
    )


def format_reward(completions: list[list[dict[str, str]]], **kwargs) -> list[float | None]:
    """1 if the completion has the line with the answer, else 0."""
    return [float(GSM8K.strict(completion[0]["content"]) is not None) for completion in completions]


def accuracy_reward(completions: list[list[dict[str, str]]], answer: list[str], **kwargs) -> list[float | None]:
    """1 if the number in the line with the answer, or else the last number, is correct, else 0."""
    found = [GSM8K.flexible(completion[0]["content"]) for completion in completions]
    return [float(number == correct) for number, correct in zip(found, answer, strict=True)]


def main() -> None:
    arguments: list[Any] = [RecipeArguments, GRPOConfig, ModelConfig]
    recipe, training, model = TrlParser(arguments).parse_args_and_config()
    training.model_init_kwargs = {"dtype": model.dtype, **(training.model_init_kwargs or {})}
    trainer = GRPOTrainer(
        model=model.model_name_or_path,
        args=training,
        train_dataset=prompts(),
        reward_funcs=[format_reward, accuracy_reward],
        quantization_config=get_quantization_config(model),
        peft_config=PostBlockSteeringConfig(
            r=recipe.steering_r,
            activation=recipe.steering_activation,
            init_scale=recipe.steering_init_scale,
            init_from=recipe.init_from,
            task_type="CAUSAL_LM",
        ),
        callbacks=[DivergenceCallback()],
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(training.output_dir)


if __name__ == "__main__":
    main()
