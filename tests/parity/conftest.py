"""The official numbers and the model of a case; a test with these fixtures is parametrised by `path`."""

import pytest

from tests.parity.families import official_model
from tests.parity.golden import Golden


@pytest.fixture
def golden(path):
    return Golden(path).variant(None)


@pytest.fixture
def model(golden):
    return official_model(golden)
