"""What commands print for a person to go on with."""

import shlex


def next_commands(printed: str) -> list[list[str]]:
    """The commands of dora-mm that a command has printed, without the reasons behind them."""
    return [shlex.split(line, comments=True)[1:] for line in printed.splitlines() if line.startswith("  dora-mm ")]
