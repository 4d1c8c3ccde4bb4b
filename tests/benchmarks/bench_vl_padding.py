"""How much of a batch is padding, with rows in random order and with rows of about the same length together.

    python -m tests.benchmarks.bench_vl_padding

Lengths are drawn as those of LLaVA-1.5's mixture of 665,000 rows: each part has its number of rows, the median and the
spread of its tokens of text, and one image but for the conversations of text alone. Rows are grouped by what is known
without a look at their images: characters, of which a token has 4 with a spread of 12 %.
"""

import numpy as np

from dora_mm.data.vl.mixing import TaskBatches
from dora_mm.data.vl.report import IMAGE

LIMIT = 2048  # tokens of a row
ROWS = 60_000
PARTS = (  # thousands of rows, median of text tokens, spread of their logarithm, images
    (158, 250, 0.5, 1),  # conversations, descriptions and reasoning
    (40, 900, 0.7, 0),  # text alone
    (83, 150, 0.5, 1),  # VQA v2
    (72, 220, 0.5, 1),  # GQA
    (9, 60, 0.3, 1),  # OK-VQA
    (80, 180, 0.4, 1),  # OCR-VQA
    (66, 60, 0.4, 1),  # A-OKVQA
    (22, 40, 0.3, 1),  # TextCaps
    (134, 300, 0.5, 1),  # RefCOCO, Visual Genome
)


def drawn(image: int) -> tuple[np.ndarray, np.ndarray]:
    """The lengths of rows in tokens, of which an image has this many, and what is known of them before."""
    draw, (sizes, medians, spreads, images) = np.random.default_rng(0), np.array(PARTS).T
    part = draw.choice(len(PARTS), ROWS, p=sizes / sizes.sum())
    text = (medians[part] * np.exp(spreads[part] * draw.standard_normal(ROWS))).astype(int)
    tokens = np.minimum(text, LIMIT - image * images[part]).astype(int)
    known = 4 * tokens * np.exp(0.12 * draw.standard_normal(ROWS)) + IMAGE * images[part]
    return tokens + (image * images[part]).astype(int), known


def padding(tokens: np.ndarray, known: np.ndarray | None, batch_size: int) -> float:
    """The share of padding in an epoch's batches."""
    lengths = {} if known is None else {"rows": known}
    batches = TaskBatches({"rows": len(tokens)}, {"rows": batch_size}, seed=0, lengths=lengths)
    found = [tokens[batches(number)[1]] for number in range(batches.batches_per_epoch)]
    return 1 - sum(rows.sum() for rows in found) / sum(rows.max() * batch_size for rows in found)


def main() -> None:
    print("tokens of an image  rows of a batch  padding  grouped  tokens computed, of those before")
    for image in (576, 256):
        tokens, known = drawn(image)
        for batch_size in (2, 4, 8, 16):
            plain, grouped = padding(tokens, None, batch_size), padding(tokens, known, batch_size)
            share = (1 - plain) / (1 - grouped)
            print(f"{image:>18}  {batch_size:>15}  {plain:7.1%}  {grouped:7.1%}  {share:7.1%}")


if __name__ == "__main__":
    main()
