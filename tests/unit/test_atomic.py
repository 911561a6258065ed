"""Whether a folder would take what long work gives."""

from __future__ import annotations

import threading

import pytest

from xclip_lab.atomic import check_writable
from xclip_lab.errors import DatasetError


def test_a_folder_that_can_be_made_is_not(tmp_path):
    check_writable(tmp_path / "one" / "two")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["file", "file/in it"])
def test_a_file_takes_none(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(DatasetError, match=r"/file: Not a directory; choose another place for the run$"):
        check_writable(tmp_path / place, " for the run")


def test_many_at_once(tmp_path):
    """Each looks and then makes what it needs: none is in another's way."""
    failed = []

    def work() -> None:
        for number in range(50):
            try:
                check_writable(tmp_path / str(number) / "in")
                (tmp_path / str(number) / "in").mkdir(parents=True, exist_ok=True)
            except Exception as error:
                failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
