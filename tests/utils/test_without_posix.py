"""What Windows lacks is not needed: all modules import, and a folder has one writer, without it."""

import subprocess
import sys

import pytest

PROGRAM = """
import importlib, os, pkgutil, sys
import dora_mm

names = [module.name for module in pkgutil.walk_packages(dora_mm.__path__, "dora_mm.")]
names = [name for name in names if not name.startswith(("dora_mm.kernels", "dora_mm.__main__"))]
assert len(names) > 200
for name in names:
    importlib.import_module(name)  # and other packages, which may need what is hidden now
sys.modules["fcntl"] = sys.modules["resource"] = sys.modules["pwd"] = sys.modules["grp"] = None
for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_DIRECTORY", "pwrite", "fork", "getuid", "geteuid", "uname", "statvfs"):
    if hasattr(os, name):
        delattr(os, name)
for name in [name for name in sys.modules if name.partition(".")[0] == "dora_mm"]:
    del sys.modules[name]
for name in names:
    importlib.import_module(name)

from pathlib import Path
from dora_mm.utils.atomic import append_text, write_text
from dora_mm.utils.lock import FolderLock, only_writer
folder = Path(sys.argv[1])
with only_writer(folder):
    write_text(folder / "a", "a")
    append_text(folder / "a", "b")
    try:
        FolderLock(folder)
    except ValueError as error:
        assert f"process {os.getpid()}" in str(error), error
    else:
        raise AssertionError("two writers")
assert not (folder / ".lock").exists()
"""


@pytest.mark.slow
def test_modules_import_and_a_folder_has_one_writer(tmp_path):
    found = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-2000:]
    assert (tmp_path / "a").read_text() == "ab"
