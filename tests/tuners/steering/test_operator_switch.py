"""The switch between the two forms of the low-rank operator."""

import pytest

from trl_steer.tuners.steering.ops.switch import OPERATORS, steering_operator


@pytest.fixture(autouse=True)
def default_form():
    """Every test starts with the default, whatever the one before has switched."""
    with steering_operator(OPERATORS[0]):
        yield


def test_automatic_choice_is_the_default():
    assert OPERATORS[0] == "auto" == steering_operator.current()


def test_switch_stays_until_the_next():
    steering_operator("plain")
    assert steering_operator.current() == "plain"
    steering_operator("memory_efficient")
    assert steering_operator.current() == "memory_efficient"


def test_context_restores_when_nested_and_after_an_exception():
    with steering_operator("plain"):
        with steering_operator("memory_efficient"):
            assert steering_operator.current() == "memory_efficient"
        assert steering_operator.current() == "plain"
        with pytest.raises(KeyError), steering_operator("memory_efficient"):
            raise KeyError
        assert steering_operator.current() == "plain"
    assert steering_operator.current() == "auto"


def test_context_can_be_entered_again():
    plain = steering_operator("plain")
    for _ in range(2):
        with plain:
            assert steering_operator.current() == "plain"
        assert steering_operator.current() == "auto"


def test_unknown_operator_is_named_along_with_those_that_exist_and_changes_nothing():
    with pytest.raises(ValueError, match=r"'fused'.*'auto', 'triton', 'memory_efficient', 'plain'"):
        steering_operator("fused")
    assert steering_operator.current() == "auto"
