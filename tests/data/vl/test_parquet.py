"""Parquet files whose pages, texts and lists hold more than any real file of their size."""

import mmap

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dora_mm.data.vl.readers import parquet
from dora_mm.data.vl.readers.file_rows import file_items

LONG = "a" * 2**20
ROWS = [
    {"id": n, "system": "You help. " * 30, "turns": [{"role": "user", "text": f"What is {n % 7}?"}] * (n % 4)}
    for n in range(5000)
]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(parquet, "LEAST_BYTES", 2**24)
    monkeypatch.setattr(parquet, "LEAST_VALUES", 2**16)


def shared(count: int) -> pa.Array:
    """One text of a megabyte, so many times."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array([LONG]))


@pytest.mark.parametrize(
    ("column", "options", "reason"),
    [
        (shared(500), {"dictionary_pagesize_limit": 2**30}, "64 of its rows"),
        (pa.ListArray.from_arrays([0, 500], shared(500)), {"dictionary_pagesize_limit": 2**30}, "1 of its rows"),
        (pa.array([LONG * 20]), {"use_dictionary": False}, "row group 0"),
        (pa.ListArray.from_arrays([0, 10**6], pa.nulls(10**6, pa.int32())), {}, "1,000,000 values"),
        (pa.ListArray.from_arrays([0, 60_000], pa.nulls(60_000, pa.struct({"a": pa.int8()}))), {}, None),
    ],
    ids=["a shared text", "a shared text in a list", "a page", "a list", "a list that is not too long"],
)
def test_small_files_of_large_rows_are_one_sentence(tmp_path, column, options, reason):
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"a": column}), file, compression="zstd", **options)
    assert file.stat().st_size < 20_000
    if reason:
        with pytest.raises(ValueError, match=rf"rows\.parquet: .*{reason}"):
            list(file_items(file))
    else:
        assert len(list(file_items(file))) == 1


def test_a_row_group_may_unpack_to_more_than_its_pages_may(tmp_path):
    """pyarrow says of a column only what all its pages unpack to, by which real files would be refused."""
    file = tmp_path / "rows.parquet"
    texts = [f"{number} " + "a" * 20_000 for number in range(1500)]
    options = {"use_dictionary": False, "write_batch_size": 64}
    pq.write_table(pa.table({"a": texts}), file, compression="zstd", **options)
    assert pq.ParquetFile(file).metadata.row_group(0).total_byte_size > parquet.most_bytes(file)
    assert [row["a"] for _, row in file_items(file)] == texts


def test_rows_of_arrow_files_that_share_a_text(tmp_path):
    file = tmp_path / "rows.arrow"
    table = pa.table({"a": shared(500)})
    with pa.OSFile(str(file), "wb") as opened, pa.ipc.new_stream(opened, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(ValueError, match=r"rows\.arrow: 64 of its rows would take more than"):
        list(file_items(file))


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_pages_are_those_that_pyarrow_wrote(tmp_path, version, compression):
    file = tmp_path / "rows.parquet"
    options = {"write_page_checksum": True, "data_page_size": 2000, "row_group_size": 2000}
    pq.write_table(pa.Table.from_pylist(ROWS), file, compression=compression, data_page_version=version, **options)
    assert [row for _, row in file_items(file)] == ROWS
    opened = pq.ParquetFile(file)
    with file.open("rb") as binary, mmap.mmap(binary.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for group in range(opened.num_row_groups):
            for place in range(opened.metadata.num_columns):
                chunk = opened.metadata.row_group(group).column(place)
                found = parquet._column(file, opened, group, place, content, 64)
                assert (found.values, found.nested) == (chunk.num_values, "turns" in found.path)
                assert found.shared > 0 or chunk.physical_type != "BYTE_ARRAY"


def test_shared_texts_of_real_rows_are_read(tmp_path, monkeypatch):
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), file)
    monkeypatch.setattr(parquet, "LEAST_BYTES", 200_000)  # 64 rows have some 50,000, all of them 4 million
    checked = []
    monkeypatch.setattr(parquet, "check_weight", lambda *arguments: checked.append(arguments))
    assert [row for _, row in file_items(file)] == ROWS
    assert len(checked) == -(-len(ROWS) // 64)


def test_pages_that_are_damaged(tmp_path):
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), file)
    content = bytearray(file.read_bytes())
    content[4:40] = b"\xff" * 36
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"rows\.parquet is damaged: row group 0 has no pages of id there"):
        list(file_items(file))
