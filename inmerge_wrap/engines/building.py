"""Compiles ``native.cpp`` in the background, once per user, compiler and kind of processor.

The library is cached in the user's cache folder under a name that encodes everything it depends on,
so that different machines can share a home directory. It is moved there atomically: processes that
compile at the same time never see partial files. Without such a folder it is compiled for this
process only.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

__all__ = ["Build", "cache_folder"]

_SOURCE = Path(__file__).with_name("native.cpp")


class Build:
    """One compilation, which runs while the training is prepared.

    It starts at once; :meth:`wait` waits for the result.

    Attributes:
        pid: The process that started it; a fork does not share it.
        library: The loaded library; None before it is done, or if it failed.
    """

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.library: ctypes.CDLL | None = None
        self._problem: str | None = None
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._begin()
        except (OSError, ValueError) as error:  # no compiler, or a CXX that cannot be read
            self._problem = str(error) or "the compiler failed"

    def wait(self, patience: float) -> str | None:
        """Waits at most ``seconds``; returns why there is no library, or None if there is one."""
        if self._process is not None and self.library is None:
            try:
                self._process.wait(patience)
            except subprocess.TimeoutExpired:
                # Another process may have been faster; if not, the compiler goes on for later.
                if self._is_cached():
                    return None
                return f"the compiler took more than {patience:g} s"
            self._end()
        return None if self.library is not None else self._problem

    def _begin(self) -> None:
        compiler = shlex.split(os.environ.get("CXX") or "c++")
        # Apple's compiler has no OpenMP; without it one thread does the work.
        parallel = [] if sys.platform == "darwin" else ["-fopenmp"]
        here = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
        command = [*compiler, "-std=c++17", "-O3", here, "-fPIC", "-shared", *parallel]
        program = shutil.which(compiler[0])
        if program is None:
            raise OSError(f"no program {compiler[0]!r}")
        self._target: Path | None = None
        folder = cache_folder()
        if folder is not None:
            self._target = folder / f"native-{_fingerprint(command, program)}.so"
        if self._is_cached():
            return
        # Next to the target, because a move between file systems is not atomic.
        self._folder = TemporaryDirectory(prefix="inmerge-", dir=folder, ignore_cleanup_errors=True)
        self._made = Path(self._folder.name, "native.so")
        self._log = TemporaryFile(dir=self._folder.name)  # a pipe would block when it is full
        atexit.register(self._leave)
        self._process = subprocess.Popen(
            [*command, str(_SOURCE), "-o", str(self._made)],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its children can be ended with it
        )

    def _is_cached(self) -> bool:
        """Loads the library if it is in the cache; returns whether it was."""
        if self._target is None or not self._target.exists():
            return False
        try:
            self.library = _load(self._target)
        except OSError:  # a partial file, from a disk that was full
            return False
        return True

    def _end(self) -> None:
        assert self._process is not None
        try:
            if self._process.returncode != 0:
                self._log.seek(0)
                raise OSError(self._log.read().decode(errors="replace").strip())
            if not self._made.exists():
                raise OSError("the compiler produced no library")
            self.library = _load(self._store())
        except OSError as error:
            self._problem = str(error) or "the compiler failed"
        finally:
            self._process = None
            self._clean()

    def _store(self) -> Path:
        """Moves the library into the cache, if there is one; returns its path."""
        if self._target is None:
            return self._made
        os.replace(self._made, self._target)
        return self._target

    def _clean(self) -> None:
        self._log.close()
        self._folder.cleanup()
        atexit.unregister(self._leave)

    def _leave(self) -> None:
        """At exit, keeps a finished library for the next process and ends a hung compiler."""
        if self._process is None or self.pid != os.getpid():
            return
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        elif self._process.returncode == 0 and self._target is not None:
            self._store()
        self._clean()


def cache_folder() -> Path | None:
    """Returns the user's cache folder for compiled code, created if needed; None without one.

    No other user may be able to write to it, because its files are loaded.
    """
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(base, "inmerge_wrap")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        mine = not hasattr(os, "getuid") or status.st_uid == os.getuid()
        if mine and not status.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # no home, or one that is read-only
        pass
    return None


def _fingerprint(command: list[str], program: str) -> str:
    """Returns a name that identifies the compiled library: source, compiler, and processor."""
    status = os.stat(program)
    parts = [*command, program, status.st_size, status.st_mtime_ns, sys.platform, _processor()]
    return hashlib.sha256(_SOURCE.read_bytes() + repr(parts).encode()).hexdigest()[:24]


def _processor() -> str:
    """Returns the kind of processor, for which ``-march=native`` compiles."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    # Of the first core: its model and features, not its current clock.
    keys = ("model", "cpu family", "flags", "Features", "CPU part", "isa")
    first = lines[: lines.index("")] if "" in lines else lines
    return platform.machine() + "".join(line for line in first if line.startswith(keys))


def _load(path: Path) -> ctypes.CDLL:
    """Loads a library, from elsewhere if its folder is mounted without permission to execute."""
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        with TemporaryDirectory(prefix="inmerge-", ignore_cleanup_errors=True) as folder:
            return ctypes.CDLL(shutil.copy(path, folder))
