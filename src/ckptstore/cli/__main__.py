"""``python -m ckptstore.cli``: the same as `ckptctl`, for where scripts are not on PATH."""

from ckptstore.cli.app import main

main()
