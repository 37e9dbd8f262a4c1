"""Folders that may lie in a bucket: gs://BUCKET/PATH; and what to do when a path does not answer. Imports no jax.

A folder in a bucket is copied to the local disk once, by tensorstore, the client that orbax uses; everything else then
reads plain files. Random access to single records over HTTP would cost a request each, and array_record's own client
for gs:// can neither list a folder nor give up.
"""

import concurrent.futures
import hashlib
import pathlib
import queue
import shutil
import threading
import uuid
from collections.abc import Callable, Iterable
from typing import TypeVar

from cm3jax.types import UserError

T = TypeVar("T")

REACH = 20.0
"""Seconds within which a path must answer. A bucket answers within one and a cold network disk within ten; without a
network, or on a dead mount, the clients try on for ever (array_record and tensorstore alike, seen for minutes)."""
STALLED = 600.0
"""Seconds for one file. The largest, a shard of 2048 pictures, has about 250 MB; a slow 10 Mbit/s line takes 200 s."""
AT_ONCE = 16
"""Files copied at one time; each is held in memory whole."""
REMOTE = "gs://"
LAST = "stage.json"
"""Written last, by stages and by copies of them: a folder that has it is whole."""


def is_remote(path) -> bool:
    return str(path).startswith(REMOTE)


def within(call: Callable[[], T], path, seconds: float | None = None) -> T:
    """Return call(), which touches `path`, if it is done in time (None: REACH); else leave it behind in its thread.

    Raises:
      UserError: if it is not. What `call` raises itself passes through.
    """
    seconds = REACH if seconds is None else seconds
    done: queue.SimpleQueue = queue.SimpleQueue()

    def work():
        try:
            done.put((call(), None))
        except BaseException as e:
            done.put((None, e))

    threading.Thread(target=work, name="path", daemon=True).start()  # daemon: must not keep the process alive
    try:
        value, error = done.get(timeout=seconds)
    except queue.Empty:
        what = "the network and the credentials" if is_remote(path) else "the disk or mount that it lies on"
        raise UserError(f"{str(path)!r}: no answer in {seconds:.0f} s; check {what}, and the path") from None
    if error:
        raise error
    return value


def reach(path) -> bool:
    """Return whether a local path is there.

    Raises:
      UserError: if its disk does not answer.
    """
    return within(pathlib.Path(path).exists, path)


def local_only(path, what: str) -> None:
    """Raise UserError for a path in a bucket where one must be on a disk."""
    if "://" in str(path):
        raise UserError(
            f"{what} {str(path)!r}: must be on a disk of this machine; mount the bucket there, or copy the result to it"
            " afterwards"
        )


# -------------------------------------------------------------------------------------------------------------- copying


def at_hand(path, cache) -> pathlib.Path:
    """Return a stage's folder on the local disk: `path` itself, or of one in a bucket the copy in folder `cache`."""
    if is_remote(path):
        return copy(str(path), pathlib.Path(cache) / hashlib.sha256(str(path).encode()).hexdigest()[:16])
    local_only(path, "folder")
    reach(path)
    return pathlib.Path(path)


def copy(url: str, folder, wanted: Callable[[str], bool] = lambda name: True) -> pathlib.Path:
    """Copy the files below a folder of a bucket into a local folder, and return it; continues where it was cut off.

    A copy that is whole, and whose stage.json is still that of the bucket, is left as it is.

    Args:
      wanted: Which files, by their path below the folder.

    Raises:
      UserError: if the bucket does not answer, or the folder holds no finished stage.
    """
    store, folder = open_store(url), pathlib.Path(folder)
    names = sorted(name for name in list_files(store, url) if counts(name))
    if LAST not in names:
        found = f"{len(names)} other files" if names else "nothing"
        raise UserError(f"{url!r}: holds {found} but no {LAST}; give the folder of a finished stage")
    last = read(store, LAST, url)
    if (folder / LAST).is_file():
        if (folder / LAST).read_bytes() == last:
            return folder
        shutil.rmtree(folder)  # a copy of what was there before
    left = [name for name in names if name != LAST and wanted(name) and not (folder / name).is_file()]
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in pool.map(lambda name: save(folder / name, read(store, name, url)), left):
            pass
    save(folder / LAST, last)
    return folder


def counts(name: str) -> bool:
    """Return whether a file is copied: no hidden file, and no checkpoint, as large as all else and not needed to use a
    finished stage."""
    return not any(part.startswith(".") or part == "checkpoints" for part in name.split("/")) and not name.endswith("/")


def open_store(url: str):
    """Return tensorstore's view of a folder in a bucket."""
    import tensorstore

    return within(lambda: tensorstore.KvStore.open(url.rstrip("/") + "/").result(timeout=REACH), url, 2 * REACH)


def list_files(store, url: str) -> Iterable[str]:
    try:
        return [name.decode() for name in within(lambda: store.list().result(), url)]
    except (ValueError, OSError, RuntimeError) as e:
        raise UserError(f"{url!r}: cannot be listed ({' '.join(str(e).split())[:160]})") from None


def read(store, name: str, url: str) -> bytes:
    try:
        found = within(lambda: store.read(name).result(), f"{url}/{name}", STALLED)
    except (ValueError, OSError, RuntimeError) as e:
        raise UserError(f"{url}/{name}: cannot be read ({' '.join(str(e).split())[:160]})") from None
    if found.state != "value":
        raise UserError(f"{url}/{name}: gone while it was copied; run it again")
    return found.value


def save(path: pathlib.Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")  # several hosts may copy to one disk
    partial.write_bytes(data)
    partial.replace(path)
