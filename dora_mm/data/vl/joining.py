"""Several tables as one: the rows of a training split that has several sources."""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa

from dora_mm.data.vl.arrow import SCHEMA
from dora_mm.data.vl.image_folder import image_path
from dora_mm.data.vl.tables import ExampleTable


def joined(parts: Sequence[tuple[ExampleTable, str | None]]) -> ExampleTable:
    """The rows of several tables as one, with the absolute paths of their images.

    Args:
        parts: The tables, each with the folder of its images; None: its rows have absolute paths, or none are read.

    Returns:
        The table. Ids of a table that an earlier one has, too, are followed by the number of their table, "7 (file 2)":
        rows with the same id are taken for one in scores and in files of predictions.
    """
    first = parts[0][0]
    if len(parts) == 1:
        return first
    sizes = [sum(batch.num_rows for batch in table.batches) for table, _ in parts]
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    names = "\n".join(table.identity for table, _ in parts)
    contents = "\n".join(table.content_identity for table, _ in parts)
    return ExampleTable(
        path=first.path.with_name(f"joined-{hashlib.blake2b(names.encode(), digest_size=16).hexdigest()}.arrow"),
        file=f"{first.file} and {len(parts) - 1} more",
        batches=_disambiguated([[*_located(table, folder)] for table, folder in parts]),
        rows=np.concatenate([table.rows + start for (table, _), start in zip(parts, starts, strict=True)]),
        on_bad_data=first.on_bad_data,
        skipped={
            reason: [marker for table, _ in parts for marker in table.skipped.get(reason, ())]
            for reason in dict.fromkeys(reason for table, _ in parts for reason in table.skipped)
        },
        origins=tuple((start, table.file) for (table, _), start in zip(parts, starts, strict=True)),
        unread={name: text for table, _ in parts for name, text in table.unread.items()},
        content=hashlib.blake2b(contents.encode(), digest_size=16).hexdigest(),
    )


def _disambiguated(parts: Sequence[Sequence[pa.RecordBatch]]) -> list[pa.RecordBatch]:
    """The record batches of several tables, with ids that differ from those of the tables before."""
    found, earlier = [], set[str]()
    for number, batches in enumerate(parts, 1):
        own: list[list[str]] = [batch["id"].to_pylist() for batch in batches]
        for batch, names in zip(batches, own, strict=True):
            ids = pa.array([f"{name} (file {number})" if name in earlier else name for name in names], pa.string())
            columns = [ids if name == "id" else batch[name] for name in SCHEMA.names]
            found.append(pa.RecordBatch.from_arrays(columns, schema=SCHEMA))
        earlier.update(*own)
    return found


def _located(table: ExampleTable, folder: str | None) -> Iterator[pa.RecordBatch]:
    """The record batches of a table with the absolute paths of its images."""
    paths: dict[str, str] = {}
    for batch in table.batches:
        images: Any = batch["images"]
        names: Any = images.flatten().dictionary_encode()
        distinct: list[str] = names.dictionary.to_pylist()
        for name in set(distinct) - paths.keys():
            path = table.image_paths.get(name, name)
            paths[name] = str(image_path(folder, path).absolute()) if folder else path
        found = pa.array([paths[name] for name in distinct], pa.string()).take(names.indices)
        offsets = pa.array([*accumulate(images.value_lengths().to_pylist(), initial=0)], pa.int32())
        moved = {"images": pa.ListArray.from_arrays(offsets, found)}
        yield pa.RecordBatch.from_arrays([moved.get(name, batch[name]) for name in SCHEMA.names], schema=SCHEMA)
