"""Disturbs commands that write, at each file event in turn and then at random, and repeats them: make kill.

After the repetition the files are those of a command that was not disturbed, and nothing else is left.
"""

import os

os.environ |= {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}  # before they are loaded
os.environ |= {"HF_HUB_OFFLINE": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false", "MPLBACKEND": "agg"}

import argparse
import csv
import json
import logging
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from random import Random

import matplotlib.pyplot  # noqa: F401  what the commands load later is imported once, by the parent

import dora_mm.formats.commands.extract  # noqa: F401
import dora_mm.models.images.families  # noqa: F401
import dora_mm.studies.plots  # noqa: F401
from dora_mm.cli.errors import user_message
from dora_mm.recipes import PIPELINES
from tests.kill.commands import COMMANDS, THUMBNAIL, Command, files_of, prepare
from tests.kill.disturbances import CLOCK, DISTURBANCES, KILLED, Disturbance, counting, disturb, mapped, other_input
from tests.kill.process import DISTURBED

RECIPES = (
    "new",
    "convert",
    "extract",
    "combine",
    "analyse",
    "gallery",
    "extract_features",
    "sample",
    "train_diffusion",
    "train_vl",
    "tune",
    "compare",
    "score",
)
Files = dict[str, bytes]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kill", description=__doc__)
    parser.add_argument("--each", type=int, default=100, help="kills of each command; a fifth of those that take long")
    parser.add_argument("--others", type=int, default=20, help="events at which each other thing happens")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--commands", nargs="*", help="only these")
    parser.add_argument("--things", nargs="*", help="only these, such as SIGKILL")
    parser.add_argument("--events", type=int, nargs="*", help="only at these, from 0; from the last one, if negative")
    parser.add_argument("--kills", type=int, help="so many of all commands together, at random events; nothing else")
    parser.add_argument("--output", type=Path, help="a CSV file: how often what happened to which command")
    given = parser.parse_args()
    under_other_clock(given.things or DISTURBANCES)
    rows, bad = [], []
    with tempfile.TemporaryDirectory(prefix="kill") as name:
        root = Path(name).resolve()
        os.environ["XDG_CACHE_HOME"] = str(root / "cache")
        (root / "prepared").mkdir()
        assert in_child(prepare, root / "prepared") == 0
        names = given.commands or list(COMMANDS)
        for place, what in enumerate(names):
            bench, events = Bench(what, COMMANDS[what], root, given.seed), given.events
            if given.kills:
                events = bench.random.sample(range(bench.events), len(range(place, given.kills, len(names))))
            for thing in ["SIGKILL"] if given.kills else possible(given.things or DISTURBANCES):
                most = given.each if thing == "SIGKILL" else given.others
                most = max(most // 5, 1) if COMMANDS[what].is_long else most
                number, found = bench.disturbed(thing, bench.moments(thing, most, events))
                rows.append({"command": what, "what happens": thing, "times": number, "other files": len(found)})
                print("\n".join([*found, f"{what}: {thing}, {number} times"]), flush=True)
                bad += found
    if given.output:
        with given.output.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
    print(f"{sum(row['times'] for row in rows)} disturbances from seed {given.seed}, {len(bad)} with other files")
    return 1 if bad else 0


class Bench:
    """One command, and the files of its undisturbed runs."""

    def __init__(self, name: str, command: Command, root: Path, seed: int):
        self.name, self.command, self.root, self.random = name, command, root, Random(f"{name} {seed}")
        self.counter = root / "events"
        self.counter.write_bytes(bytes(4))
        self.counted = mapped(self.counter)
        begin = time.monotonic()
        self.whole = self._whole()
        self.seconds, self.events = time.monotonic() - begin, self.counted[0]
        other = names_of_differences(self._whole(), self.whole)
        assert not other, f"{name} does not repeat itself: {', '.join(other[:5])}"

    @cached_property
    def other(self) -> Files:
        """The files with another input."""
        return self._whole(other_input)

    def disturbed(self, thing: str, moments: Iterable[int | float]) -> tuple[int, list[str]]:
        """Disturbs it at each of these moments; returns how often, and what was wrong."""
        what, bad, number = DISTURBANCES[thing], list[str](), 0
        for moment in moments:
            folder, number = fresh(self.root), number + 1
            code = in_child(self.command.run, folder, self._setup(thing, folder, moment), moment)
            bad += [f"{self.name}, {thing} at {moment}: {problem}" for problem in self._problems(what, folder, code)]
        return number, bad

    def moments(self, thing: str, most: int, chosen: Sequence[int] | None) -> Iterator[int | float]:
        """When it is disturbed: numbers of events, and seconds.

        Args:
            thing: What happens. SIGKILL happens at random, too, where there are fewer events.
            most: As many events as this, evenly spread.
            chosen: These events instead; negative ones are counted from the last one.
        """
        if chosen is not None:
            yield from sorted({event % self.events for event in chosen})
            return
        yield from range(0, self.events, -(-self.events // most))
        if thing == "SIGKILL":
            yield from (self.random.uniform(0, self.seconds) for _ in range(most - self.events))

    def _problems(self, what: Disturbance, folder: Path, code: int) -> Iterator[str]:
        right = [self.whole, with_thumbnails(self.whole, self.other), self.other] if what.stays else [self.whole]
        others = (1,) if self.command.starts else ()  # where a process that it has started has ended
        if code not in (*what.codes, *others, 0):
            yield f"exit code {code}"
        restore(self.root / "prepared", folder)
        if code == 0 and not what.errors:  # from a disk that is read-only the next command removes what is half written
            yield from self._differences(right, folder, "at once")
            return
        again = in_child(self.command.again or self.command.run, folder)
        if again == 2 and what.stays and not list(folder.rglob("*.partial")):
            return  # it is said that an input has changed
        if again == 2 and not list(self._differences(right, folder, "")):
            return  # it had ended but for its last event
        if again:
            yield f"exit code {again} of the repetition"
        yield from self._differences(right[-1:] if what.stays else right, folder, "repeated")

    def _differences(self, right: list[Files], folder: Path, when: str) -> Iterator[str]:
        left = self._files(folder)
        if not (folder / "out").exists():  # it vanished with all that was written
            right = [{name: what for name, what in files.items() if not name.startswith("out")} for files in right]
        if left not in right:
            closest = min(right, key=lambda files: len(names_of_differences(files, left)))
            yield f"{when}: other files: {', '.join(names_of_differences(closest, left)[:5])}"

    def _whole(self, change: Callable | None = None) -> Files:
        folder = fresh(self.root)
        if change:
            assert in_child(lambda: change(self.command), folder) == 0
        said = self.root / "said"
        assert in_child(self.command.run, folder, self._setup("", folder, 0), said=said) == 0, said.read_text()
        return self._files(folder)

    def _files(self, folder: Path) -> Files:
        """Those that it wrote, and what lay there: but for the one that is another input."""
        return {name: what for name, what in files_of(folder, self.command.times).items() if name != self.command.reads}

    def _setup(self, thing: str, folder: Path, moment: int | float) -> Callable[[], object] | None:
        """What a child does before the command, so that this happens to it; without a thing its events are counted."""
        self.counted[0] = 0
        if isinstance(moment, float):
            return None
        if self.command.is_external:
            about = {
                "folder": folder,
                "thing": thing,
                "number": moment,
                "reads": self.command.reads,
                "events": self.counter,
            }
            return lambda: os.environ.update({DISTURBED: json.dumps(about, default=str)})
        if not thing:
            return lambda: sys.addaudithook(counting(folder, self.counted))
        return lambda: sys.addaudithook(disturb(folder, DISTURBANCES[thing], self.command, moment, self.counted))


def names_of_differences(one: Files, other: Files) -> list[str]:
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))


def with_thumbnails(files: Files, shown: Files) -> Files:
    """The files of a training whose images changed when they were read: a page shows images as they are now."""
    others = {name: what for name, what in files.items() if not THUMBNAIL(name)}
    return others | {name: what for name, what in shown.items() if THUMBNAIL(name)}


def fresh(root: Path) -> Path:
    """The prepared folder, anew: always in the same place, since files name others by their paths."""
    folder = root / "work"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(root / "prepared", folder)
    return folder


def restore(prepared: Path, folder: Path) -> None:
    """What a folder that vanished has held."""
    for path in prepared.rglob("*"):
        target = folder / path.relative_to(prepared)
        if path.is_file() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)


def under_other_clock(things: Iterable[str]) -> None:
    """Starts this program anew under libfaketime, where it is installed and something sets the clock."""
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    if CLOCK in os.environ or not found or not any(DISTURBANCES[thing].by_clock for thing in things):
        return
    descriptor, clock = tempfile.mkstemp(prefix="clock")
    os.write(descriptor, b"+0")
    settings = {"LD_PRELOAD": str(found[0]), CLOCK: clock, "FAKETIME_NO_CACHE": "1", "NO_FAKE_STAT": "1"}
    os.execve(sys.executable, [sys.executable, "-m", "tests.kill", *sys.argv[1:]], {**os.environ, **settings})


def possible(things: Iterable[str]) -> Iterator[str]:
    """Those that can happen here."""
    for thing in things:
        if DISTURBANCES[thing].by_clock and CLOCK not in os.environ:
            print(f"{thing}: left out, since libfaketime is not installed (apt install faketime)")
        else:
            yield thing


def wait_for(folder: Path) -> None:
    """Waits for the end of all processes in a folder: some go on when the one that has started them is killed."""
    while any(is_in(process, folder) for process in Path("/proc").glob("[0-9]*")):
        time.sleep(0.02)


def is_in(process: Path, folder: Path) -> bool:
    try:
        return os.readlink(process / "cwd").removesuffix(" (deleted)") == str(folder)
    except OSError:  # it has ended, or is somebody else's
        return False


def in_child(
    run: Callable[[], object],
    folder: Path,
    setup: Callable[[], object] | None = None,
    seconds: int | float = 0,
    said: str | Path = os.devnull,
) -> int:
    """Runs a function in a folder, and what disturbs it or a kill; returns its exit code, or minus the signal.

    Args:
        run: The function.
        folder: The folder.
        setup: What the child calls first.
        seconds: The time until the kill, as a float.
        said: Where what it prints goes.
    """
    assert len(os.listdir("/proc/self/task")) == 1, "a second thread would be missing in the child"
    if not (child := os.fork()):
        code = 1
        try:
            os.chdir(folder)
            with open(said, "w") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # which background jobs of a shell ignore
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as those of nohup do
            if setup:
                setup()
            run()
            code = 0
        except KeyboardInterrupt:
            code = 130
        except SystemExit as end:
            code = int(end.code or 0)
        except (ValueError, OSError) as error:
            code = 1 if user_message(error) is None else 2
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    if isinstance(seconds, float):
        time.sleep(seconds)
        os.kill(child, -KILLED)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    wait_for(folder)
    return code


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    for recipe in (*RECIPES, "train_diffusion"):
        PIPELINES.load(recipe)
    sys.exit(main())
