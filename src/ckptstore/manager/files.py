"""Tokenizers and processors: what ``save_pretrained`` writes, kept as files inside the checkpoint."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ckptstore.errors import StateError

#: A tokenizer's files are a few MB; a model saved by mistake is not.
MAX_BYTES = 256 << 20


class FileSet:
    """The files of one object with ``save_pretrained``, written once and kept: tokenizers don't change in training."""

    def __init__(self, name: str, source: Any) -> None:
        self._name, self._source = name, source
        self._tensors: dict[str, torch.Tensor] | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Relative path -> its bytes. Deduplicated in remotes, since they never change.

        Raises:
            StateError: the object can't write itself, or writes too much.
        """
        if self._tensors is None:
            with tempfile.TemporaryDirectory(prefix="ckptstore-") as folder:
                try:
                    self._source.save_pretrained(folder)
                except Exception as error:
                    raise StateError(
                        f"{self._name!r} could not write itself: {type(error).__name__}: {error}", key=self._name
                    ) from error
                self._tensors = self._read(Path(folder))
        return self._tensors

    def differences(self, stored: Mapping[str, torch.Tensor]) -> list[str]:
        """Which files differ from the stored ones, in words."""
        current = self.tensors()
        return [
            f"{name}: {'absent' if name not in stored else 'absent now' if name not in current else 'differs'}"
            for name in sorted({*stored, *current})
            if name not in stored or name not in current or not torch.equal(stored[name], current[name])
        ]

    def _read(self, folder: Path) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        size = 0
        for path in sorted(folder.rglob("*")):
            if not path.is_file() or path.is_symlink():
                continue
            size += path.stat().st_size
            if size > MAX_BYTES:
                raise StateError(
                    f"{self._name!r} writes more than {MAX_BYTES >> 20} MiB with save_pretrained",
                    hint="track a model as a module: track(model=model)",
                    key=self._name,
                )
            found[path.relative_to(folder).as_posix()] = torch.from_numpy(np.fromfile(path, dtype=np.uint8))
        return found


def file_bytes(stored: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
    """Stored files as relative path -> bytes, to be written wherever the user likes."""
    return {name: tensor.numpy().tobytes() for name, tensor in stored.items()}
