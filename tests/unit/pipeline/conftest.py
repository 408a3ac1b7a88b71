"""What the tests of the pipeline share."""

from pathlib import Path

import pytest
from byte_model import write_byte_model


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory) -> Path:
    """The folder of a tiny model (see ``tests/byte_model.py``)."""
    return write_byte_model(tmp_path_factory.mktemp("byte_model"))
