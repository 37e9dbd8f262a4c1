"""Pickles as data: a stack machine that builds plain containers and executes nothing.

A pickle is a program whose instructions may call any function of any module. Here the instructions are read by
`pickletools`, and a global is no more than its name: it is never looked up. A name may stand anywhere, as key or value;
where an instruction would call it, that is refused by name, but for the few functions that the caller of `load` gives.
"""

import dataclasses
import pickletools
from collections.abc import Callable
from typing import Any

from cm3jax.interop import mapped

MOST_BITS = 128
"""Of a whole number; no pickle of weights needs more, and longer ones take Python long to print."""
MOST_COPIED = 2**23
"""Members and letters of all that is handed to functions: the same long list can be handed over again and again."""


class Refused(Exception):
    """What the pickle asks for is not done here; the message says what."""


@dataclasses.dataclass(frozen=True, repr=False)
class Global:
    """The name of a class or function."""

    module: str
    name: str

    def __repr__(self):
        return f"{self.module}.{self.name}"


class Attributes(dict):
    """What an object of a class has: its attributes by name."""


Calls = dict[Global, Callable[..., Any]]


class Machine:
    """The state of a pickle that is being read.

    Attributes:
      stack: What stands above the last mark; `below` holds what stood below each mark.
      memo: What the pickle has numbered to use again.
      calls: Stand-ins for the functions that may be called.
      persistent: Returns what a persistent id stands for.
      plain: Returns whether the objects of a class are read as their `Attributes`.
    """

    def __init__(self, calls: Calls, persistent: Callable[[Any], Any], plain: Callable[[Global], bool]):
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.calls, self.persistent, self.plain = calls, persistent, plain
        self.copied = 0

    def marked(self) -> list[Any]:
        """Take what stands above the last mark, and the mark."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def take(self, count: int) -> list[Any]:
        """Take the last `count` things."""
        return [self.stack.pop() for _ in range(count)][::-1]

    def call(self, function: Any, arguments: Any) -> Any:
        """Return what a permitted function gives.

        Raises:
          Refused: naming any other.
        """
        if not isinstance(function, Global):
            raise Refused(f"would call an object of type {type(function).__name__}")
        if function not in self.calls:
            raise Refused(f"would call {str(function)!r}")
        if type(arguments) is not tuple:
            raise Refused(f"would call {str(function)!r} with an object of type {type(arguments).__name__}")
        self.count(str(function), *arguments)
        return self.calls[function](*arguments)

    def count(self, receiver: str, *things: Any) -> None:
        """Add to what was handed over; raises a `Refused` where that becomes too much."""
        self.copied += sum(len(x) for x in things if isinstance(x, (str, bytes, tuple, list, dict, set)))
        if self.copied > MOST_COPIED:
            raise Refused(f"hands over more than {MOST_COPIED:,} things to {receiver!r} and others")


def load(
    file, calls: Calls, persistent: Callable[[Any], Any], plain: Callable[[Global], bool] = lambda kind: False
) -> Any:
    """Return what the pickle at a file's position makes, with dicts for all mappings.

    Args:
      file: Has `read` and `readline`, never returns more than it holds, and stands behind the pickle afterwards.

    Raises:
      Refused: naming what would be called, or what is wrong with the pickle.
    """
    machine = Machine(calls, persistent, plain)
    try:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "STOP":
                return machine.stack.pop()
            _step(machine, opcode.name, argument)
    except (IndexError, KeyError, TypeError, ValueError, OverflowError, UnicodeError) as e:
        raise Refused(f"is no whole pickle ({type(e).__name__}: {e!s:.200})") from None
    raise Refused("is no whole pickle (no end)")


WORDS = {
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "FLOAT", "BINFLOAT"),
}
NUMBERS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
PUT, GET = {"PUT", "BINPUT", "LONG_BINPUT"}, {"GET", "BINGET", "LONG_BINGET"}


def _step(m: Machine, name: str, argument: Any) -> None:
    """Do one instruction (pickletools has the list of them)."""
    if name in ("PROTO", "FRAME"):
        pass
    elif name in WORDS:
        m.stack.append(argument)
    elif name in NUMBERS:
        if argument.bit_length() > MOST_BITS:
            raise Refused(f"holds a number of {argument.bit_length():,} bits, at most {MOST_BITS} are read")
        m.stack.append(argument)
    elif name in CONSTANTS:
        m.stack.append(CONSTANTS[name])
    elif name in EMPTY:
        m.stack.append(EMPTY[name]())
    elif name in TUPLES:
        m.stack.append(tuple(m.take(TUPLES[name])))
    elif name == "MARK":
        m.below.append(m.stack)
        m.stack = []
    elif name == "POP":
        m.stack.pop() if m.stack else m.marked()
    elif name == "POP_MARK":
        m.marked()
    elif name == "DUP":
        m.stack.append(m.stack[-1])
    elif name in PUT:
        m.memo[argument] = m.stack[-1]
    elif name == "MEMOIZE":
        m.memo[len(m.memo)] = m.stack[-1]
    elif name in GET:
        m.stack.append(m.memo[argument])
    elif name in ("GLOBAL", "STACK_GLOBAL"):
        module, attribute = argument.split(" ", 1) if name == "GLOBAL" else m.take(2)
        if not (isinstance(module, str) and isinstance(attribute, str)):
            raise Refused("names a global by what is no text")
        m.stack.append(Global(module, attribute))
    elif name in ("PERSID", "BINPERSID"):
        m.stack.append(m.persistent(argument if name == "PERSID" else m.stack.pop()))
    else:
        _gather(m, name, argument)


def _gather(m: Machine, name: str, argument: Any) -> None:
    """Do one of the instructions that gather things into a container, or that would make an object."""
    if name == "TUPLE":
        items = m.marked()
        m.stack.append(tuple(items))
    elif name == "LIST":
        items = m.marked()
        m.stack.append(items)
    elif name in ("APPEND", "APPENDS"):
        items = m.take(1) if name == "APPEND" else m.marked()
        _top(m, list).extend(items)
    elif name == "DICT":
        items = m.marked()
        m.stack.append(paired({}, zip(items[::2], items[1::2], strict=True)))
    elif name in ("SETITEM", "SETITEMS"):
        items = m.take(2) if name == "SETITEM" else m.marked()
        paired(_top(m, dict), zip(items[::2], items[1::2], strict=True))
    elif name == "ADDITEMS":
        items = m.marked()
        _top(m, set).update(map(key, items))
    elif name == "FROZENSET":
        items = m.marked()
        m.stack.append(frozenset(map(key, items)))
    elif name == "REDUCE":
        m.stack.append(m.call(*m.take(2)))
    elif name == "BUILD":
        _build(m, m.stack.pop(), m.stack[-1])
    elif name == "NEWOBJ" and isinstance(m.stack[-2], Global) and m.plain(m.stack[-2]) and m.stack[-1] == ():
        m.take(2)
        m.stack.append(Attributes())
    else:
        raise Refused(f"would make an object of {_made(m, name, argument)} ({name})")


def _build(m: Machine, state: Any, thing: Any) -> None:
    """Set attributes; an OrderedDict's own, such as torch's _metadata, are left out."""
    if not isinstance(thing, dict):
        raise Refused(f"would set attributes of {_described(thing)}")
    if isinstance(thing, Attributes):
        if not isinstance(state, dict):
            raise Refused(f"would set attributes by an object of type {type(state).__name__}")
        m.count("an object", state)
        paired(thing, state.items())


def _made(m: Machine, name: str, argument: Any) -> str:
    """Return the class of which an instruction would make an object."""
    if name == "INST":
        return repr(str(Global(*argument.split(" ", 1))))
    if name == "OBJ":
        return _described(m.marked()[0])
    if name in ("NEWOBJ", "NEWOBJ_EX"):
        return _described(m.take(2 if name == "NEWOBJ" else 3)[0])
    return f"a kind that is not known here, {argument!r:.50}"


def _described(thing: Any) -> str:
    return repr(str(thing)) if isinstance(thing, Global) else f"type {type(thing).__name__}"


def _top(m: Machine, kind: type) -> Any:
    if not isinstance(m.stack[-1], kind):
        raise Refused(f"would change {_described(m.stack[-1])} as if it were a {kind.__name__}")
    return m.stack[-1]


def key(thing: Any) -> Any:
    """Return a thing that may be a key. Python hashes a tuple in a tuple in a tuple ... until its own stack ends."""
    flat = thing if type(thing) is tuple else (thing,)
    if any(not isinstance(x, (str, bytes, int, float, Global, type(None))) for x in flat):
        raise Refused(f"has a key of type {type(thing).__name__} that is not plain")
    return thing


def paired(found: dict[Any, Any], pairs) -> dict[Any, Any]:
    """Return a dict to which pairs were added; what Python wrote has no key twice, and none says which would count."""
    for k, value in pairs:
        if key(k) in found:
            raise Refused(f"has {mapped.short(k):.200} twice")
        found[k] = value
    return found
