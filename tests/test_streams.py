"""Standard output that is closed, full, or cannot hold every character: no traceback, and nothing lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edit_cli.streams import substitute

COMMAND = [str(Path(sys.executable).with_name("edit-cli")), "ls", "metrics"]


def test_characters_that_an_encoding_lacks_become_signs_or_numbers():
    ended = subprocess.run(COMMAND, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert b"|^ |nll(target) < nll(foil)" in ended.stdout
    said = UnicodeEncodeError("ascii", "Łódź ↑", 0, 6, "")
    assert substitute(said) == (r"\u0141\xf3d\u017a ^", 6)


def test_a_file_name_that_is_no_text_can_be_named_in_an_error():
    ended = subprocess.run([*COMMAND[:1], "show", b"/nowhere/\xff"], capture_output=True)
    assert ended.returncode == 3
    assert b"Traceback" not in ended.stderr
    assert b"/nowhere/" in ended.stderr


@pytest.mark.thin(3)
@pytest.mark.parametrize("arguments", [["--help"], ["ls", "metrics"], ["evaluate", "--cfg", "job"]])
def test_a_reader_that_has_seen_enough_is_no_error(arguments):
    process = subprocess.Popen([COMMAND[0], *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stderr
    process.stdout.close()  # as `| head -1` does, only sooner
    errors = process.stderr.read()
    assert (process.wait(), errors) == (0, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_told_and_is_no_success():
    with open("/dev/full", "wb") as full:
        ended = subprocess.run(COMMAND, stdout=full, stderr=subprocess.PIPE)
    assert ended.returncode == 3
    assert b"error: standard output could not be written" in ended.stderr
    assert b"Traceback" not in ended.stderr
