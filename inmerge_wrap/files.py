"""Files that are written whole or not at all, on local disks and on network shares."""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# What CIFS, FUSE and bucket mounts answer to calls that they do not offer.
_UNSUPPORTED = {
    errno.EACCES,
    errno.EINVAL,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.EPERM,
}


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a draft that replaces ``path`` atomically when the block ends without an error.

    The draft is an empty file in the same folder, with the mode that the process gives to new
    files. Its name is unique: of several processes that write the same file, the last one wins, and
    a reader sees one version whole. Missing folders are created. A symbolic link stays, and the
    file that it points to is replaced. After an OSError the previous file is unchanged, and no
    draft is left.
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".draft-{secrets.token_hex(8)}{target.suffix}")
    try:
        with _errors_naming(path, target, draft):
            draft.touch(exist_ok=False)
            yield draft
            sync(draft)
            os.replace(draft, target)
            sync(target.parent)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def replacing_files(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a draft folder, whose files replace those of a folder when the block ends.

    Each file is replaced atomically, none if the block raises an error or a file to replace is a
    symbolic link. Other files stay, and missing folders are created.
    """
    target = Path(os.path.realpath(directory))
    target.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target, prefix=".draft-") as folder:
        with _errors_naming(directory, target, Path(folder)):
            yield Path(folder)
            drafts = sorted(Path(folder).iterdir(), reverse=True)
            for link in (target / draft.name for draft in drafts):
                if link.is_symlink():
                    raise ValueError(
                        f"{link} is a symbolic link to {os.readlink(link)}: write to that folder, "
                        "or remove the link"
                    )
            for draft in drafts:
                sync(draft)
                os.replace(draft, target / draft.name)
            sync(target)


@contextmanager
def _errors_naming(path: str | os.PathLike[str], target: Path, draft: Path) -> Iterator[None]:
    """Makes errors name what was to be written, not its draft; those of another file stay."""
    try:
        yield
    except OSError as error:
        if isinstance(error.filename, str | os.PathLike):
            named = Path(error.filename)
            if draft not in (named, *named.parents) and named not in (target, *target.parents):
                raise
        # An inner draft has named itself already.
        first = error.__cause__ if isinstance(error.__cause__, OSError) else error
        reason = f"{path} was not written, what was there is unchanged: {first.strerror or first}"
        told = (reason,) if error.errno is None else (error.errno, reason)
        raise OSError(*told) from error


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object that a JSON file holds; a ValueError names the file that has none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not names with values")
    return content


def write_json(
    path: str | os.PathLike[str], content: Mapping[str, Any], *, allow_nan: bool = True
) -> None:
    """Writes plain data as JSON, atomically as :func:`replacing` does.

    Without ``allow_nan`` a number that is not finite, which other programs cannot read, is a
    ValueError.
    """
    text = json.dumps(content, indent=1, allow_nan=allow_nan)
    with replacing(path) as draft:
        draft.write_text(text + "\n", encoding="utf-8")


def sync(path: Path) -> None:
    """Makes a file, or the names in a folder, survive a power cut where the file system can."""
    if path.is_dir() and os.name != "posix":  # Windows opens no folders
        return
    with supported_or_skipped():
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def supported_or_skipped() -> Iterator[None]:
    """Skips the rest of the block where the file system does not offer a call, as on CIFS."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
