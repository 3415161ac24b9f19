"""Eight questions for all tests of a process, and a way to call the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoprune import cli
from tests.files import data


@pytest.fixture(scope="session")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `q.jsonl` of eight questions and their pictures."""
    folder = tmp_path_factory.mktemp("eight")
    data.questions(folder, 8)
    return folder


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]):
    """`call("answer", ...)` as the shell would: exit code, stdout, stderr."""

    def run(*command: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main([str(word) for word in command])
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return run
