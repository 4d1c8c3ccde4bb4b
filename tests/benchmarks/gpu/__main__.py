import sys

from tests.benchmarks.gpu import main

sys.exit(main())
