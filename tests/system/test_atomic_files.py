"""Files that are whole or not there."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from spade_faiss.errors import GalleryError, KeyConflictError, OutputError
from spade_faiss.system import atomic_files
from spade_faiss.system.atomic_files import DeferredErrorFile, output_errors, publish, storage_errors, write_whole


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What reaches the disk, in order: fsync of a file or folder (with the file's size then), and renames."""
    done: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        found = os.fstat(descriptor)
        done.append("fsync folder" if stat.S_ISDIR(found.st_mode) else f"fsync file of {found.st_size}")
        real_fsync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        done.append(f"rename to {Path(target).name}")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    return done


def test_bytes_are_on_disk_before_the_name_and_the_name_before_it_returns(tmp_path: Path, steps: list[str]) -> None:
    write_whole(tmp_path / "a", b"12345")
    assert steps == ["fsync file of 5", "rename to a", "fsync folder"]
    steps.clear()
    (tmp_path / "b.tmp").write_bytes(b"123")
    publish(tmp_path / "b.tmp", tmp_path / "b")
    assert steps == ["fsync file of 3", "rename to b", "fsync folder"]


@pytest.mark.parametrize("failing", range(3))
def test_a_file_is_old_or_new_whichever_step_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    path = tmp_path / "a"
    write_whole(path, b"old")
    calls = 0

    def step(real: object) -> object:
        def run(*args: object) -> object:
            nonlocal calls
            calls += 1
            if calls == failing + 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args)  # type: ignore[operator]

        return run

    monkeypatch.setattr(os, "fsync", step(os.fsync))
    monkeypatch.setattr(Path, "replace", step(Path.replace))
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, b"the new")
    assert path.read_bytes() == (b"the new" if failing == 2 else b"old")
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_seen_under_the_name_until_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen = tmp_path / "a", []
    write_whole(path, b"old")
    real = os.fsync

    def look(descriptor: int) -> None:
        seen.append(path.read_bytes())
        real(descriptor)

    monkeypatch.setattr(os, "fsync", look)
    write_whole(path, b"new" * 1000)
    assert seen == [b"old", b"new" * 1000]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "x"), "doing: No space left on device; free some space"),
        (OSError(errno.EROFS, "x"), "doing: Read-only file system; it is on a read-only"),
        (PermissionError(errno.EACCES, "x"), "doing: Permission denied; check who owns it"),
        (OSError("Can't write\n(errno = 28, error message = 'No space left')"), "doing: No space left on device; free"),
        (RuntimeError("Error in write:\n  no"), "doing: Error in write:"),
    ],
)
@pytest.mark.parametrize(("context", "kind"), [(storage_errors, GalleryError), (output_errors, OutputError)])
def test_errors_of_the_disk_become_one_line_with_advice(
    context: Any, kind: type[Exception], error: Exception, expected: str
) -> None:
    with pytest.raises(kind) as caught, context("doing"):
        raise error
    assert type(caught.value) is kind
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


def test_errors_of_our_own_and_of_the_caller_pass_unchanged() -> None:
    for error in (KeyConflictError("mine"), KeyError("a mistake, not the disk")):
        for context in (storage_errors, output_errors):
            with pytest.raises(type(error)) as caught, context("doing"):
                raise error
            assert caught.value is error


DEV_FULL = Path("/dev/full")  # the disk that is always full


@pytest.mark.skipif(not DEV_FULL.exists(), reason="there is no /dev/full here")
def test_a_full_disk_is_named() -> None:
    with pytest.raises(GalleryError, match="No space left"), storage_errors("doing"):
        DEV_FULL.write_bytes(b"x")


@pytest.mark.skipif(not DEV_FULL.exists(), reason="there is no /dev/full here")
def test_a_patient_file_keeps_the_error_until_it_is_asked() -> None:
    with DeferredErrorFile(DEV_FULL) as file:
        file.check()
        assert file.write(b"12345") == 5
        assert file.write(b"678") == 3
        for _ in range(2):
            with pytest.raises(OSError, match="No space left"):
                file.check()


def test_a_patient_file_does_what_a_file_does(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic_files, "PENDING", 40)
    with DeferredErrorFile(tmp_path / "patient") as patient, (tmp_path / "plain").open("w+b", buffering=0) as plain:
        for step in range(400):
            data, place = rng.bytes(int(rng.integers(0, 30))), int(rng.integers(0, 300))
            match step % 7:
                case 0:
                    assert patient.seek(place) == plain.seek(place)
                case 1:
                    whence = int(rng.integers(1, 3))
                    assert patient.seek(5, whence) == plain.seek(5, whence)
                case 2:
                    read, expected = bytearray(7), bytearray(7)
                    patient.readinto(read)
                    plain.readinto(expected)  # type: ignore[attr-defined]
                    assert read == expected
                case 3 if step % 5 == 0:
                    assert patient.truncate() == plain.truncate()
                case _:
                    assert patient.write(data) == plain.write(data)
            assert patient.tell() == plain.tell()
        patient.check()
    assert (tmp_path / "patient").read_bytes() == (tmp_path / "plain").read_bytes()


def test_a_patient_file_is_a_file(tmp_path: Path, rng: np.random.Generator) -> None:
    values = rng.standard_normal((50, 40))
    with DeferredErrorFile(tmp_path / "a.h5") as disk:
        with h5py.File(disk, "w", libver="latest") as file:
            grown = file.create_dataset("x", (0, 40), maxshape=(None, 40), chunks=(7, 40), dtype="f8")
            for row in range(50):
                grown.resize(row + 1, axis=0)
                grown[row] = values[row]
        disk.check()
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["x"][:].tobytes() == values.tobytes()
