"""Commands of `gptfast`, run in this process."""

from __future__ import annotations

import re

import pytest

from gptfast import cli


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command and return its standard output."""
    capsys.readouterr()
    cli.main(arguments)
    return capsys.readouterr().out


def error(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 2) -> str:
    """Run a command that fails with `status`, and return the only line that it prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (status, "")
    assert re.fullmatch(r"gptfast: [^\n]+\n", err), err
    return err.removeprefix("gptfast: ").rstrip()
