"""`ckptctl doctor`."""

from __future__ import annotations

from ckptstore.cli.opened import opened
from ckptstore.cli.options import Settings, store_argument, verb
from ckptstore.cli.output import plain, print_json
from ckptstore.ops.doctor import doctor

_MARKS = {"ok": "ok      ", "warning": "WARNING ", "problem": "PROBLEM "}


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
            print(plain(f"{_MARKS[check.state]}{check.name}: {check.detail}"))
            if check.fix:
                print(plain(f"        fix: {check.fix}"))
    return 3 if any(check.state == "problem" for check in checks) else 0
