"""TRL gives vLLM merged weights, so post-block low rank cannot be served that way, and says so.

vLLM itself is not needed: TRL calls `merge_adapter()`, sends what it finds under the names of the base model, and
calls `unmerge_adapter()`.
"""

import importlib.util

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_chat import tiny_model
from trl_cases import STEERING, make_trainer, snapshot, trained_peft_model

from trl_steer import PostBlockSteeringConfig


def weights_for_vllm(model: PeftModel) -> dict[str, torch.Tensor]:
    """Merged weights under the names of the base model, which is left as it was."""
    model.merge_adapter()
    sent = {
        name.removeprefix("base_model.model."): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if model.prefix not in name
    }
    model.unmerge_adapter()
    return sent


def test_low_rank_is_refused_with_the_reason_and_the_way_out():
    model = trained_peft_model("low_rank")
    before = snapshot(model)
    with pytest.raises(ValueError, match="cannot be merged") as caught:
        weights_for_vllm(model)
    message = str(caught.value)
    assert "multiplies the residual stream" in message  # why
    assert "use_vllm=True" in message  # what was asked for
    assert "use_vllm=False" in message  # what to do instead
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_vector_on_blocks_without_bias_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match="has no bias") as caught:
        weights_for_vllm(trained_peft_model("vector"))
    assert "mlp_bias=True" in str(caught.value)


def test_vector_on_blocks_with_bias_reaches_vllm_under_the_names_of_the_base_model():
    base = tiny_model(mlp_bias=True)
    names = {name for name, _ in base.named_parameters()}
    model = get_peft_model(base, PostBlockSteeringConfig(steering_type="vector", init_weights=False))
    before = snapshot(model)
    sent = weights_for_vllm(model)
    assert set(sent) == names

    ids = torch.arange(1, 13)[None]
    served = tiny_model(mlp_bias=True, seed=1)
    served.load_state_dict(sent)
    with torch.no_grad():
        torch.testing.assert_close(served(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
        with model.disable_adapter():
            assert not torch.allclose(served(ids).logits, model(ids).logits, atol=1e-4)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
@pytest.mark.parametrize("steering_type", STEERING)
def test_without_vllm_the_trainer_fails_with_trls_own_message(steering_type, tmp_path):
    config = PostBlockSteeringConfig(task_type="CAUSAL_LM", **STEERING[steering_type])
    with pytest.raises(ImportError, match="vLLM is not available"):
        make_trainer("grpo", tmp_path, peft_config=config, use_vllm=True)
