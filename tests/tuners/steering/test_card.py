"""The model card of an adapter says what it is and how to load it, whoever saves it."""

import pytest
import yaml
from model_zoo import tiny_model
from peft import get_peft_model, inject_adapter_in_model
from trl_cases import make_trainer

from trl_steer import JointSteeringConfig, JolaConfig, LofitConfig, PostBlockSteeringConfig, SublayerSteeringConfig
from trl_steer.tuners.joint_steering import split_adapter

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


def text_of(folder) -> str:
    return (folder / "README.md").read_text()


def metadata(folder) -> dict:
    return yaml.safe_load(text_of(folder).split("---")[1])


def saved(config, folder, name=BASE):
    model = get_peft_model(tiny_model(), config)
    config.base_model_name_or_path = name
    model.save_pretrained(folder)
    return model


def assert_useful(folder):
    text = text_of(folder)
    assert "[More Information Needed]" not in text
    assert "None" not in text
    assert str(folder) not in text
    assert "pip install trl-steer" in text
    assert "PeftModel.from_pretrained" in text
    assert "2603.00425" in text


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            PostBlockSteeringConfig(r=3, activation="silu"),
            ["post_block", "| rank | 3 |", "| activation | silu |", "576"],
        ),
        (PostBlockSteeringConfig(steering_type="vector"), ["| update | vector |", "| parameters | 96 |"]),
        (
            SublayerSteeringConfig(site="pre_mlp", layers_to_transform=[0, 2]),
            ["| site | pre_mlp |", "| blocks | 0, 2 |"],
        ),
        (
            LofitConfig(phase="scale", heads={0: [1], 1: [0, 3]}),
            ["| update | scale |", "| heads | 3 |", "| site | heads |"],
        ),
        (JolaConfig(), ["| site | heads |", "| penalty | exponential, 0.1 |", "| parameters | 216 |"]),
        (JointSteeringConfig(r=4, steering={"r": 2}), ["| LoRA: rank | 4 |", "| steering: rank | 2 |"]),
    ],
    ids=["low rank", "vector", "sublayer", "lofit", "jola", "joint"],
)
def test_card_says_method_site_rank_parameters_and_base(config, said, tmp_path):
    saved(config, tmp_path)
    assert_useful(tmp_path)
    for line in [*said, f"https://huggingface.co/{BASE}", f'from_pretrained("{BASE}")']:
        assert line in text_of(tmp_path)
    assert metadata(tmp_path)["base_model"] == BASE
    assert metadata(tmp_path)["library_name"] == "peft"
    method = config.peft_type.value.lower().replace("_", "-")
    assert {"trl-steer", "activation-steering", method} <= set(metadata(tmp_path)["tags"])


def test_folder_of_the_base_on_this_machine_is_not_told(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    saved(PostBlockSteeringConfig(), tmp_path / "adapter", str(tmp_path / "base"))
    assert_useful(tmp_path / "adapter")
    assert str(tmp_path) not in text_of(tmp_path / "adapter")
    assert "base_model" not in metadata(tmp_path / "adapter")


def test_users_text_in_the_card_stays_and_saving_again_adds_nothing(tmp_path):
    model = saved(PostBlockSteeringConfig(r=3), tmp_path)
    path = tmp_path / "README.md"
    path.write_text(path.read_text() + "\nTrained on my own poems.\n")
    for _ in range(2):
        model.save_pretrained(tmp_path)
    assert text_of(tmp_path).count("Trained on my own poems.") == 1
    assert text_of(tmp_path).count("## Use") == 1


def test_every_way_to_save_writes_the_card(tmp_path):
    trainer = make_trainer(
        "sft", tmp_path / "trainer", peft_config=PostBlockSteeringConfig(r=3), max_steps=1, bf16=False
    )
    trainer.train()
    trainer.save_model()
    assert_useful(tmp_path / "trainer")
    model = inject_adapter_in_model(PostBlockSteeringConfig(r=3, task_type="CAUSAL_LM"), tiny_model())
    model._hf_peft_config_loaded = True  # what transformers' own `add_adapter` sets
    model.save_pretrained(tmp_path / "transformers")
    assert_useful(tmp_path / "transformers")


def test_a_configuration_saved_without_weights_leaves_readmes_alone(tmp_path):
    (tmp_path / "README.md").write_text("# My project\n")
    PostBlockSteeringConfig(r=3).save_pretrained(str(tmp_path))
    assert (tmp_path / "README.md").read_text() == "# My project\n"


def test_a_readme_that_is_no_model_card_is_kept(tmp_path):
    text = "---\ntitle: my: project\n---\n# My project\n"
    (tmp_path / "README.md").write_text(text)
    config = PostBlockSteeringConfig(r=3)
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.warns(UserWarning, match="not a model card"):
        config.save_pretrained(str(tmp_path))
    assert (tmp_path / "README.md").read_text() == text


def test_halves_of_a_joint_adapter_have_cards(tmp_path):
    saved(JointSteeringConfig(r=4, steering={"r": 3}, task_type="CAUSAL_LM"), tmp_path / "joint")
    split_adapter(tmp_path / "joint", tmp_path / "lora", tmp_path / "steering")
    assert_useful(tmp_path / "steering")
    assert "| parameters | 576 |" in text_of(tmp_path / "steering")
    assert "[More Information Needed]" not in text_of(tmp_path / "lora")
    assert metadata(tmp_path / "lora")["base_model"] == BASE
