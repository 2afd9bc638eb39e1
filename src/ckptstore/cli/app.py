"""The command group: finds verbs by name, turns errors into sentences and exit codes."""

from __future__ import annotations

import difflib
import gc
import importlib
import json
import logging
import os
import sys
from typing import Any

import click

from ckptstore.cli.options import Settings, shared_options
from ckptstore.errors import CkptError, ConfigError
from ckptstore.logs import log_json, wants_json

#: Verb -> the line `ckptctl --help` shows. The verb lives in `cli/verbs/<name>.py` as `command`.
VERBS = {
    "list": "Show the checkpoints of a store, with tiers, sizes and metrics.",
    "show": "Show one checkpoint in detail.",
    "restore": "Rebuild a local tier from a remote, on a fresh node.",
    "pull": "Download what the local store lacks.",
    "export": "Write a checkpoint as safetensors, a DCP directory, or a torch.save file.",
    "import": "Make a checkpoint of safetensors, a DCP directory, or a torch.save file.",
    "drill": "Restore into scratch, verify, and say how long a recovery takes.",
    "verify": "Check structure, or every byte, and say what is damaged.",
    "push": "Upload what the remote lacks.",
    "diff": "Show what changed between two checkpoints, per parameter.",
    "pin": "Keep checkpoints whatever retention says.",
    "unpin": "Let retention decide about checkpoints again.",
    "delete": "Remove checkpoints, manifest first.",
    "gc": "Delete from buckets what no checkpoint needs, a grace later.",
    "status": "Say what would be lost if this process, machine or site died now.",
    "dashboard": "Show in a browser whether training is safe, and how it goes.",
    "plot": "Write a report of a run: curves, checkpoints, sizes.",
    "doctor": "Try what a store needs, and name a fix for each finding.",
    "run": "Run a command, pass signals on, wait for its uploads.",
    "agent": "Look after the node agent: status, serve, unit, logs, stop.",
    "config": "Show every setting in force, and where it comes from.",
    "completion": "Print the completion script of your shell.",
    "demo": "Train, lose the machine, restore, go on with the same losses.",
    "version": "Print versions.",
}

#: Words that make a command stay: there, cycles must go.
LASTING = frozenset({"agent", "dashboard", "run", "demo", "--watch"})

EXIT_CODES = """\b
Exit codes:
  0 ok   1 unexpected   2 usage or configuration   3 finished with findings
  10 no store   11 locked   12 credentials   13 no such checkpoint   14 exists
  15 no space   20 damage   21 incomplete   22 format   23 state mismatch
  30 save failed   75 temporary, try again   130, 138, 143 signals"""


class VerbGroup(click.Group):
    """Imports a verb's module only when that verb is used, so that `list` never pays for `doctor`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"ckptstore.cli.verbs.{cmd_name}_")
        command: click.Command = module.command
        command.short_help = VERBS[cmd_name]
        command.epilog = EXIT_CODES
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in VERBS and not name.startswith("-"):
            close = difflib.get_close_matches(name, VERBS, n=1)
            hint = f" Did you mean '{close[0]}'?" if close else ""
            raise click.UsageError(f"No such verb '{name}'.{hint}", ctx)
        return super().resolve_command(ctx, args)


@click.group(
    cls=VerbGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EXIT_CODES,
    subcommand_metavar="VERB ...",
)
@shared_options
def cli(**_: Any) -> None:
    """Look after checkpoints: where each one is, whether it is whole, and how to get it back.

    \b
    Examples:
      ckptctl list /data/ckpt
      ckptctl restore s3://bucket/prefix --to /data/ckpt
      ckptctl -s /data/ckpt --json status

    STORE is a local root or a remote URL (s3://, oss://, file://). Without one, CKPTSTORE_LOCAL and
    CKPTSTORE_REMOTE are used. STEP is a number, latest, latest~2, best, best:METRIC, best:METRIC:max, or a save id.
    """


def _report(error: CkptError, *, as_json: bool) -> int:
    code = error.exit_code
    if as_json:
        record = {
            "message_type": "exit_error",
            "code": code,
            "error": type(error).__name__,
            "message": error.message,
            "hint": error.hint,
        }
        print(json.dumps(record), file=sys.stderr)
    elif _logs_json():
        logging.getLogger("ckptctl").error(error.message, exc_info=(type(error), error, None))
    else:
        print(f"ckptctl: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"  hint: {error.hint}", file=sys.stderr)
    return code


def main(argv: list[str] | None = None) -> None:
    """Entry point of `ckptctl`; always ends in SystemExit with a documented code."""
    if argv is None and not LASTING.intersection(sys.argv):
        # The process is ours, and short. Imports and catalogues make objects that stay; to look for cycles among them
        # took a sixth of its time.
        gc.set_threshold(100_000, 50, 50)
    args = sys.argv[1:] if argv is None else argv
    as_json = "--json" in args
    try:
        if wants_json():
            log_json(
                "ckptctl", "ckptstore", level=logging.DEBUG if "-v" in args or "--verbose" in args else logging.INFO
            )
        code = cli.main(args=args, prog_name="ckptctl", standalone_mode=False, obj=Settings())
    except click.exceptions.Abort:
        code = 130
        print("ckptctl: interrupted", file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
        print("ckptctl: interrupted", file=sys.stderr)
    except click.ClickException as error:
        code = _report_usage(error, as_json=as_json)
    except CkptError as error:
        code = _report(error, as_json=as_json)
    except BrokenPipeError:
        # The reader went away (`ckptctl list | head`); that is not an error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    raise SystemExit(code or 0)


def _logs_json() -> bool:
    """Whether errors go to stderr as log lines; a format nobody knows is told as text."""
    try:
        return wants_json()
    except ConfigError:
        return False


def _report_usage(error: click.ClickException, *, as_json: bool) -> int:
    """In the same words as any other error; where people read it, below the verb's usage line."""
    if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):  # click 8.1 has none
        error.show()  # all the help there is: nothing was asked for
        return error.exit_code
    context = error.ctx if isinstance(error, click.UsageError) else None
    if context is not None and not as_json and not _logs_json():
        print(context.get_usage(), file=sys.stderr)
    verb = context.command_path if context is not None else "ckptctl"
    message = " ".join(error.format_message().split())
    return _report(ConfigError(message, hint=f"see '{verb} --help'"), as_json=as_json)
