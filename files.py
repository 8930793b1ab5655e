"""Files that cannot be lost: whole or absent, sealed, nothing but data, one run to a path."""

import contextlib
import errno
import hashlib
import io
import os
import re
import struct
import time
import warnings
from pathlib import Path

import torch

from data import InputError

try:
    import fcntl
except ImportError:  # no POSIX system: the lock is left out, all else holds
    fcntl = None

SEAL = b"sha256:"
DIGEST = 64  # characters of a SHA-256 in hexadecimal


def write_atomically(path, content):
    """Puts the bytes `content` at `path`, which at every moment is the old file or the new one.

    Written beside it, synced, renamed over it; then the folder is synced, so that neither a kill
    nor a power cut leaves anything else. Through a symbolic link it is the link's target that is
    replaced. Raises InputError, naming the file, when that fails.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        sync_folder(target.parent)
    except BaseException as error:  # a full disk or Ctrl-C alike: leave no half-written file
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise InputError(f"{path}: cannot be written ({error.strerror})") from None
        raise


def sync_folder(folder):
    """Makes the names in `folder` durable, on systems that know how to."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # a folder that may be written but not read, or a system without
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def pack(kind, version, contents):
    """The bytes of a file of `kind` ("checkpoint", ...): the dictionary `contents`, sealed.

    What torch.save writes is a zip archive. The seal is its comment: "sha256:" and the SHA-256 of
    all bytes before the digest. So torch.load reads the file as any other, and `unzip -z` shows
    the digest. Made in memory, since torch.save reports a full disk in ways of its own.
    """
    file = io.BytesIO()
    torch.save({"format": f"awd-lstm {kind}", "version": version, **contents}, file)
    file.seek(-2, io.SEEK_END)  # an archive's last field: the length of its comment, 0 so far
    file.write(struct.pack("<H", len(SEAL) + DIGEST) + SEAL)
    digest = hashlib.sha256(file.getbuffer()).hexdigest()
    file.write(digest.encode())
    return file.getbuffer()


def unpack(path, kind, version, keys, device="cpu", content=None):
    """The dictionary that `pack` sealed, its tensors on `device`; nothing of it is executed.

    `keys` maps what it must hold to types. `content`: its bytes, where they are not to be read
    from `path`. Raises InputError, naming the file, when it is missing, damaged in any bit, of
    another kind or version, or lacks a key.
    """
    if content is None:
        content = read_bytes(path, kind)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's thoughts about foreign archives
            contents = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    except Exception as error:  # torch meets a damaged or foreign file with many types of error
        if is_of_device(error):
            raise
        raise InputError(
            f"{path}: is damaged, or no {kind} of main.py (one that pickles whole modules, as the "
            "original AWD-LSTM code wrote, cannot be loaded safely); use a copy, or train again"
        ) from None
    if not isinstance(contents, dict) or contents.get("format") != f"awd-lstm {kind}":
        raise InputError(f"{path}: is a file of torch's, but no {kind} of main.py")
    if contents.get("version") != version:
        raise InputError(
            f"{path}: has format version {contents.get('version')}, this code reads {version}; "
            "use the version of the code that wrote it"
        )
    if not is_sealed(content):
        raise InputError(
            f"{path}: is damaged: its content is not what its SHA-256 was made of; use a copy, or "
            "train again"
        )
    wrong = [key for key, kinds in keys.items() if not isinstance(contents.get(key), kinds)]
    if wrong:
        raise InputError(f"{path}: lacks {', '.join(wrong)}; use a copy, or train again")
    return contents


def is_out_of_memory(error):
    """Whether that is what an exception says; torch has several types for it, or none."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and any(text in str(error) for text in ("allocate memory", "out of memory", "ALLOC_FAILED"))
    )


def is_of_device(error):
    """Whether an exception speaks of the device, so that no file is to blame."""
    return is_out_of_memory(error) or (
        isinstance(error, RuntimeError)
        and any(text in str(error) for text in ("CUDA", "cuDNN", "CUDNN", "HIP", "MPS"))
    )


def read_bytes(path, kind):
    """The bytes of a file of `kind`. Raises InputError, naming it."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such {kind}; train one with main.py --save") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def is_sealed(content):
    """Whether these bytes end in the SHA-256 of what precedes it."""
    content = memoryview(content)
    return hashlib.sha256(content[:-DIGEST]).hexdigest().encode() == content[-DIGEST:]


