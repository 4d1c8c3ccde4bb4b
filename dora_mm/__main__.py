"""Runs the command line as `python -m dora_mm`."""

import sys

from dora_mm.cli import main

sys.exit(main())
