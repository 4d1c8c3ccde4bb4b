"""Several processes of torchrun answer the questions of one evaluation, and are killed: the files of one process."""

import pytest

from tests.pipelines.files.test_merge import vlm_adapter
from tests.pipelines.images.test_sample import content
from tests.pipelines.images.test_shared import python
from tests.pipelines.vl.test_eval_vlm import config  # noqa: F401
from tests.shared.data.vlm_rows import write_images

pytestmark = pytest.mark.slow


def test_shared_answers_end_with_the_files_of_one_process(config, tiny_vlm, tmp_path):  # noqa: F811
    images = [str(image) for image in sorted(write_images(tmp_path).glob("*.png"))] * 16
    (tmp_path / "broken.png").write_bytes(b"no image")
    path = config([*images, str(tmp_path / "broken.png")], max_new_tokens=12, batch_size=3)
    adapter = vlm_adapter(tiny_vlm("llava"), tmp_path / "adapter")
    changes = [f"adapter={adapter}", "data.on_bad_data=skip"]
    done = python(tmp_path, "tests.pipelines.vl.shared_answers", 8, path, *changes)
    assert done.returncode == 0, done.stderr[-5000:]
    assert "scores.json" in content(tmp_path / "whole")
    assert content(tmp_path / "shared") == content(tmp_path / "whole")
    (between,) = [int(line) for line in done.stdout.splitlines() if line.isdecimal()]
    assert between > 4
