"""The reason of a refusal is found in what reaches the server from the engine."""

import pytest

from trl_steer.integrations.vllm.refusal import AdapterRefusedError, reason_in


@pytest.mark.parametrize(
    "message",
    [
        "Call to add_lora method failed: {}",
        "Call to add_lora method failed: Worker failed with error '{}', please check the stack trace above for the "
        "root cause",
    ],
)
def test_reason_is_what_was_said_first(message):
    reason = "It has 'quotes', two\nlines and: colons."
    assert reason_in(message.format(AdapterRefusedError(reason))) == reason


def test_other_errors_have_no_such_reason():
    assert reason_in("Call to add_lora method failed: CUDA out of memory") is None
