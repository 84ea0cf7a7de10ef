"""The README's blocks do what they say: Python runs, commands are commands with flags that exist."""

import re
import shlex
from pathlib import Path

import pytest

from jaxrl import cli

TEXT = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.S)


def test_python_blocks_run(capsys):
    """The sweep in the README prints chunks of the shape that its comment gives."""
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("(3, 5, 4, 2) ")


COMMANDS = [line.split("#")[0] for block in blocks("bash") for line in block.splitlines() if line.startswith("jaxrl ")]


class FlagsReadError(BaseException):
    """The command got as far as making its environment."""


def stop_here(name):
    raise FlagsReadError(name)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_have_flags_that_exist(line, monkeypatch, tmp_path, capsys):
    """Each command reads its flags, and complains at most of the files that the README only names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jaxrl.cli.flags.make", stop_here)
    words = shlex.split(line)[1:]
    if words[0] in ("doctor", "list") or "--print-slurm" in words:
        assert cli.main(words) == 0
        return
    try:
        assert cli.main(words) == 2
        assert re.search("run directory|no file", capsys.readouterr().err)
    except FlagsReadError:
        pass