def keep(path, suffix, *extensions):
    """Copies the file at `path` to `path` + `suffix` (or that and 2, 3, ... where it is taken).

    Its companions, `path` + each of `extensions`, are copied along where they exist. Returns the
    copy's path; an earlier copy of the same contents serves. Raises InputError.
    """
    files = {ext: Path(f"{path}{ext}") for ext in ("", *extensions)}
    contents = {ext: file.read_bytes() for ext, file in files.items() if file.exists()}
    number = 1
    while True:
        copy = f"{path}{suffix}{number if number > 1 else ''}"
        taken = [ext for ext in files if Path(f"{copy}{ext}").exists()]
        if all(Path(f"{copy}{ext}").read_bytes() == contents.get(ext) for ext in taken):
            for ext in contents.keys() - taken:
                write_atomically(f"{copy}{ext}", contents[ext])
            return copy
        number += 1


class Saver:
    """Writes a run's files. One that cannot be written now is reported, and kept to be retried.

    `pending` maps the paths that wait to their contents; a newer content replaces an older one.
    """

    def __init__(self, report):
        self.report = report
        self.pending = {}
        self.failing = {}  # path -> what was last reported of it

    def write(self, path, content):
        """Writes a file, and those that wait. Returns whether none is left waiting."""
        self.pending[str(path)] = content
        return self.retry()

    def retry(self):
        """Tries again to write what waits. Returns whether none is left waiting."""
        for path, content in list(self.pending.items()):
            try:
                write_atomically(path, content)
            except InputError as error:
                if self.failing.get(path) != str(error):  # said once, not at every chance
                    self.report(f"Warning: {error}; the next save tries again")
                self.failing[path] = str(error)
            else:
                del self.pending[path]
                if self.failing.pop(path, None):
                    self.report(f"{path} is written again")
        return not self.pending


@contextlib.contextmanager
def exclusive(path):
    """While it is held, no other process can train to `path`.

    The lock is the operating system's, on `path`.lock, which names the holder's process id: when
    the holder dies, however it dies, the lock is free. Raises InputError when another process
    holds it. What a dead one left half-written is removed.
    """
    if fcntl is None:
        yield
        return
    target = Path(os.path.realpath(path))
    lock = target.with_name(f"{target.name}.lock")
    try:
        while (descriptor := _try_lock(path, lock)) is None:
            pass
    except OSError as error:
        raise InputError(f"--save {path}: cannot lock {lock} ({error.strerror})") from None
    try:
        _remove_leftovers(target)
        yield
    finally:
        with contextlib.suppress(OSError):  # the folder may be gone, or be another one
            if os.path.samestat(lock.stat(), os.fstat(descriptor)):
                lock.unlink()
        os.close(descriptor)


def _try_lock(path, lock):
    """A descriptor of the file `lock`, locked; None where its former holder removed the file."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not re.fullmatch(rb"\d{0,20}", os.read(descriptor, 40)):
            raise InputError(f"--save {path}: {lock} exists and is no lock; name another")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if lock.exists() and os.path.samestat(lock.stat(), os.fstat(descriptor)):
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            return descriptor
    except BlockingIOError:
        time.sleep(0.1)  # a holder that has just locked it writes its process id
        holder = os.pread(descriptor, 20, 0).decode()
        os.close(descriptor)
        raise InputError(
            f"--save {path}: process {holder} is training to it; wait for it, or name another"
        ) from None
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _remove_leftovers(target):
    """Removes the temporary files that dead processes left beside `target`."""
    pattern = re.compile(re.escape(target.name) + r"(?:\.[\w.]+)?\.(\d+)\.tmp")
    for file in target.parent.iterdir():
        match = pattern.fullmatch(file.name)
        if match and (int(match[1]) == os.getpid() or not _is_alive(int(match[1]))):
            with contextlib.suppress(OSError):
                file.unlink()


def _is_alive(process):
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True
