"""What `doctor` says of this machine."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from ckptstore.blob.base import ObjectInfo
from ckptstore.blob.memory import MemoryBlobStore
from ckptstore.errors import CredentialsError
from ckptstore.ops.doctor import doctor, survival
from ckptstore.ops.open import Place
from ckptstore.repo.local import LocalTier


@pytest.mark.parametrize(
    ("first", "environ", "state", "told"),
    [
        (b"/sbin/init\0splash\0", {}, "ok", "until the machine goes down"),
        (b"/usr/lib/systemd/systemd\0--system\0", {"SLURM_JOB_ID": "7"}, "warning", "not the job step"),
        (
            b"python3\0train.py\0",
            {},
            "warning",
            "not this container: it ends with its first process, python3",
        ),
        (b"python3\0/opt/bin/ckptctl\0run\0--\0x\0", {"SLURM_JOB_ID": "7"}, "ok", "stays until their uploads"),
        (None, {}, "ok", "until the machine goes down"),
    ],
)
def test_doctor_says_which_deaths_a_staged_save_survives(
    tmp_path: Path, first: bytes | None, environ: dict[str, str], state: str, told: str
) -> None:
    if first is not None:
        (tmp_path / "1").mkdir()
        (tmp_path / "1" / "cmdline").write_bytes(first)
    check = survival(tmp_path, environ)
    assert (check.state, told in check.detail) == (state, True)
    assert (check.fix is not None) == (state == "warning")


def test_doctor_goes_on_and_cleans_up_when_a_head_is_refused() -> None:
    class Refusing(MemoryBlobStore):
        def head(self, key: str) -> ObjectInfo | None:
            raise CredentialsError("403")

    blob = Refusing("refusing")
    checks = {check.name: check for check in doctor(Place(None, {"s3": blob}))}
    assert (checks["s3: clock"].state, "403" in checks["s3: clock"].detail) == ("warning", True)
    assert "s3: list" in checks
    assert list(blob.list("")) == []


def test_doctor_says_that_a_local_tier_is_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    root = tmp_path / "ckpt"
    LocalTier(root).create()
    real = os.open
    monkeypatch.setattr(
        os, "open", lambda path, flags, *a, **k: (read_only if flags & os.O_CREAT else real)(path, flags, *a, **k)
    )
    monkeypatch.setattr(Path, "unlink", read_only)
    checks = {check.name: check for check in doctor(Place(LocalTier(root), {}))}
    commit = checks["local: commit"]
    assert (commit.state, commit.detail) == ("problem", "Read-only file system")
    assert "local: space" in checks, "the others are tried all the same"
