"""Compile a jax program for TPUs that are not there, with the compiler inside libtpu.

The caller sets the environment, `environment.NEEDED`, before jax is imported.
"""

import contextlib
import dataclasses
import importlib.util
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import jax
from jax.experimental import topologies

from cm3jax.plan import slices
from cm3jax.types import UserError

REMATERIALIZED = "Involuntary full rematerialization"
"""XLA's words for: to change a layout it makes an array whole on every chip."""


class TooLarge(Exception):
    """The program does not fit.

    Attributes:
      needed, limit: Bytes of HBM, as the compiler states them.
      message: Its own line.
    """

    def __init__(self, needed: float, limit: float, message: str):
        super().__init__(message)
        self.needed, self.limit, self.message = needed, limit, message


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      text: Its HLO.
      arguments, outputs, aliased, temporary, code: Bytes per chip.
      rematerialized: Lines of the log that say so.
      seconds: What compiling took.
    """

    text: str
    arguments: int
    outputs: int
    aliased: int
    temporary: int
    code: int
    rematerialized: tuple[str, ...]
    seconds: float

    @property
    def total(self) -> int:
        """Bytes of HBM per chip: arguments, results that are not written over them, temporaries, the program."""
        return self.arguments + self.outputs - self.aliased + self.temporary + self.code


def devices(target: slices.Slice) -> list[jax.Device]:
    """Return the devices of an absent slice.

    Raises:
      UserError: if libtpu is not installed, or does not know the slice as this many devices.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("plan: needs the TPU compiler, which is not installed; pip install 'cm3jax[tpu]' (Linux only)")
    with captured():
        try:
            found = topologies.get_topology_desc(target.topology, "tpu", **target.options).devices
        except jax.errors.JaxRuntimeError as e:
            reason = str(e).splitlines()[0]
            raise UserError(f"{target.topology}: the installed libtpu does not know this slice: {reason}") from None
    if len(found) != target.chips:
        raise UserError(f"{target.topology}: {target.chips} chips, but libtpu makes {len(found)} devices of them")
    return list(found)


def program(lower: Callable[[], jax.stages.Lowered]) -> Program:
    """Lower and compile.

    Raises:
      TooLarge: if it does not fit.
    """
    start = time.monotonic()
    with captured() as log:
        try:
            compiled = lower().compile()
        except jax.errors.JaxRuntimeError as e:
            if too_large := out_of_memory(str(e)):
                raise too_large from None
            raise
    memory = compiled.memory_analysis()
    return Program(
        text=compiled.as_text(),
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        rematerialized=tuple(line for line in log() if REMATERIALIZED in line),
        seconds=time.monotonic() - start,
    )


NEEDS = re.compile(r"Used (?P<needed>[\d.]+[KMGT]?) of (?P<limit>[\d.]+[KMGT]?) hbm|memory required.*?\((?P<needed2>[\d.]+[KMGT]?)\) exceeds available HBM \((?P<limit2>[\d.]+[KMGT]?)\)")  # fmt: skip  # noqa: E501


def out_of_memory(message: str) -> TooLarge | None:
    """Return the figures of the compiler's complaint about memory; None if its message is another."""
    if not (match := NEEDS.search(message)):
        return None
    needed, limit = match["needed"] or match["needed2"], match["limit"] or match["limit2"]
    line = next(line for line in message.splitlines() if match[0] in line)
    return TooLarge(_bytes(needed), _bytes(limit), " ".join(line.split()))


def _bytes(text: str) -> float:
    unit = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}.get(text[-1], 1)
    return float(text.rstrip("KMGT")) * unit


@contextlib.contextmanager
def captured() -> Iterator[Callable[[], list[str]]]:
    """Keep what libtpu, which knows nothing of sys.stderr, writes to file descriptor 2"""
    sys.stderr.flush()
    kept, lines = os.dup(2), []
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lambda: lines
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()
