import pytest

from trl_steer import steering_operator


@pytest.fixture
def default_operator():
    """The test starts with the default, whatever the one before has switched."""
    with steering_operator("auto"):
        yield
