"""What is written is there as a whole or not at all: after errors, between two processes, and after a kill."""

import errno
import os
import resource
import subprocess
import sys
from contextlib import contextmanager

import pytest

from trl_steer import files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def full_disk(size):
    """No file can grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fill(*paths, fail=False):
    with files.new_folders(*paths) as partials:
        for partial in partials:
            (partial / "one").write_text("1")
        if fail:
            raise KeyboardInterrupt


def fail_at_rename(number, monkeypatch, what=os.rename):
    """Makes the `number`-th rename fail as on a full disk; the others go through."""
    done = []

    def rename(*args):
        done.append(args)
        if len(done) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return what(*args)

    monkeypatch.setattr(files.os, what.__name__, rename)


def test_json_comes_back(tmp_path):
    file = tmp_path / "new" / "file"
    files.write_json(file, {"ä": [1, None]})
    assert files.read_json(file) == {"ä": [1, None]}
    assert names(file.parent) == ["file"]


def test_file_keeps_its_text_if_the_disk_is_full(tmp_path):
    file = tmp_path / "file"
    files.write_text(file, "before")
    with full_disk(1000), pytest.raises(OSError, match="File too large"):
        files.write_text(file, 100_000 * "x")
    assert file.read_text() == "before"
    assert names(tmp_path) == ["file"]


def test_a_file_that_cannot_be_put_in_place_leaves_nothing(tmp_path, monkeypatch):
    fail_at_rename(1, monkeypatch, what=os.replace)
    with pytest.raises(OSError, match="No space left"):
        files.write_text(tmp_path / "file", "text")
    assert names(tmp_path) == []


def test_files_and_folders_get_the_usual_permissions(tmp_path):
    (tmp_path / "theirs").mkdir()
    with files.new_folder(tmp_path / "ours") as partial:
        files.write_text(partial / "ours", "")
        (partial / "theirs").write_text("")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "theirs").stat().st_mode
    assert (tmp_path / "ours" / "ours").stat().st_mode == (tmp_path / "ours" / "theirs").stat().st_mode


def test_a_folder_that_was_not_finished_does_not_appear(tmp_path):
    def make(fail):
        with files.new_folder(tmp_path / "made") as partial:
            (partial / "one").write_text("1")
            if fail:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(fail=True)
    assert names(tmp_path) == []
    make(fail=False)
    assert (tmp_path / "made" / "one").read_text() == "1"


def test_first_of_two_writers_keeps_its_folder(tmp_path):
    with files.new_folder(tmp_path / "made") as slow:
        (slow / "by").write_text("slow")
        with files.new_folder(tmp_path / "made") as fast:
            (fast / "by").write_text("fast")
    assert (tmp_path / "made" / "by").read_text() == "fast"
    assert names(tmp_path) == ["made"]


def test_error_at_an_existing_empty_folder_is_raised(tmp_path, monkeypatch):
    """An earlier version took it for the folder of a faster process, and threw the finished one away."""
    (tmp_path / "made").mkdir()
    fail_at_rename(1, monkeypatch)
    with pytest.raises(OSError, match="No space left"), files.new_folder(tmp_path / "made"):
        pass
    assert names(tmp_path) == ["made"]


def test_several_folders_appear_together(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b" / "c"]
    with pytest.raises(KeyboardInterrupt):
        fill(*paths, fail=True)
    assert [path.exists() for path in paths] == [False, False]
    paths[0].mkdir()  # an empty one may be there
    fill(*paths)
    assert [names(path) for path in paths] == [["one"], ["one"]]
    assert names(tmp_path) == ["a", "b"]
    assert names(tmp_path / "b") == ["c"]


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_if_one_of_several_folders_cannot_be_put_in_place_none_is(failing, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with monkeypatch.context() as fault:
        fail_at_rename(failing, fault)
        with pytest.raises(OSError, match="No space left"):
            fill(tmp_path / "empty", tmp_path / "a", tmp_path / "b")
    assert names(tmp_path) == ["empty"]
    assert names(tmp_path / "empty") == []
    fill(tmp_path / "empty", tmp_path / "a", tmp_path / "b")
    assert names(tmp_path) == ["a", "b", "empty"]


def test_a_folder_in_use_is_refused_before_the_work(tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "theirs").write_text("")
    (tmp_path / "file").write_text("")
    for name, said in (("used", "used exists and is not empty"), ("file", "file is a file")):
        with pytest.raises(FileExistsError, match=said), files.new_folders(tmp_path / "free", tmp_path / name):
            pytest.fail("the block ran")
    assert names(tmp_path) == ["file", "used"]


def test_if_another_process_created_one_of_several_folders_none_is_put_in_place(tmp_path):
    with (
        pytest.raises(FileExistsError, match="b exists and is not empty"),
        files.new_folders(tmp_path / "a", tmp_path / "b"),
    ):
        fill(tmp_path / "b")
    assert names(tmp_path) == ["b"]
    assert names(tmp_path / "b") == ["one"]


@pytest.mark.parametrize("other", ["a", "a/b", "."])
def test_folders_in_each_other_are_refused(other, tmp_path):
    with (
        pytest.raises(ValueError, match="Output folders must not be the same"),
        files.new_folders(tmp_path / "a", tmp_path / other),
    ):
        pytest.fail("the block ran")
    assert names(tmp_path) == []


def test_a_link_leads_to_the_place_of_a_folder(tmp_path):
    (tmp_path / "real").mkdir()
    for name in ("one", "two"):
        (tmp_path / name).symlink_to(tmp_path / "real" / name)
    with files.new_folder(tmp_path / "one") as partial:
        (partial / "one").write_text("1")
    fill(tmp_path / "two")
    assert [names(tmp_path / "real" / name) for name in ("one", "two")] == [["one"], ["one"]]
    assert (tmp_path / "one").is_symlink()


def test_a_process_that_was_killed_leaves_nothing_in_the_way(tmp_path):
    code = f"""
