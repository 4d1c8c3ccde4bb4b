"""Prints every number of docs/studies/paper.md, computed from the committed rows, without any model: some seconds.

    python -m tests.benchmarks.paper

Rows of trainings lie in tests/benchmarks/results/paper, and so does what `dora-mm analyse` has written of weights and
gradients. The page has tables as they are printed here, and no interval that is not (tests/studies/test_paper.py).
"""

from tests.benchmarks.paper.tables import everything

if __name__ == "__main__":
    print(everything())
