"""Which methods are compared, in which pairs and rows."""

from dora_mm.studies.variants import Variant, contrasts, table_rows, variants


def test_variants_and_contrasts():
    found = variants((1, 4, 8))
    assert [variant.key for variant in found] == [
        "full",
        "lora-r1",
        "lora-r4",
        "lora-r8",
        "dora-r1",
        "dora-r2",
        "dora-r4",
        "dora-r8",
    ]
    pairs = contrasts((1, 8), variants((1, 8)))
    assert (Variant("dora", 4), Variant("lora", 8)) in pairs
    assert all(variant in variants((1, 8)) for pair in pairs for variant in pair)
    assert not any(first.rank == 0 for first, _ in pairs)


def test_full_fine_tuning_can_be_left_out():
    found = variants((8,), full=False)
    assert [str(variant) for variant in found] == ["LoRA, rank 8", "DoRA, rank 4", "DoRA, rank 8"]
    assert [name for name, _ in table_rows((8,), found)] == ["LoRA, rank 8", "DoRA, rank 8", "DoRA, half of rank 8"]
    assert all(variant in found for pair in contrasts((8,), found) for variant in pair)


def test_half_ranks_can_be_left_out():
    found = variants((8,), full=False, half=False)
    assert [str(variant) for variant in found] == ["LoRA, rank 8", "DoRA, rank 8"]
    assert contrasts((8,), found) == [(Variant("dora", 8), Variant("lora", 8))]
