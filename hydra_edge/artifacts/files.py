"""Reading and writing whole files so that a failure never costs the user the old one."""

from __future__ import annotations

import hashlib
import os
import secrets
import tokenize
from collections.abc import Iterable
from pathlib import Path

from hydra_edge.errors import ArtifactError

# Besides ValueError, what numpy raises while it evaluates a damaged .npy header as Python text.
NPY_HEADER_ERRORS = (SyntaxError, TypeError, IndexError, OverflowError, tokenize.TokenError)


def make_folder(path: str | Path) -> Path:
    """A folder that a run keeps its state in, made where it is missing.

    Raises:
        ArtifactError: It cannot be made.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ArtifactError(
            f"The folder '{path}' cannot be made: {exc.strerror}.",
            "The run keeps its checkpoint there.",
            "Choose another workdir.",
        ) from exc
    return path


def write_atomic(path: str | Path, data: bytes | Iterable[bytes]) -> Path:
    """Write ``data`` to ``path`` in one step: readers see the old file or the new, never a part.

    Args:
        path: The file.
        data: Its bytes, or pieces of them.

    Returns:
        The path written.

    Raises:
        ArtifactError: The folder does not exist or cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise ArtifactError(
            f"'{path}' is a folder.", "A file was to be written there.", "Give a file name."
        )
    name = path.parent / f".{path.name}.{secrets.token_hex(8)}"
    try:
        handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except OSError as exc:
        raise ArtifactError(
            f"Cannot write '{path}': {exc.strerror or exc}.",
            f"The folder '{path.parent}' is missing or not writable.",
            "Create it or choose another output path.",
        ) from exc
    try:
        with os.fdopen(handle, "wb") as stream:
            for piece in (data,) if isinstance(data, bytes) else data:
                stream.write(piece)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(name, path)
    except OSError as exc:
        raise ArtifactError(
            f"Writing '{path}' failed: {exc.strerror or exc}.",
            "The disk may be full or the folder read-only; an older file there is untouched.",
            "Free some space or choose another output path.",
        ) from exc
    finally:
        if os.path.exists(name):
            os.unlink(name)
    return path


def read_bytes(path: str | Path, kind: str) -> bytes:
    """Read a whole file that the user named.

    Args:
        path: The file.
        kind: What it should be, for the message, e.g. ``"an ONNX model"``.

    Raises:
        ArtifactError: It is missing, a folder or unreadable.
    """
    path = Path(path)
    try:
        return path.read_bytes()
    except FileNotFoundError as exc:
        raise ArtifactError(
            f"'{path}' does not exist.", f"Expected {kind}.", "Check the path."
        ) from exc
    except IsADirectoryError as exc:
        raise ArtifactError(
            f"'{path}' is a folder.", f"Expected {kind}.", "Name the file inside it."
        ) from exc
    except OSError as exc:
        raise ArtifactError(
            f"'{path}' cannot be read: {exc.strerror or exc}.",
            f"Expected {kind}.",
            "Check the permissions.",
        ) from exc


def sha256(data: bytes) -> str:
    """Hex digest of ``data``."""
    return hashlib.sha256(data).hexdigest()
