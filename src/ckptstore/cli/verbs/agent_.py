"""`ckptctl agent`."""

from __future__ import annotations

from pathlib import Path

import click

from ckptstore.cli.options import Settings, verb
from ckptstore.cli.output import note, plain, print_json
from ckptstore.cli.queues import queue_line
from ckptstore.errors import ConfigError, NotFoundError
from ckptstore.ops.open import is_url
from ckptstore.ops.words import counted

UNIT = """\
# ~/.config/systemd/user/ckptstore-agent.service
[Unit]
Description=ckptstore node agent of {root}

[Service]
ExecStart={command} -s {root} agent serve
Restart=on-failure
RestartPreventExitStatus=11
KillSignal=SIGTERM
TimeoutStopSec=120
UMask=0077

[Install]
WantedBy=default.target
"""


@verb()
@click.argument("action", type=click.Choice(["status", "serve", "unit", "logs", "stop"]))
@click.option("--timeout", "timeout_s", default=600.0, show_default=True, help="stop, serve: seconds to drain.")
@click.option("-n", "--lines", type=int, help="logs: only the last N lines.")
def command(settings: Settings, action: str, timeout_s: float, lines: int | None) -> int | None:
    """Look after the agent of a local tier. Trainers start one by themselves; `serve` makes it a service.

    \b
      status   whether one runs, and what it is doing
      serve    be the agent, in the foreground, until told to stop
      unit     print a systemd unit that serves
      logs     print its log
      stop     let it finish its uploads, then stop it

    \b
    Examples:
      ckptctl -s /data/ckpt agent logs -n 50
      ckptctl -s /data/ckpt agent stop --timeout 60
      ckptctl -s /data/ckpt agent unit > ckptstore-agent.service
    """
    store = settings.store_or_environment
    if store is None or is_url(store):
        raise ConfigError("name a local store", hint=f"ckptctl -s /data/ckpt agent {action}")
    root = Path(store).absolute()
    if action == "serve":
        from ckptstore.agent.__main__ import main as serve

        forever = str(10 * 365 * 86400)
        return serve(["--root", str(root), "--idle-exit-seconds", forever, "--drain-seconds", str(timeout_s)])
    if action == "unit":
        import shlex
        import shutil

        print(UNIT.format(root=shlex.quote(str(root)), command=shutil.which("ckptctl") or "ckptctl"), end="")
        return None
    if action == "logs":
        _print_log(root, lines)
        return None
    return _running(settings, root, action, timeout_s)


def _print_log(root: Path, lines: int | None) -> None:
    from ckptstore.agent.runtime import RuntimeDir

    path = RuntimeDir.of(root).log
    if not path.exists():
        raise NotFoundError(f"no agent has run for {root} as this user")
    text = path.read_text(errors="replace").splitlines()
    for line in text if lines is None else text[max(0, len(text) - lines) :]:
        print(plain(line))


def _running(settings: Settings, root: Path, action: str, timeout_s: float) -> int | None:
    from ckptstore.agent.client import AgentClient

    client = AgentClient.observe(root)
    try:
        status = client.status() if client is not None else None
        is_stopped = client.stop(timeout_s=timeout_s) if client is not None and action == "stop" else None
    finally:
        if client is not None:
            client.close()
    if settings.as_json:
        print_json(agent=status, **({"stopped": bool(is_stopped)} if action == "stop" else {}))
    elif status is None:
        note("no agent is running")
    elif action == "stop":
        note("stopped" if is_stopped else "it is still finishing its work, and leaves then")
    else:
        print(f"pid {status['pid']}, up {status['uptime_seconds']:.0f} s, {counted(status['trainers'], 'trainer')}")
        for name, run in status["runs"].items():
            for remote, said in run["remotes"].items():
                print(queue_line(name, remote, said))
    return 75 if action == "stop" and is_stopped is False else None
