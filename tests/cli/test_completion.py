"""The script of completion in a real shell."""

import shutil
import subprocess

import pytest

from dora_mm import cli

ASK = """
source {script}
COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); COMP_LINE="{words}"
$(complete -p dora-mm | sed 's/.*-F \\([^ ]*\\).*/\\1/')
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("dora-mm gri", ["grid"]),
        ("dora-mm train --res", ["--resume"]),
        ("dora-mm train a.yaml --set train.batch", ["train.batch_size="]),
        ("dora-mm train {folder}/my_st", ["{folder}/my_style.yaml"]),
    ],
)
def test_bash_completes(words, wanted, tmp_path, capsys):
    assert cli.main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    (tmp_path / "my_style.yaml").touch()
    command = ASK.format(script=tmp_path / "script", words=words.format(folder=tmp_path))
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [text.format(folder=tmp_path) for text in wanted]