import time
from pathlib import Path
from trl_steer.files import new_folders
with new_folders(Path({str(tmp_path / "a")!r}), Path({str(tmp_path / "b")!r})) as partials:
    for partial in partials:
        (partial / "half").write_text("")
    print("working", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "working\n"
        process.kill()
    left = names(tmp_path)
    assert len(left) == 2
    assert all(name.endswith(".partial") for name in left)
    fill(tmp_path / "a", tmp_path / "b")
    with files.new_folder(tmp_path / "c"):
        pass
    assert names(tmp_path) == sorted([*left, "a", "b", "c"])
    assert names(tmp_path / "a") == ["one"]


def test_removed_folder_is_renamed_before_its_files_are_deleted(tmp_path, monkeypatch):
    fill(tmp_path / "folder")
    (tmp_path / "file").write_text("")
    files.remove(tmp_path / "file")
    files.remove(tmp_path / "absent")
    assert names(tmp_path) == ["folder"]
    seen = []
    monkeypatch.setattr(files.shutil, "rmtree", lambda path: seen.append((path.name, names(path))))
    files.remove(tmp_path / "folder")
    assert names(tmp_path) == [seen[0][0]]
    assert seen[0][0].startswith(".folder.")
    assert seen[0][1] == ["one"]


def test_of_a_removed_link_the_target_stays(tmp_path):
    fill(tmp_path / "folder")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    files.remove(tmp_path / "link")
    assert names(tmp_path) == ["folder"]
    assert names(tmp_path / "folder") == ["one"]


def test_a_large_file_is_there_when_it_is_complete_and_not_before(tmp_path):
    path = tmp_path / "folder" / "file"

    def write(text, fails):
        with files.new_file(path) as partial:
            partial.write_text(text)
            assert path.exists() == fails
            if fails:
                raise ZeroDivisionError

    write("new", fails=False)
    with pytest.raises(ZeroDivisionError):
        write("half", fails=True)
    assert [(file.name, file.read_text()) for file in path.parent.iterdir()] == [("file", "new")]
