"""One checkpoint of the authors' layout for all tests, and what becomes of it."""

import pytest
from released_checkpoints import write

from vreflection_training.cli import main


@pytest.fixture(scope="session")
def released(tmp_path_factory):
    """A checkpoint of the authors' layout with both modules; to be left as it is."""
    folder = tmp_path_factory.mktemp("released")
    write(folder)
    return folder


@pytest.fixture(scope="session")
def converted(released, tmp_path_factory):
    """What becomes of it."""
    out = tmp_path_factory.mktemp("converted") / "out"
    assert main(["convert", str(released), str(out)]) == 0
    return out
