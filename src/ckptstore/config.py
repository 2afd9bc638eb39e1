"""Settings of a store: explicit, frozen, checked. Files and environment are read only at the edge."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ckptstore.errors import ConfigError


class StoreConfig(BaseModel):
    """How a :class:`~ckptstore.CheckpointStore` works. Rank 0's is used by all ranks.

    Raises:
        ConfigError: an unknown field, a wrong type, or values that contradict each other.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    deadline_s: float = Field(default=30.0, gt=0)
    """Longest wait of one rank for another inside ``save`` and ``load``; a peer later than that is reported as lost."""

    on_failure: Literal["warn", "raise"] = "warn"
    """What a ``save`` does when an earlier save of this store has failed: log and go on, or raise SaveFailedError."""

    overlap: bool = False
    """Return from ``save`` before parameters and optimizer state are copied; ``store.guard`` holds the next step."""

    back_pressure: Literal["wait", "skip", "fail"] = "wait"
    """When both arena generations are still being written: wait, skip this save, or raise SaveFailedError from it."""

    back_pressure_timeout_s: float = Field(default=600.0, gt=0)
    """With ``back_pressure="wait"``: longest wait before the save counts as failed. Training goes on."""

    check_replicas: Literal["off", "sample", "full"] = "sample"
    """Compare values that ranks hold as replicas: never; small ones always, large ones in turn; all of them."""

    fetch_once: Literal["per_node", "per_job"] = "per_node"
    """What several ranks need from a remote is fetched once per node, or once in the job and handed on to the other
    nodes over the ranks' own process group: worth it where replicas (DDP, HSDP) span nodes whose network is faster
    than the way to the remote."""

    remote_quorum: int | None = Field(default=None, ge=1)
    """Number of remotes that must hold a save before ``handle.remote`` resolves; None: all of them."""

    chunk_elements: int = Field(default=1 << 20, ge=1024, le=1 << 23)
    """Elements per chunk, the unit of digests, deduplication and deltas."""

    pack_bytes: int = Field(default=64 << 20, ge=1 << 20, le=1 << 32)
    """Objects uploaded to a remote are closed at about this size."""

    upload_concurrency: int = Field(default=4, ge=1, le=64)
    """Requests in flight per remote."""

    compress: bool = True
    """Encode chunks before upload; False sends them raw."""

    upload_bytes_per_s: float | None = Field(default=None, gt=0)
    """Cap on what one node sends to one remote, on average over seconds; None: as fast as it goes."""

    upload_schedule: tuple[tuple[str, float | None], ...] = ()
    """Caps by time of day: ``(("08:00", 5e6), ("20:00", None))``, local to the node, each until the next. Replaces
    ``upload_bytes_per_s``."""

    upload_backlog: int | None = Field(default=None, ge=1)
    """Skip a save's upload once so many newer ones of its line are on that remote or wait for it; None: send all.
    Pinned and emergency saves, and saves of several nodes, are always sent."""

    upload_superseded: bool = True
    """Also upload saves of an older timeline that a newer one has left behind; False skips them, unless pinned or
    emergency."""

    upload_give_up_seconds: float = Field(default=86400.0, gt=0)
    """Without trainers, a node agent whose remote can't be reached leaves after this long and logs what is pending;
    ``ckptctl push``, or the next job, sends it."""

    generations: Literal[1, 2] = 2
    """Arena generations per rank: with 2, a save can be taken while the previous one is still being written."""

    stage_on_disk: bool = True
    """Where memory is short, copy into a file on the local disk instead; training then waits for that disk, as long as
    it takes. False: such a save fails, and training goes on."""

    agent_cpus: int | None = Field(default=None, ge=1)
    """Most CPUs the node agent uses at a time; None: all, at the lowest priority. The newest to attach decides."""

    agent_idle_exit_seconds: float = Field(default=60.0, ge=0)
    """The node agent exits after this long without trainers and without work."""

    agent_start_timeout_s: float = Field(default=20.0, gt=0)
    """Longest wait for a node agent to start."""

    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    """Port on 127.0.0.1 where the node agent serves Prometheus metrics; 0: a free one, see status; None: nowhere."""

    hook_url: str | None = Field(default=None, repr=False)
    """Where the node agent POSTs a JSON document when a save fails, uploads fail or lag, bytes are damaged, or the disk
    fills: a URL, or ``"env:NAME"``, an environment variable of the trainer, since such URLs often hold a secret."""

    hook_command: tuple[str, ...] | None = None
    """A command the node agent runs then, with that document on its stdin; no shell."""

    hook_timeout_s: float = Field(default=10.0, gt=0, le=300)
    """Longest time for one try of a hook; it is killed then, and tried twice more."""

    hook_lag_seconds: float = Field(default=1800.0, gt=0)
    """Uploads that lag by more are told to the hooks."""

    hook_repeat_seconds: float = Field(default=3600.0, ge=0)
    """The same trouble is not told again within this time."""

    def __init__(self, **values: object) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "StoreConfig"
            raise ConfigError(
                f"StoreConfig: {where}: {first['msg']}", hint="see the docstrings of ckptstore.StoreConfig", key=where
            ) from None

    @field_validator("hook_url")
    @classmethod
    def _hook(cls, value: str | None) -> str | None:
        if value is not None and re.match(r"https?://[^/\s]|env:[A-Za-z_]", value) is None:
            raise ValueError("a hook is an http:// or https:// URL, or 'env:NAME'")
        return value

    @field_validator("hook_command")
    @classmethod
    def _command(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and not (value and value[0]):
            raise ValueError("a command needs at least the program's name, as in ('/usr/local/bin/page-me',)")
        return value

    @field_validator("upload_schedule")
    @classmethod
    def _times(cls, value: tuple[tuple[str, float | None], ...]) -> tuple[tuple[str, float | None], ...]:
        for begin, cap in value:
            if re.fullmatch(r"([01][0-9]|2[0-3]):[0-5][0-9]", begin) is None:
                raise ValueError(f"{begin!r} is not a time of day; write it as 'HH:MM'")
            if cap is not None and not cap > 0:
                raise ValueError(f"a cap of {cap} bytes a second would never send anything; use None for no cap")
        if len({begin for begin, _ in value}) != len(value):
            raise ValueError("a time of day is there twice")
        return value

    @model_validator(mode="after")
    def _fits(self) -> StoreConfig:
        if self.upload_schedule and self.upload_bytes_per_s is not None:
            raise ValueError(
                "upload_schedule replaces upload_bytes_per_s: give one of them; a schedule may have a single entry"
            )
        if self.generations == 1 and self.back_pressure == "skip":
            raise ValueError(
                "generations=1 with back_pressure='skip' would skip every save that comes while one is written; "
                "use generations=2 or back_pressure='wait'"
            )
        return self
