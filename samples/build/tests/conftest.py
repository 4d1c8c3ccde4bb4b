"""The small models and icons of the library's own tests."""

from tests.conftest import new_accelerator, picture_folder, seeded, tiny, tiny_folder  # noqa: F401
from tests.eval.images.conftest import concepts, encoder, features, icons, judge, learned  # noqa: F401
