"""Evaluations of transformers' vision-language models."""

import base64
import json

import yaml

from dora_mm.cli import main
from tests.models.vlm.vlm_rows import write_pictures


def test_the_page_shows_images_that_rows_contain_or_name_in_full(tiny_vlm, tmp_path):
    picture = write_pictures(tmp_path) / "wide.png"
    embedded = base64.b64encode(picture.read_bytes()).decode()
    rows = [
        {"image": image, "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "noise"}]}
        for image in (str(picture), embedded)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    config = {
        "pipeline": "eval_vl",
        "model": {"path": str(tiny_vlm("llava"))},
        "data": {"valid": {"format": "chat", "file": str(tmp_path / "rows.json")}, "tables": str(tmp_path / "tables")},
        "decode": {"max_new_tokens": 1},
        "output": str(tmp_path / "run"),
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["eval", str(tmp_path / "config.yaml")]) == 0
    assert (tmp_path / "run" / "examples.html").read_text().count("data:image/") == 2
