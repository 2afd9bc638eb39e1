"""`ckptctl agent`."""

from __future__ import annotations

import math
from pathlib import Path

import click

from ckptstore.cli.options import Settings, verb
from ckptstore.cli.output import note, plain, print_json
from ckptstore.cli.queues import queue_line
from ckptstore.errors import ConfigError, NotFoundError
from ckptstore.ops.open import is_url
from ckptstore.ops.words import counted

UNIT = """\
# {path}
[Unit]
Description=ckptstore node agent of {title}
RequiresMountsFor={root}

[Service]
Type=notify
ExecStart={command} -s {argument} agent serve --timeout {drain}
Restart=on-failure
KillMode=mixed
TimeoutStopSec={stop}
OOMPolicy=continue
UMask=0077
{user}
[Install]
WantedBy={target}
"""
DRAIN_S = 600.0
#: The user's service manager itself is killed 120 s after it was told to stop.
UNIT_DRAIN_S = 90.0
#: After the drain: the last uploads are broken off, and the hooks hear of it.
LAST_WORDS_S = 30


@verb()
@click.argument("action", type=click.Choice(["status", "serve", "unit", "logs", "stop"]))
@click.option(
    "--timeout", "timeout_s", type=float, help="stop, serve, unit: seconds to drain.  [default: 600, of a unit 90]"
)
@click.option("-n", "--lines", type=int, help="logs: only the last N lines.")
@click.option("--user", help="unit: of the system's manager, to serve as this user.")
def command(
    settings: Settings, action: str, timeout_s: float | None, lines: int | None, user: str | None
) -> int | None:
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
      ckptctl -s /data/ckpt agent unit --user alice --timeout 30
    """
    store = settings.store_or_environment
    if store is None or is_url(store):
        raise ConfigError("name a local store", hint=f"ckptctl -s /data/ckpt agent {action}")
    root = Path(store).absolute()
    if action == "serve":
        from ckptstore.agent.__main__ import main as serve

        return serve(
            ["--root", str(root), "--stay", "--drain-seconds", str(DRAIN_S if timeout_s is None else timeout_s)]
        )
    if action == "unit":
        print(_unit(root, UNIT_DRAIN_S if timeout_s is None else timeout_s, user), end="")
        return None
    if action == "logs":
        _print_log(root, lines)
        return None
    return _running(settings, root, action, DRAIN_S if timeout_s is None else timeout_s)


def _unit(root: Path, drain_s: float, user: str | None) -> str:
    import shutil

    return UNIT.format(
        path=f"{'/etc/systemd/system' if user else '~/.config/systemd/user'}/ckptstore-agent.service",
        title=str(root).replace("%", "%%"),
        root=_word(str(root)),
        argument=_word(str(root)).replace("$", "$$"),
        command=_word(shutil.which("ckptctl") or "ckptctl"),
        drain=f"{drain_s:g}",
        stop=math.ceil(drain_s) + LAST_WORDS_S,
        user=f"User={user}\n" if user else "",
        target="multi-user.target" if user else "default.target",
    )


def _word(text: str) -> str:
    """One word in a unit file. Source: systemd.syntax(7), systemd.unit(5)"""
    text = text.replace("%", "%%")
    if set(text) & set(" \t'\"\\;"):
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return text


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
