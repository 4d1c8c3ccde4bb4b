"""What a resumed training reads: copies of the data are the same, and another content is refused by name."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from dora_mm.cli import main
from dora_mm.train.state_file import read_state
from tests.shared.data.chats import messages, packed
from tests.shared.data.vlm_rows import write_images, write_questions
from tests.shared.killed import assert_same_weights, files_in
from tests.shared.vl.small_vl_bart import vl_bart

pytestmark = pytest.mark.slow


def goes_on(run: Path) -> None:
    assert main(["train", "--resume", str(run)]) == 0
    assert_same_weights("step-000004", run.with_name("whole"), run)


def test_images_of_a_tower(stopped, tmp_path, vision, capsys):
    (tmp_path / "pictures").mkdir()
    images = write_images(tmp_path / "pictures")
    run = stopped(**vl_bart(tmp_path, 72, vision, write_questions(tmp_path, images)))
    kept = shutil.copytree(images, tmp_path / "kept")
    for file in images.iterdir():
        ImageOps.invert(Image.open(file)).save(file)
    assert main(["train", "--resume", str(run)]) == 2
    assert f"{images}/" in (message := capsys.readouterr().err)
    assert "is not as it was when this run read it first: restore it" in message
    shutil.rmtree(images)
    shutil.copytree(kept, images, copy_function=shutil.copyfile)  # of another time
    goes_on(run)


def test_features(stopped, tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    images = write_images(tmp_path / "pictures")
    values = {file.stem: np.random.default_rng(n).normal(size=(4, 6)) for n, file in enumerate(images.iterdir())}

    def save(factor: int) -> None:
        (tmp_path / "features").mkdir(exist_ok=True)
        for name, array in values.items():
            np.savez(tmp_path / "features" / f"{name}.npz", features=(factor * array).astype(np.float32))

    save(1)
    vision = {"features": [str(tmp_path / "features")]}
    run = stopped(**vl_bart(tmp_path, 6, vision, write_questions(tmp_path, images)))
    save(2)
    assert main(["train", "--resume", str(run)]) == 2
    assert f"{tmp_path / 'features'}, the features of COCO_val" in capsys.readouterr().err
    save(1)
    goes_on(run)


def test_embedded_images_and_rows_of_the_validation(stopped, tmp_path, tiny_vlm, capsys):
    (tmp_path / "pictures").mkdir()
    images = [packed(file.read_bytes()) for file in sorted(write_images(tmp_path / "pictures").iterdir())]
    rows = [{"images": [each], "messages": messages("<image>What?", "noise")} for each in images]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "valid.json").write_text(json.dumps(rows[:2]))
    source = {"format": "chat", "file": str(tmp_path / "rows.json")}
    data = {"train": source, "valid": {**source, "file": str(tmp_path / "valid.json")}}
    run = stopped(model={"path": str(tiny_vlm("qwen2_5_vl"))}, data=data)

    (tmp_path / "valid.json").write_text(json.dumps(rows[1:3]))
    assert main(["train", "--resume", str(run)]) == 2
    assert "the validation data of chat changed since it was started" in capsys.readouterr().err
    (tmp_path / "valid.json").write_text(json.dumps(rows[:2]))

    copies = {file: file.read_bytes() for file in (tmp_path / "tables" / "images").iterdir()}
    for file, content in copies.items():
        file.write_bytes(content[:-20] + bytes(20))  # of the same size
    assert main(["train", "--resume", str(run)]) == 2
    assert "a copy of an embedded image, is damaged: delete it and start again" in capsys.readouterr().err
    for file in copies:
        file.unlink()
    goes_on(run)
    assert {file: file.read_bytes() for file in copies} == copies


def test_a_table_that_was_edited_is_made_again(stopped, tmp_path, tiny_vlm, caplog):
    """An edited word, and flipped bits all over it, at which a reader of Arrow would end the process."""
    (tmp_path / "pictures").mkdir()
    data = write_questions(tmp_path, write_images(tmp_path / "pictures"))
    run = stopped(model={"path": str(tiny_vlm("blip_vqa"))}, data=data)
    copy = shutil.copytree(run, tmp_path / "again")
    for table in (tmp_path / "tables").glob("*.arrow"):
        edited = table.read_bytes().replace(b"What", b"Whom")
        table.unlink()
        table.write_bytes(edited)
    goes_on(run)
    for table in (tmp_path / "tables").glob("*.arrow"):
        state, content = table.stat(), bytearray(table.read_bytes())
        content[40::64] = bytes(byte ^ 0xFF for byte in content[40::64])
        table.unlink()
        table.write_bytes(content)
        os.utime(table, ns=(state.st_atime_ns, state.st_mtime_ns))
    goes_on(copy)
    assert caplog.text.count("is damaged: the table is read again from its source") == 4


def test_a_run_goes_on_with_another_length_of_rows_where_none_that_it_read_is_cut_otherwise(
    tiny_vlm, stopped, tmp_path, capsys
):
    """As a run that had it from its start; a refused one leaves its files as they were."""
    write_images(tmp_path)
    model = {"path": str(tiny_vlm("llava")), "max_length": 60}
    run = stopped(model=model, data=write_questions(tmp_path, tmp_path), evaluate={"every": 1, "max_new_tokens": 2})
    longest = read_state(run / "checkpoints/step-000002/state.safetensors")["row counts"]["longest"]
    before = files_in(run)
    assert main(["train", "--resume", str(run), "--set", f"model.max_length={longest - 1}"]) == 2
    error = capsys.readouterr().err
    assert f"model.max_length cannot change from 60 to {longest - 1} tokens" in error
    assert {k: v for k, v in files_in(run).items() if k != ".lock"} == {k: v for k, v in before.items() if k != ".lock"}
    assert main(["train", "--resume", str(run), "--set", f"model.max_length={longest}"]) == 0
    assert_same_weights("step-000004", run.with_name("whole"), run)
