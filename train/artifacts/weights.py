"""Weights in an artifact of W&B, for ``init_from``: a checkpoint, or files that others made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from train.artifacts.fetch import Listing, fetch, refused_files
from train.artifacts.restore import files_of_checkpoint, install_fetched, is_checkpoint
from train.checkpoint.received import RUN
from train.checkpoint.weight_files import INDEX, PARAMETERS, TORCH_SUFFIXES
from train.checkpoint.weight_source import WeightSource, find_source
from train.exits import UsageError
from train.suggest import listed

_SUFFIXES = (".safetensors", *TORCH_SUFFIXES)


def artifact_weights(name: str, download: Path, where: str) -> WeightSource:
    """The checked weights of an artifact (``entity/project/name:alias``), which is downloaded into
    the new directory ``download``. ``where`` begins messages: field, value and origin.

    Raises what :func:`train.checkpoint.weight_source.find_source` raises.
    """
    download.mkdir(mode=0o700)
    chosen: list[str] = []
    holds_checkpoint = False

    def choose(listing: Listing) -> list[str]:
        nonlocal holds_checkpoint
        holds_checkpoint = is_checkpoint(listing) and not {PARAMETERS, INDEX} & {*listing.sizes}
        chosen[:] = (files_of_checkpoint if holds_checkpoint else _weight_files)(listing, where)
        return chosen

    staging = download / "artifact"
    with refused_files(where):
        listing = fetch(name, staging, where, choose)
        if holds_checkpoint:
            path = download / RUN
            path.mkdir(mode=0o700)
            install_fetched(listing, staging, path, where)
        else:
            path = staging / "files"
            if not {PARAMETERS, INDEX} & {*chosen}:
                path /= chosen[0]
    return replace(find_source(str(path), download, download, where), artifact=listing.name)


def _weight_files(listing: Listing, where: str) -> list[str]:
    """The files at the root of the artifact that a directory of weights consists of, or one file of
    weights."""
    names = sorted(
        name
        for name in (*listing.sizes, *listing.references)
        if "/" not in name and name.endswith(_SUFFIXES)
    )
    if INDEX in listing.sizes and PARAMETERS not in names:
        names = [INDEX, *(name for name in names if name.endswith(".safetensors"))]
    elif PARAMETERS in names:
        names = [PARAMETERS]
    elif len(names) != 1:
        what = f"several files of weights ({listed(names, 3)})" if names else "no file of weights"
        raise UsageError(
            f"{where}, which has {what} at its root, but needs a checkpoint of isorun, {PARAMETERS}"
            f", {INDEX}, or one .safetensors, .pt, .pth or .bin file; name another."
        )
    if referred := [name for name in names if name in listing.references]:
        raise UsageError(
            f"{where}, whose {referred[0]} is only a reference to "
            f"{listing.references[referred[0]]!r}, which is not followed; get the file yourself, "
            "and name its path."
        )
    return names
