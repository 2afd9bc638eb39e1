"""How long this process has after a signal, and when its allocation ends: read from the environment once."""

from __future__ import annotations

from collections.abc import Mapping

from ckptstore.errors import ConfigError

#: torchrun sends SIGKILL 30 s after a forwarded signal; Kubernetes and SLURM (KillWait) do so by default too.
#: Source: torch.distributed.elastic.multiprocessing.api.PContext.close; terminationGracePeriodSeconds; slurm.conf.
DEFAULT_GRACE_SECONDS = 25.0


def grace_of(given: float | None, environ: Mapping[str, str]) -> float:
    """Seconds between the signal and the kill: the argument, else ``$CKPTSTORE_GRACE_SECONDS``, else 25.

    Raises:
        ConfigError: not a positive number.
    """
    value: float | str = given if given is not None else environ.get("CKPTSTORE_GRACE_SECONDS", DEFAULT_GRACE_SECONDS)
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0
    if not seconds > 0:
        raise ConfigError(f"grace_seconds is {value!r}", hint="a number of seconds > 0")
    return seconds


def end_of_allocation(environ: Mapping[str, str]) -> float | None:
    """Unix time at which the scheduler ends this job, where it says so (SLURM >= 22.05: ``SLURM_JOB_END_TIME``)."""
    try:
        return float(environ["SLURM_JOB_END_TIME"])
    except (KeyError, ValueError):
        return None
