"""Files and folders that are as they were, or as they are to be, at every moment."""

import pytest

from diffalign.core.files import aside, folder_aside, write_text


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "summary.json"
    write_text(path, "old")
    with aside(path) as file:
        file.write_text("ne")
        assert path.read_text() == "old"
        file.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "grid.png"
    path.write_bytes(b"old")

    def interrupted():
        with aside(path) as file:
            file.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_there_once_it_is_whole(tmp_path):
    path = tmp_path / "model"
    with folder_aside(path) as folder:
        (folder / "a").write_text("a")
        assert not path.exists()
    assert [p.name for p in path.iterdir()] == ["a"]

    def interrupted():
        with folder_aside(tmp_path / "other") as folder:
            (folder / "a").write_text("a")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == [path]
