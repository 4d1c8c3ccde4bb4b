"""Answering whole splits."""

import torch

from dora_mm.config.vl import DecodeConfig
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.splits import ValidationSet
from dora_mm.models.vl_bart.answering import Answerer
from dora_mm.sampling.answers import answer_all
from tests.models.vl_bart.small import small_inputs, small_tokenizer, small_vl_bart


def test_predictions_keep_the_order_and_the_batches_do_not_matter():
    features = torch.randn(7, 1, 49, 8)
    decode = Answerer(small_vl_bart(), small_tokenizer(), "vqa", DecodeConfig())

    def answer(examples, images):
        assert images == "folder"
        found = small_inputs([example.text for example in examples])
        return decode(found._replace(visual_features=torch.stack([features[int(each.id)] for each in examples])))

    table = [Example(str(i), (f"{i}.jpg",), "is there a red cat?" if i % 2 else "bus?") for i in range(7)]
    split = ValidationSet(table, "folder")  # type: ignore[arg-type]

    def predict(batch_size, limit=None):
        return answer_all({"vqa": answer}, [], {"vqa": split}, batch_size, limit)["vqa"]

    at_once, batched = predict(7), predict(3)
    assert [example.id for example, _ in at_once] == [str(i) for i in range(7)]
    assert at_once == batched
    assert predict(64, 2) == at_once[:2]
