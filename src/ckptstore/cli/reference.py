"""The command line's reference page, made from the commands themselves: ``python -m ckptstore.cli.reference``."""

from __future__ import annotations

import inspect
import sys

import click

from ckptstore.cli.app import EXIT_CODES, VERBS, cli

SHARED = {"store", "remote", "run", "as_json", "quiet", "verbose"}


def page() -> str:
    """The whole page, as Markdown."""
    context = click.Context(cli, info_name="ckptctl")
    parts = [
        "# `ckptctl`",
        "",
        "Made from the commands by `python -m ckptstore.cli.reference > docs/reference/cli.md`; a test keeps it so.",
        "",
        "```",
        "ckptctl [-s/--store STORE] [--remote URL] [--run RUN] [--json] [-q|-v] VERB ...",
        "```",
        "",
        _text(cli),
        "",
        "These options stand before or after the verb:",
        "",
        *_options(cli, context, shared=True),
        "",
        "```",
        inspect.cleandoc(EXIT_CODES.removeprefix("\b\n")),
        "```",
    ]
    for name, line in VERBS.items():
        command = cli.get_command(context, name)
        assert command is not None
        below = click.Context(command, info_name=name, parent=context)
        usage = " ".join(command.collect_usage_pieces(below))
        parts += [
            "",
            f"## `{name}`",
            "",
            line,
            "",
            "```",
            f"ckptctl {name} {usage}".rstrip(),
            "```",
            "",
            _text(command),
        ]
        if options := _options(command, below, shared=False):
            parts += ["", *options]
    return "\n".join(parts) + "\n"


def _text(command: click.Command) -> str:
    """The help text, its blocks that must not be wrapped as code."""
    blocks = inspect.cleandoc(command.help or "").split("\n\n")
    made = []
    for block in blocks:
        lines = block.split("\n")
        if lines[0].strip() == "\b":
            made.append("```\n" + inspect.cleandoc("\n".join(lines[1:])) + "\n```")
        else:
            made.append(" ".join(line.strip() for line in lines))
    return "\n\n".join(made)


def _options(command: click.Command, context: click.Context, *, shared: bool) -> list[str]:
    rows = []
    for option in command.get_params(context):
        record = option.get_help_record(context)
        if not isinstance(option, click.Option) or record is None or "--help" in option.opts:
            continue
        if (option.name in SHARED) == shared:
            rows.append(f"| `{record[0].replace('|', chr(92) + '|')}` | {record[1]} |")
    return ["| option | |", "|---|---|", *rows] if rows else []


if __name__ == "__main__":
    sys.stdout.write(page())
