"""`ckptctl import`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import click

from ckptstore.cli.options import Settings, verb
from ckptstore.cli.output import note, plain, print_json
from ckptstore.cli.progress import transfer_bar
from ckptstore.cli.torch_side import foreign
from ckptstore.errors import ConfigError
from ckptstore.format.foreign import ForeignState
from ckptstore.format.manifest import check_run_name
from ckptstore.ops.importing import import_state, open_safetensors
from ckptstore.ops.open import is_url
from ckptstore.ops.words import counted, human_bytes
from ckptstore.repo.local import LocalTier


@verb()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--step", metavar="N", required=True, type=click.IntRange(0), help="The step it becomes.")
@click.option("--under", metavar="KEY", help="Put all tensors of safetensors files below this top-level key.")
@click.option("--trust-pickle", is_flag=True, help="Read pickles, which run whatever code they hold.")
def command(settings: Settings, path: Path, step: int, under: str | None, trust_pickle: bool) -> None:
    """Make a checkpoint of files from elsewhere: safetensors, a DCP directory, or a torch.save file.

    The checkpoint is committed to the local store named by -s, which is made if there is none; `ckptctl push` uploads
    it. Reading safetensors and DCP directories runs no code from them: a DCP directory's .metadata is a pickle, but
    it is read by a reader that builds nothing it names. Values in it that only a pickle can bring back, and torch.save
    files, need --trust-pickle.

    \b
    Examples:
      ckptctl -s /data --run base import m.safetensors --step 0 --under model
      ckptctl -s /data/ckpt --run old import /data/stock-dcp --step 12000
      ckptctl -s /data/ckpt --run old import state.pt --step 12000 --trust-pickle
    """
    store = settings.store_or_environment
    if store is None or is_url(store):
        raise ConfigError("import writes to a local store", hint="ckptctl -s /data/ckpt import ...; then push")
    run = check_run_name(settings.run or "default")
    with (
        _source(path, under, trust_pickle) as state,
        transfer_bar("importing", quiet=settings.quiet or settings.as_json) as progress,
    ):
        record = import_state(LocalTier(Path(store).absolute()), run, step, state, progress=progress)
    info = record.info()
    if settings.as_json:
        print_json(
            checkpoint=info.to_json(), num_tensors=len(state.tensors), path=str(record.local and record.local.path)
        )
        return
    print(
        f"step {info.step} of run {plain(run)}: {counted(len(state.tensors), 'tensor')}, {human_bytes(info.size_bytes)}"
    )
    note(f"go on with CheckpointStore({store!r}, run={run!r}).load(state)")


def _source(path: Path, under: str | None, trust_pickle: bool) -> AbstractContextManager[ForeignState]:
    """What the path is, by what is there."""
    if not path.exists():
        raise ConfigError(f"there is no {path}", hint="PATH is a file, or a folder, that is there", path=str(path))
    is_dcp = path.is_dir() and (path / ".metadata").is_file()
    if not is_dcp and (path.is_dir() or path.suffix == ".safetensors"):
        return open_safetensors(path, under=under)
    if under is not None:
        raise ConfigError("--under is for safetensors files", hint="other files bring their own keys")
    module = foreign("reading DCP directories and torch.save files")
    opener = module.open_dcp if is_dcp else module.open_torch_file
    opened: AbstractContextManager[ForeignState] = opener(path, trust_pickle=trust_pickle)
    return opened
