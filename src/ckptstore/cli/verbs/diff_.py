"""`ckptctl diff`."""

from __future__ import annotations

import fnmatch
import math

import click

from ckptstore.cli.opened import opened
from ckptstore.cli.options import STEP_OF_RUN, Settings, names_store, verb
from ckptstore.cli.output import plain, print_json, print_table
from ckptstore.errors import ConfigError
from ckptstore.ops.words import counted, human_bytes

_MARKS = {"unchanged": "=", "changed": "~", "added": "+", "removed": "-", "retyped": "!"}


@verb()
@click.argument("words", metavar="[STORE] A [B]", nargs=-1)
@click.option("--only", metavar="GLOB", help="Only tensors whose name matches.")
@click.option("--norms", is_flag=True, help="Read what changed, and say by how much (L2 norm of B - A).")
@click.option("--runs", is_flag=True, help="A and B are runs: at which step, and in which tensor, do they part?")
@click.option("--all", "everything", is_flag=True, help="Also list what is unchanged.")
def command(
    settings: Settings, words: tuple[str, ...], only: str | None, norms: bool, runs: bool, everything: bool
) -> None:
    """Show what changed between two checkpoints, per parameter.

    A and B are STEPs, or RUN/STEP for one of another run; without B, the newest checkpoint. With --runs they are runs.

    Digests are compared; bytes are read only for --norms, or where the two were sharded differently.

    \b
    Examples:
      ckptctl diff /data/ckpt 1200 1400
      ckptctl -s /data/ckpt diff latest~1 latest --norms --only 'model.*'
      ckptctl -s /data/ckpt diff bert/1200 bert-retry/1200
      ckptctl -s /data/ckpt diff --runs bert bert-retry
    """
    a, b = _two(settings, words, runs=runs)
    if runs:
        _print_parting(settings, a, b)
        return
    from ckptstore.ops.compare import Difference, compare
    from ckptstore.repo.reader import CheckpointReader

    with opened(settings, with_remote=True) as place:
        readers, infos = [], []
        for text in (a, b):
            run, slash, step = text.rpartition("/")
            tiers = place.tiers(place.choose_run(run if slash else settings.run))
            record = tiers.catalog().resolve(step)
            infos.append(record.info())
            readers.append(CheckpointReader(record, tiers.local, tiers.remotes))
        with readers[0], readers[1]:
            changes = compare(readers[0], readers[1], norms=norms)
            found = tuple(c for c in changes if only is None or fnmatch.fnmatchcase(c.name, only))
    if only is not None and not found:
        raise ConfigError(f"no tensor matches {only!r}", hint="`ckptctl show` lists the names")
    difference = Difference(infos[0], infos[1], found)
    counts = {state: difference.count(state) for state in _MARKS}
    changed_bytes = sum(change.changed_bytes for change in found)
    first = difference.first
    if settings.as_json:
        print_json(
            a=infos[0].to_json(),
            b=infos[1].to_json(),
            changes=[change.to_json() for change in found],
            counts=counts,
            changed_bytes=changed_bytes,
            first_difference=None if first is None else first.name,
        )
        return
    rows = [
        [_MARKS[c.state], c.name, c.dtype, human_bytes(c.size_bytes), human_bytes(c.changed_bytes)]
        + ([_norm(c.norm), _norm(c.relative)] if norms else [])
        for c in found
        if everything or c.state != "unchanged"
    ]
    if rows:
        headers = ["", "TENSOR", "DTYPE", "SIZE", "CHANGED"] + (["NORM", "RELATIVE"] if norms else [])
        print_table(headers, rows, right=frozenset({"SIZE", "CHANGED", "NORM", "RELATIVE"}), flexible=("TENSOR",))
    told = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    print(f"{told}; {human_bytes(changed_bytes)} differ")
    if first is not None:
        print(plain(f"first difference: {first.name} ({first.state})"))


def _two(settings: Settings, words: tuple[str, ...], *, runs: bool) -> tuple[str, str]:
    """A and B of ``[STORE] A [B]``; the store counts like ``--store``. Of runs both must be named."""
    known = settings.is_store_known
    if len(words) == 3 if runs else words and names_store(words[0], is_known=known, step=STEP_OF_RUN):
        settings.store, words = words[0], words[1:]
    if not words or (runs and len(words) == 1):
        raise click.UsageError(f"Missing argument '{'B' if words else 'A'}': {'a run' if runs else 'a STEP'}.")
    if len(words) > 2:
        raise click.UsageError(f"Two are compared, not {len(words)}: {' '.join(map(repr, words))}.")
    return words[0], words[1] if len(words) == 2 else "latest"


def _norm(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _print_parting(settings: Settings, a: str, b: str) -> None:
    from ckptstore.ops.compare import parting

    with opened(settings, with_remote=True) as place:
        found = parting(place.tiers(place.choose_run(a)), place.tiers(place.choose_run(b)))
    if settings.as_json:
        print_json(
            runs=[a, b],
            num_compared=found.num_compared,
            last_equal_step=found.last_equal_step,
            step=found.step,
            first_difference=None if found.change is None else found.change.to_json(),
        )
        return
    if found.last_equal_step is not None:
        print(plain(f"{a} and {b} are equal up to step {found.last_equal_step}"))
    if found.change is None:
        print(f"no difference at any of the {counted(found.num_compared, 'step')} both have")
        return
    size = "" if found.change.norm is None else f", norm {_norm(found.change.norm)}"
    if found.change.relative is not None and math.isfinite(found.change.relative):
        size += f", relative {_norm(found.change.relative)}"
    print(plain(f"first difference: step {found.step}, {found.change.name} ({found.change.state}{size})"))
