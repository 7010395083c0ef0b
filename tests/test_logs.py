"""A log that cannot be written ends nothing; progress is a bar on a terminal and lines in a log."""

import io
import sys

import pytest
from conftest import full_disk_stream
from tqdm import tqdm

from ddt import logs
from ddt.logs import SteadyStream, logging_setup, progress_bar


def test_a_full_disk_loses_lines_and_raises_nothing(monkeypatch):
    full_disk = full_disk_stream()
    monkeypatch.setattr(sys, "stderr", full_disk)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # put back in the end
    with pytest.raises(OSError, match="No space left"):
        print("line", file=sys.stderr)
    logging_setup()
    assert isinstance(sys.stderr, SteadyStream)
    assert sys.stderr.stream is full_disk
    logging_setup()
    assert sys.stderr.stream is full_disk  # not twice
    for _ in tqdm(range(3), mininterval=0):
        print("line", file=sys.stderr, flush=True)
    sys.stderr.flush()
    assert sys.stderr.fileno() == full_disk.fileno()


def test_what_can_be_written_is(capsys):
    SteadyStream(sys.stderr).write("line")
    assert capsys.readouterr().err == "line"


@pytest.mark.parametrize("total", [4, None])
def test_progress_in_a_log_is_lines(monkeypatch, total):
    text = io.StringIO()
    monkeypatch.setattr(sys, "stderr", text)
    with progress_bar(total=total, unit="img", desc="sampling") as bar:
        bar.update(4)
    assert text.getvalue() == ""  # over within the first half minute
    monkeypatch.setattr(logs, "LINE_SECONDS", 0)
    with progress_bar(total=total, unit="img", desc="sampling", miniters=1) as bar:
        for _ in range(4):
            bar.update(1)
    assert "\r" not in text.getvalue()
    lines = text.getvalue().splitlines()
    assert lines[-1].startswith("sampling: 100% of 4img, " if total else "sampling: 4img, ")
    assert len(lines) >= 4


def test_progress_on_a_terminal_is_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar(total=4, unit="img", desc="sampling") as bar:
        bar.update(4)
    assert terminal.getvalue().count("\r") >= 2
    assert "100%|" in terminal.getvalue()
