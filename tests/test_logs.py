"""A log that cannot be written ends nothing."""

import sys

import pytest
from conftest import full_disk_stream
from tqdm import tqdm

from ddt.logs import SteadyStream, logging_setup


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
