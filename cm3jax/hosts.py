"""Several processes on one run, one per host: starting them, which one this is, agreeing, waiting.

jax finds the others by itself on TPU pods, GKE, SLURM and under Open MPI; elsewhere the flags name the coordinator.
Process 0, the lead, writes what is written once. Everything here does nothing in a run of one process.
"""

import json
import os
import pathlib
import sys
from typing import Any, NoReturn

import numpy as np

import cm3jax.config as configs
from cm3jax.types import Unavailable, UserError

HEARTBEAT = 20
"""Seconds without a sign of life after which a host counts as dead (jax's own: 100); the others then end at once."""
SHUTDOWN = 20
"""Seconds that a host which has finished waits for the others to say the same; `finish` has brought them together."""
CONNECT = 300
"""Seconds for all hosts to come up."""
SIGNS = ("SLURM_JOB_ID", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "OMPI_MCA_orte_hnp_uri", "PMIX_RANK")
"""Variables of the clusters that jax knows; without one, and without a chip, jax need not be asked."""


def start(settings: configs.Hosts) -> None:
    """Bring the processes of this run together, once, before any device is used.

    Raises:
      UserError: if the flags do not go together, or the others cannot be reached.
    """
    _check(settings)
    if started() or settings.processes == 1 or not (settings.processes or settings.coordinator or _cluster()):
        return
    import jax

    values = (
        settings.coordinator or None,
        settings.processes or None,
        None if settings.process < 0 else settings.process,
    )
    try:
        jax.distributed.initialize(
            *values,
            initialization_timeout=CONNECT,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=SHUTDOWN,
        )
    except ValueError as e:
        if any(v is not None for v in values):
            raise UserError(f"hosts: {e}; give --coordinator HOST:PORT, --processes and --process") from None
        return  # a machine of its own
    except RuntimeError as e:
        text = " ".join(str(e).split())[:160]
        raise Unavailable(f"hosts: not all processes came up within {CONNECT} s ({text}); see their logs") from None
    if count() > 1:
        print(f"host {index()} of {count()}: {jax.local_device_count()} of {jax.device_count()} devices", flush=True)


def _check(settings: configs.Hosts) -> None:
    address, processes, process = settings.coordinator, settings.processes, settings.process
    if address and not address.rpartition(":")[2].isdigit():
        raise UserError(f"--coordinator = {address!r}: must be HOST:PORT, of the machine that runs process 0")
    if processes < 0:
        raise UserError(f"--processes = {processes}: must be at least 1; 0: as the cluster tells")
    if process >= max(processes, 1) or (process >= 0 and not processes):
        raise UserError(f"--process = {process}: must be below --processes = {processes}, and is counted from 0")
    if address and process < 0 and not _cluster():
        raise UserError("--coordinator: needs --processes N and --process I too, where no cluster tells them")


def _cluster() -> bool:
    """Tell whether there is a sign of a cluster that jax may know."""
    return any(name in os.environ for name in SIGNS) or any(pathlib.Path("/dev").glob("accel*")) or _vfio()


def _vfio() -> bool:
    return any(pathlib.Path("/dev/vfio").glob("[0-9]*"))  # newer TPU machines


def started() -> bool:
    """Tell whether this process was brought together with others; asks no device."""
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


def index() -> int:
    """Return the number of this process, from 0."""
    return sys.modules["jax"].process_index() if started() else 0


def count() -> int:
    """Return the number of processes."""
    return sys.modules["jax"].process_count() if started() else 1


def lead() -> bool:
    """Tell whether this is the process that writes what is written once."""
    return index() == 0


# ----------------------------------------------------------------------------------- calls that all hosts make together


def barrier(name: str) -> None:
    """Wait until all hosts are here."""
    if count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def gathered(value: Any) -> list[Any]:
    """Return the JSON values of all hosts, in their order."""
    if count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    text = json.dumps(value).encode()
    sizes = np.ravel(multihost_utils.process_allgather(np.int32(len(text))))
    padded = np.frombuffer(text.ljust(int(sizes.max())), np.uint8)
    rows = np.reshape(multihost_utils.process_allgather(padded), (count(), -1))
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]


def leads(value: Any) -> Any:
    """Return the lead's JSON value on every host."""
    return gathered(value)[0]


def whole(tree):
    """Return a tree of arrays as numpy arrays, also those of which this host holds a part only."""
    import jax

    def one(x):
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(one, tree)


def finish() -> None:
    """Wait for the others at the end of a command, so that none takes a host that is still at work for a dead one."""
    barrier("the end")


def abandon(code: int) -> NoReturn:
    """End at once after an error: waiting for the others, as an ordinary exit does, would hold them up too."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
