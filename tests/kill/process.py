"""dora-mm in a process that something else has started, such as torchrun, where it is counted or disturbed."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dora_mm.cli import main
from tests.kill.disturbances import DISTURBANCES, counting, disturb, mapped

DISTURBED = "KILL_DISTURBED"  # an environment variable with what happens to such processes
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_")  # what torchrun sets


class Command(NamedTuple):
    """What is disturbed, for a second writer."""

    run: Callable[[], object]
    reads: str


def two_processes(*arguments: str) -> Callable[[], object]:
    """Runs a command in two processes under torchrun."""

    def run() -> None:
        own = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHED)}
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        code = subprocess.run([*launcher, "-m", "tests.kill.process", *arguments], env=own).returncode
        if code:
            sys.exit(code)

    return run


def disturbed() -> None:
    """Installs what was asked for, in this process alone."""
    if not (text := os.environ.pop(DISTURBED, "")):
        return
    about = json.loads(text)
    folder, events = Path(about["folder"]), mapped(Path(about["events"]))
    if not about["thing"]:
        sys.addaudithook(counting(folder, events))
        return
    command = Command(two_processes(*sys.argv[1:]), about["reads"])
    sys.addaudithook(disturb(folder, DISTURBANCES[about["thing"]], command, about["number"], events))


if __name__ == "__main__":
    disturbed()
    sys.exit(main(sys.argv[1:]))
