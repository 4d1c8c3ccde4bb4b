"""An adapter file that many tests start from."""

import pytest

from tests.shared import toy


@pytest.fixture
def source(tmp_path):
    return toy.write_source(tmp_path / "source.safetensors", {n: toy.state_of(n, i) for i, n in enumerate(toy.SHAPES)})
