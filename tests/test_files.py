"""Files appear whole or not at all."""

from __future__ import annotations

import os

import pytest

from autoprune.files import check_folder, check_picture_path, make_folder, write_whole


def test_text_and_bytes_are_written_as_they_are(tmp_path):
    write_whole(tmp_path / "text", "größer\n")
    write_whole(tmp_path / "bytes", b"\x00\xff")
    assert (tmp_path / "text").read_bytes() == "größer\n".encode()
    assert (tmp_path / "bytes").read_bytes() == b"\x00\xff"


def test_a_failure_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "no" / "file", "text")


def test_a_picture_path_is_checked_before_it_is_needed(tmp_path):
    assert check_picture_path(tmp_path / "a.PNG").name == "a.PNG"
    for name, message in (("a.jpg", "PNG"), ("no/a.png", "there is no folder")):
        with pytest.raises(ValueError, match=message):
            check_picture_path(tmp_path / name)


def test_a_folder_is_tried_and_left_as_it_was(tmp_path):
    check_folder(tmp_path)
    check_folder(tmp_path / "new" / "one")
    assert not list(tmp_path.iterdir())


def test_a_folder_is_made_with_those_above_it(tmp_path):
    assert make_folder(tmp_path / "new" / "one").is_dir()
    assert make_folder(tmp_path / "new" / "one") == tmp_path / "new" / "one"


@pytest.mark.parametrize("check", [check_folder, make_folder])
def test_a_folder_that_cannot_be_written_is_named(tmp_path, check):
    (tmp_path / "file").write_text("mine")
    for folder, message in (
        ("/proc/new", r"cannot write '/proc/new' \(.*\); choose another place"),
        (tmp_path / "file", "is a file; give a folder"),
        (tmp_path / "file" / "new", r"cannot write '.*new' \(.*\); choose another place"),
        (tmp_path / ("x" * 300), r"\(File name too long\); choose another place"),
    ):
        with pytest.raises(ValueError, match=message):
            check(folder)
