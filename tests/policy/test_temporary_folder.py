"""Temporary folders of the policy: whose they are, and what the next start removes."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from treepo_trl.policy import temporary_folder
from treepo_trl.policy.temporary_folder import TemporaryFolder


SHARED, TEMPORARY = "shared", "temporary"
Start = Callable[[str], tuple["subprocess.Popen[str]", Path]]


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared memory and temporary files of this test alone."""
    for name in (SHARED, TEMPORARY):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(temporary_folder, "SHARED_MEMORY", tmp_path / SHARED)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / TEMPORARY))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a process that has a folder with a file and sleeps; gives both."""
    script = (
        "import sys, time; from pathlib import Path; from treepo_trl.policy import temporary_folder as t\n"
        "t.SHARED_MEMORY = Path(sys.argv[1])\n"
        "folder = t.TemporaryFolder('adapter', sys.argv[2])\n"
        "Path(folder.path, 'adapter.bin').write_text('weights')\n"
        "print(folder.path, flush=True)\n"
        "time.sleep(600)\n"
    )
    processes: list[subprocess.Popen[str]] = []

    def started(place: str) -> tuple["subprocess.Popen[str]", Path]:
        command = [sys.executable, "-c", script, str(tmp_path / SHARED), str(tmp_path / place)]
        environment = {**os.environ, "TMPDIR": str(tmp_path / TEMPORARY)}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        processes.append(process)
        assert process.stdout is not None
        return process, Path(process.stdout.readline().strip())

    yield started
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("place", [SHARED, TEMPORARY])
def test_a_killed_process_leaves_its_folder_to_the_next_start(tmp_path: Path, start: Start, place: str) -> None:
    killed, left = start(place)
    _, used = start(place)
    assert left.name.startswith(f"treepo-trl-adapter-{killed.pid}-")
    killed.kill()
    killed.wait()
    assert (left / "adapter.bin").exists()  # nobody could have removed it
    folder = TemporaryFolder("base", tmp_path / TEMPORARY)  # of another kind, in another place
    assert not left.exists()
    assert (used / "adapter.bin").exists()
    assert os.path.isdir(folder.path)
    del folder
    assert [path for name in (SHARED, TEMPORARY) for path in (tmp_path / name).iterdir()] == [used]


def test_nothing_else_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what only looks alike, not through a link, not another user's, and nothing of this process."""
    place, precious = tmp_path / TEMPORARY, tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("kept")
    alike = [
        "treepo-trl-adapter",
        "treepo-trl-adapter-12",
        "treepo-trl-adapter-12-notes",
        "treepo-adapter-12-abcdefgh",
    ]
    for name in [*alike, "treepo-trl-adapter-12-abcdefgh-old", "x-treepo-trl-adapter-12-abcdefgh"]:
        (place / name).mkdir()
    (place / "treepo-trl-adapter-12-linklink").symlink_to(precious)
    (place / "treepo-trl-adapter-12-plainfil").write_text("a file")
    own = TemporaryFolder("adapter", place)
    before = sorted(place.iterdir())
    left = place / "treepo-trl-base-12-leftover"
    (left / "inner").mkdir(parents=True)
    (left / "inner/link").symlink_to(precious)
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        TemporaryFolder("adapter", place)
    assert sorted(place.iterdir()) == sorted([*before, left])
    TemporaryFolder("adapter", place)
    assert sorted(place.iterdir()) == before
    assert (precious / "file").read_text() == "kept"
    assert os.path.isdir(own.path)


def test_a_folder_goes_with_its_object_or_its_process(tmp_path: Path) -> None:
    folder = TemporaryFolder("adapter", tmp_path)
    open_files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    path = folder.path
    folder.remove()
    assert not os.path.exists(path)
    if open_files is not None:
        assert len(os.listdir("/proc/self/fd")) == open_files - 1
    code = (
        f"from treepo_trl.policy.temporary_folder import TemporaryFolder as T; f = T('base', {str(tmp_path)!r}); 1 / 0"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 1
    assert [child.name for child in tmp_path.iterdir() if child.name.startswith("treepo")] == []


def test_a_folder_that_is_swept_before_it_is_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The three moments between making a folder and holding its lock."""
    make, lock = tempfile.mkdtemp, temporary_folder.lock
    made: list[str] = []

    def make_and_sweep(**how: Any) -> str:
        made.append(make(**how))
        if len(made) == 1:
            temporary_folder.remove_leftovers(tmp_path)
        return made[-1]

    def sweep_around(descriptor: int) -> None:
        if len(made) == 2:  # found, and locked by another start
            other = os.open(made[-1], os.O_RDONLY)
            lock(other)
            try:
                lock(descriptor)
            finally:
                os.rmdir(made[-1])
                os.close(other)
        elif len(made) == 3:  # found, locked and removed
            os.rmdir(made[-1])
        lock(descriptor)

    monkeypatch.setattr(tempfile, "mkdtemp", make_and_sweep)
    monkeypatch.setattr(temporary_folder, "lock", sweep_around)
    folder = TemporaryFolder("adapter", tmp_path)
    assert len(made) == 4
    assert folder.path == made[-1]
    assert [str(path) for path in tmp_path.iterdir() if path.name.startswith("treepo")] == [folder.path]


def test_a_file_system_without_locks_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError("no locks")

    monkeypatch.setattr("fcntl.flock", no_locks)
    first = TemporaryFolder("adapter", tmp_path)
    second = TemporaryFolder("adapter", tmp_path)
    assert os.path.isdir(first.path)
    second.remove()
    assert not os.path.exists(second.path)
