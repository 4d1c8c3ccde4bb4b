"""The suite on other days and machines and with other Pythons: `make test-elsewhere`, or python -m tests.elsewhere.

With each Python that is here the whole suite runs in all conditions at once, then its fast folders in each alone.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "elsewhere"
TEMPORARY = Path(tempfile.gettempdir()) / f"elsewhere-{os.getpid()}"  # on another day pytest takes others' for old
ODD = TEMPORARY / "été 東京"
COPY = ODD / "dora mm"
FAST = ("config", "data", "utils", "cli", "registries")
PACKAGES = ("--editable", ".[dev]", "pytest-random-order")
PYTEST = ("-m", "pytest", "-v", "-n", "2", "--dist", "worksteal", "-p", "no:cacheprovider")
ROW = "{:8}{:25}{:>8}{:>8}{:>8}{:>9}"


@dataclass(frozen=True)
class Condition:
    """One thing that is different elsewhere.

    Attributes:
        name: Its name in the table.
        wrapper: The command in front of Python's.
        options: Options of pytest.
        folder: Where the suite lies.
    """

    name: str
    wrapper: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    folder: Path = ROOT


def day(date: str) -> Condition:
    """Files keep their true times, and threads wait by the monotonic clock, which stays as it is."""
    return Condition(date, ("env", "NO_FAKE_STAT=1", "faketime", "--exclude-monotonic", date))


def variable(name: str, value: object) -> Condition:
    return Condition(name, ("env", f"{name}={value}"))


DAYS = (day("2027-02-28"), day("2028-02-29"), day("2031-01-01"))
OTHERS = (
    variable("TZ", "Asia/Kathmandu"),
    variable("LC_ALL", "C"),
    variable("PYTHONHASHSEED", time.time_ns() % 2**32),
    Condition("random order", options=("--random-order", f"--random-order-seed={time.time_ns() % 10**6}")),
    Condition("path", ("env", f"PYTHONPATH={COPY}", f"TMPDIR={ODD}"), folder=COPY),
    Condition("umask 077", ("sh", "-c", 'umask 077; exec "$@"', "sh")),
    Condition("no HOME", ("env", "-u", "HOME")),
    Condition("unknown uid", ("unshare", "-U", "--map-user=12345")),
)
ENCODINGS = Condition(
    "EncodingWarning",
    ("env", "PYTHONWARNDEFAULTENCODING=1"),
    ("-o", r"filterwarnings=error::EncodingWarning:(dora_mm|pipelines)\b"),
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.elsewhere", description=__doc__)
    parser.add_argument("--pythons", nargs="*", default=promised(), help="only these, such as 3.12")
    parser.add_argument("--only", nargs="*", help="only these conditions, such as 'all' or 'umask 077'")
    parser.add_argument("--tests", nargs="*", help="these files and folders instead of all and of the fast ones")
    parser.add_argument("--seconds", type=float, default=900, help="for each Python, after which its pass is ended")
    given = parser.parse_args()
    here, found = list(usable((*DAYS, *OTHERS))), list(pythons(given.pythons))
    try:
        copy()
        bad = list(measured(given, here, found))
    finally:
        shutil.rmtree(TEMPORARY, ignore_errors=True)
    for log in bad:
        failed = re.findall(r"(?m)^(?:FAILED|ERROR) .*", log.read_text("utf-8", "replace"))
        print(f"\n{log.relative_to(ROOT)}:", *failed, sep="\n")
    return 1 if bad or not found else 0


def measured(given: argparse.Namespace, here: Sequence[Condition], found: Sequence[tuple[str, str]]) -> Iterator[Path]:
    """Runs all passes and prints a line for each; the logs of those that failed."""
    print(ROW.format("Python", "conditions", "passed", "failed", "skipped", "seconds"), flush=True)
    for version, command in found:
        python, end = environment(version, command), time.monotonic() + given.seconds
        for condition, tests in passes(version, here, given.only, given.tests):
            log, begin = BUILD / f"{version} {condition.name}.log", time.monotonic()
            counts = run(python, condition, tests, log, end - begin)
            numbers = (counts[kind] for kind in ("passed", "failed", "skipped"))
            print(ROW.format(version, condition.name, *numbers, round(time.monotonic() - begin)), flush=True)
            if counts["failed"]:
                yield log


def promised() -> list[str]:
    """The Pythons that pyproject.toml names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))


