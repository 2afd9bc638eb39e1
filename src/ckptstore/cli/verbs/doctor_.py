"""`ckptctl doctor`."""

from __future__ import annotations

from ckptstore.cli.opened import opened
from ckptstore.cli.options import Settings, store_argument, verb
from ckptstore.cli.output import print_json, print_wrapped
from ckptstore.ops.doctor import doctor

_MARKS = {"ok": ("ok       ", "good"), "warning": ("WARNING  ", "doubtful"), "problem": ("PROBLEM  ", "bad")}


@verb()
@store_argument
def command(settings: Settings) -> int:
    """Try what a store needs, by doing it in a scratch place, and name a fix for each finding.

    \b
    Examples:
      ckptctl doctor /data/ckpt
      ckptctl doctor s3://bucket/prefix --json
    """
    with opened(settings, with_remote=True, must_exist=False) as place:
        checks = doctor(place)
    if settings.as_json:
        print_json(checks=[check.to_json() for check in checks])
    else:
        for check in checks:
            mark, meaning = _MARKS[check.state]
            print_wrapped(mark, f"{check.name}: {check.detail}", meaning)
            if check.fix:
                print_wrapped("         fix: ", check.fix)
    return 3 if any(check.state == "problem" for check in checks) else 0
