"""Fixtures of the library's tests that are used here: the small models and the icons."""

from tests.conftest import new_accelerator, seeded, tiny, tiny_folder  # noqa: F401
from tests.eval.images.conftest import concepts, icons  # noqa: F401