def works(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def pythons(versions: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The versions that are installed here, on PATH or among pyenv's, with their commands."""
    own = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for version in versions:
        commands = [f"python{version}", *map(str, sorted(own.glob(f"{version}.*/bin/python")))]
        if command := next((command for command in commands if works(command, "-c", "import ensurepip")), None):
            yield version, command
        else:
            print(f"Left out: Python {version} is not here.")


def environment(version: str, command: str) -> Path:
    """An environment's Python; it is set up where it is missing or older than pyproject.toml."""
    folder, ready = BUILD / version, BUILD / version / ".installed"
    python = folder / "bin" / "python"
    if not ready.exists() or ready.stat().st_mtime < (ROOT / "pyproject.toml").stat().st_mtime:
        subprocess.run([command, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "uv"], check=True)
        uv = (python.with_name("uv"), "pip", "install", "--quiet", "--upgrade", "--python", python)
        subprocess.run([*uv, *PACKAGES], cwd=ROOT, check=True)
        ready.touch()
    return python


def copy() -> None:
    """The checkout's files in a path with spaces and other letters."""
    listed = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    names = os.fsdecode(subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout)
    for name in filter(lambda name: (ROOT / name).is_file(), names.rstrip("\0").split("\0")):
        (COPY / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, COPY / name)


def usable(conditions: Iterable[Condition]) -> Iterator[Condition]:
    """The conditions that this machine can provide."""
    for condition in conditions:
        if works(*condition.wrapper, "true"):
            yield condition
        else:
            print(f"Left out: {condition.name}, since `{' '.join(condition.wrapper)} true` fails here.")


def passes(
    version: str, here: Sequence[Condition], only: Sequence[str] | None, tests: Sequence[str] | None
) -> Iterator[tuple[Condition, Sequence[str]]]:
    """The conditions of this Python and the tests in each: all at once, on one of the days in turn, then each alone."""
    fast = tests or [f"tests/{folder}" for folder in FAST]
    of_it = DAYS[promised().index(version) % len(DAYS)]
    whole = concurrency([condition for condition in (of_it, *OTHERS) if condition in here])
    for condition, chosen in [(whole, tests or []), *((condition, fast) for condition in (*here, ENCODINGS))]:
        if condition.name.startswith(tuple(only or [""])):
            yield condition, chosen


def concurrency(conditions: Sequence[Condition]) -> Condition:
    day = next((condition.name for condition in conditions if condition in DAYS), "today")
    return Condition(
        f"all at once, {day}",
        tuple(word for condition in conditions for word in condition.wrapper),
        tuple(word for condition in conditions for word in condition.options),
        next((condition.folder for condition in conditions if condition.folder != ROOT), ROOT),
    )


def run(python: Path, condition: Condition, tests: Sequence[str], log: Path, seconds: float) -> Counter[str]:
    """One pass of the tests, which is ended after this time; the numbers of its outcomes."""
    command = [*condition.wrapper, python, *PYTEST, *condition.options, *tests]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "", "TMPDIR": str(TEMPORARY)}
    with log.open("wb") as output:
        settings = {"cwd": condition.folder, "env": variables, "stdout": output, "stderr": output}
        process = subprocess.Popen(command, start_new_session=True, **settings)
        try:
            with suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    last = re.findall(r"(?m)^.*\d \w+ in [\d.]+s.*$", log.read_text("utf-8", "replace"))[-1:]
    counts = Counter({kind: int(number) for number, kind in re.findall(r"(\d+) ([a-z]+)", "".join(last))})
    counts["failed"] += counts["error"] + counts["errors"]
    counts["failed"] = counts["failed"] or int(process.wait() != 0)
    return counts


if __name__ == "__main__":
    sys.exit(main())
