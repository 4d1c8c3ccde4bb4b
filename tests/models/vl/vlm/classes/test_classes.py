"""What is equal of every class that trains, and the table of docs/vlm_classes.md."""

import re

import pytest
import transformers
from packaging.version import Version
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from tests.documented.vlm_classes import (
    ALIASES,
    CLASSES,
    HEAD,
    PAGE,
    clock_calls,
    clock_readers,
    row_of,
    takes_videos,
)
from tests.shared.data.vlm_rows import write_images
from tests.shared.vl.equalities import learned_parts

FAST = ("qwen2_5_vl", "paligemma", "florence2")  # the slow test below has all of them


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("classes")


@pytest.mark.parametrize("name", FAST)
def test_what_an_adapter_computes_is_what_autograd_batches_merging_and_peft_do(name, tiny_vlm, tmp_path):
    images = tmp_path / "pictures"
    images.mkdir()
    assert learned_parts(tiny_vlm(name), write_images(images), tmp_path / "adapter")


@pytest.mark.slow
@pytest.mark.parametrize("kind", CLASSES)
def test_the_table_of_classes_is_what_the_tiny_models_do(kind, folder):
    assert row_of(kind, folder) in PAGE.read_text(encoding="utf-8").splitlines()


def test_no_processor_reads_a_clock(tmp_path):
    """Dates come from chat templates alone; the look is shown to see what it looks for."""
    assert clock_readers() == []
    calls = ("datetime.now()", "datetime.date.today()", "time.time()", "time.strftime('%d')", "time.gmtime()")
    others = ("time.gmtime(3)", "time.strftime('%d', then)", "datetime.strptime(text, form)")
    (tmp_path / "processing.py").write_text("\n".join([*others, *calls]))
    assert [call.split(": ")[1] for call in clock_calls(tmp_path / "processing.py")] == [*calls]


def test_the_table_names_all_classes_and_the_pages_count_those_that_train():
    page = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(.*?)` \| `(.*?)` \| (yes|no) \|", page, re.M)
    listed = {kind: name for kind, name, _ in rows}
    (version,) = re.findall(r"that transformers (\S+) has", page)
    if Version(transformers.__version__) == Version(version):
        assert listed == dict(CLASSES)
    else:  # an older transformers lacks some, and a newer one has more
        assert listed.items() >= {kind: name for kind, name in CLASSES.items() if kind in listed}.items()
    assert ALIASES.keys() <= CLASSES.keys()
    assert MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items() <= CLASSES.items()
    assert {"Phi4MultimodalForCausalLM", "BlipForQuestionAnswering"} <= set(CLASSES.values())
    count = sum(trains == "yes" for _, _, trains in rows)
    videos = sum(map(takes_videos, page.splitlines()))
    assert page.startswith(HEAD.format(total=len(rows), version=version, count=count, videos=videos))
    models = (PAGE.parent / "vlm.md").read_text(encoding="utf-8")
    assert f"[{videos} of the classes]" in (PAGE.parent / "vlm_data.md").read_text(encoding="utf-8")
    first = models.split("\n\n")[1].split(". ")[0]
    assert f"{count} of its {len(rows)} kinds" in " ".join(first.split())
