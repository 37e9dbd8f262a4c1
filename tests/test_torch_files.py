"""Files of torch.save without torch: read as torch reads them, and nothing of them is ever executed."""

import collections
import io
import math
import os
import pickle
import pickletools
import struct
import zipfile

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
import torch

from cm3jax.interop import pickles, tensors, torch_files
from cm3jax.types import UserError

KINDS = {"zip": {}, "old": {"_use_new_zipfile_serialization": False}}
both = pytest.mark.parametrize("kind", KINDS)


def saved(path, thing, kind="zip", **options):
    torch.save(thing, path, **KINDS[kind], **options)
    return tensors.open(path)


def bits(x):
    """Return a tensor's or an array's numbers as bytes, in the order of its shape."""
    if isinstance(x, torch.Tensor):
        return x.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).numpy().tobytes()
    return x.tobytes()


def same(ours, theirs):
    return ours.shape == tuple(theirs.shape) and str(ours.dtype) == str(theirs.dtype)[6:] and bits(ours) == bits(theirs)


def views():
    """Return tensors that lie in their storages in every way."""
    torch.manual_seed(0)
    base = torch.randn(7, 5, 3)
    return {
        "whole": base,
        "transposed": base.transpose(0, 2),
        "permuted": base.permute(1, 2, 0),
        "rows": base[2:5],
        "columns": base[:, 1:3],
        "stepped": base[1::3, ::2, 1],
        "one": base[3, 2, 1],
        "scalar": torch.tensor(2.5),
        "last": base[6, 4],
        "empty": torch.empty(0, 3),
        "cut to nothing": base[7:],
        "tied": base.reshape(35, 3),
        "of one row": torch.randn(1, 4).expand(1, 4),
    }


TYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
LATER = ["uint64", "uint32", "uint16", "float8_e4m3fn", "float8_e5m2"]
"""Types that torch has no storage class for: the storage is bytes, and the call says the type."""


@both
def test_views_are_read_as_they_were(kind, tmp_path):
    found = saved(tmp_path / "a", views(), kind)
    assert list(found.found) == list(views()) and found.kind == "torch"
    for name, tensor in views().items():
        assert same(found.read(name), tensor), name


@both
def test_every_type_is_read_to_the_bit_in_the_files_own_precision(kind, tmp_path):
    given = {name: (torch.randn(3, 5) * 9).to(getattr(torch, name)) for name in TYPES}
    given |= {name: torch.arange(24).to(torch.uint8).view(getattr(torch, name)) for name in LATER}
    found = saved(tmp_path / "a", given, kind)
    for name, tensor in given.items():
        assert same(found.read(name), tensor), name
        assert found.found[name].size == tensor.nbytes
    assert found.found["bfloat16"].dtype == ml_dtypes.bfloat16


@both
def test_a_checkpoint_of_a_training_becomes_names_with_dots(kind, tmp_path):
    """As Lightning writes it, with classes among the keys and the values."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).half()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(5, 3).half()).float().sum().backward()
    optimizer.step()
    checkpoint = {
        "state_dict": model.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "callbacks": {torch.nn.Linear: {"best": torch.tensor(0.5), "path": "x.ckpt"}},
        "epoch": 3,
        "loops": collections.defaultdict(list, {"a": {1, 2}}),
        "shape": torch.Size([2, 3]),
        "device": torch.device("cpu"),
        "raw": b"\xff\0",
        "none": None,
        "kind": torch.bfloat16,
    }
    found = saved(tmp_path / "last.ckpt", checkpoint, kind)
    state = model.state_dict()
    assert list(found.under("state_dict.")) == list(state)
    assert all(same(found.read(f"state_dict.{name}"), tensor) for name, tensor in state.items())
    assert same(found.read("callbacks.torch.nn.modules.linear.Linear.best"), torch.tensor(0.5))
    moment = optimizer.state_dict()["state"][1]["exp_avg"]
    assert same(found.read("optimizer_states.0.state.1.exp_avg"), moment)
    values = found.values
    assert values["epoch"] == 3 and values["loops.a"] == {1, 2} and values["raw"] == b"\xff\0"
    assert values["none"] is None and str(values["kind"]) == "torch.bfloat16" and values["device"] == "cpu"
    assert [values["shape.0"], values["shape.1"]] == [2, 3]


@both
@pytest.mark.parametrize("protocol", [2, 5])
def test_long_and_shared_dicts_with_attributes_have_each_key_once(kind, protocol, tmp_path):
    """Python writes a thousand pairs at a time, and an ordered dict's own attributes behind them."""
    state = collections.OrderedDict((f"x{i}", torch.tensor(i)) for i in range(2500))
    state._metadata = collections.OrderedDict({"": {"version": 1}, "x0": {"version": 2}})
    found = saved(tmp_path / "a", {"model": state, "ema": state}, kind, pickle_protocol=protocol)
    assert [found.read(f"{name}.x{i}") for name in ("model", "ema") for i in range(2500)] == 2 * [*range(2500)]
    assert len(found.found) == 5000 and not found.values


@both
def test_parameters_and_tensors_with_attributes_are_tensors(kind, tmp_path):
    parameter, marked = torch.nn.Parameter(torch.randn(3, 2).bfloat16()), torch.nn.Parameter(torch.randn(2))
    marked.note = "kept by torch"
    plain = torch.randn(4)
    plain.note = "this too"
    given = {"p": parameter, "marked": marked, "plain": plain, "list": [torch.randn(1), (torch.randn(2),)]}
    found = saved(tmp_path / "a", given, kind)
    assert list(found.found) == ["p", "marked", "plain", "list.0", "list.1.0"]
    assert same(found.read("p"), parameter) and same(found.read("marked"), marked) and same(found.read("plain"), plain)


@both
def test_a_tensor_by_itself_has_no_name(kind, tmp_path):
    assert same(saved(tmp_path / "a", torch.arange(5), kind).read(""), torch.arange(5))


@both
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_of_pickle_is_read(kind, protocol, tmp_path):
    found = saved(
        tmp_path / "a", views() | {"deep": {"x": [1, 2.5, None, True, "é", b"b"]}}, kind, pickle_protocol=protocol
    )
    assert all(same(found.read(name), tensor) for name, tensor in views().items())
    assert [found.values[f"deep.x.{i}"] for i in range(6)] == [1, 2.5, None, True, "é", b"b"]


@hypothesis.given(st.data())
def test_any_view_is_read_as_torch_reads_it(tmp_path_factory, data):
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    base = torch.arange(math.prod(shape), dtype=torch.int32).reshape(shape)
    view = base.permute(data.draw(st.permutations(range(len(shape)))))
    for axis in range(view.ndim):
        start, step = data.draw(st.integers(0, view.shape[axis])), data.draw(st.integers(1, 3))
        view = view[(slice(None),) * axis + (slice(start, None, step),)]
    path = tmp_path_factory.getbasetemp() / "view"
    assert same(saved(path, {"x": view}).read("x"), view)


def test_what_is_read_stays_when_the_file_is_gone_and_cannot_be_written_to(tmp_path):
    array = saved(tmp_path / "a", {"x": torch.ones(3)}).read("x")
    (tmp_path / "a").unlink()
    assert array.sum() == 3
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 2


# -------------------------------------------------------------------------------------------------- what would run code


class Runs:
    """An object whose pickle calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Plain:
    def __init__(self):
        self.x = 1


class WithState(dict):
    def __setstate__(self, state):
        raise AssertionError("was executed")


def archive(path, pickled, storages=None, compression=zipfile.ZIP_STORED, script=False):
    """Write the zip file of a given pickle, or that of a program with it."""
    with zipfile.ZipFile(path, "w", compression) as file:
        if script:
            file.writestr("a/code/__torch__.py", b"raise SystemExit\n" * 99, zipfile.ZIP_DEFLATED)
            file.writestr("a/constants.pkl", b"\x80\x02).")
        file.writestr("a/data.pkl", pickled)
        for key, data in (storages or {}).items():
            file.writestr(f"a/data/{key}", data)
    return path


def text(word):
    return pickle.BINUNICODE + struct.pack("<I", len(word)) + word.encode()


TOUCH = f"({text('touch executed').decode('latin1')}t".encode("latin1")
GLOBALS = {
    "GLOBAL": b"cos\nsystem\n",
    "STACK_GLOBAL": text("os") + text("system") + b"\x93",
    "a global from the memo": b"cos\nsystem\nq\x050h\x05",
    "a global made of two memos": text("os") + b"\x94" + text("system") + b"\x94" + b"00h\0h\1\x93",
}
MALICE = {
    **{f"REDUCE of {name}": (made + TOUCH + b"R.", "would call 'os.system'") for name, made in GLOBALS.items()},
    "NEWOBJ": (GLOBALS["GLOBAL"] + TOUCH + b"\x81.", "would make an object of 'os.system' (NEWOBJ)"),
    "NEWOBJ_EX": (GLOBALS["GLOBAL"] + TOUCH + b"}\x92.", "would make an object of 'os.system' (NEWOBJ_EX)"),
    "OBJ": (b"(" + GLOBALS["GLOBAL"] + text("touch executed") + b"o.", "would make an object of 'os.system' (OBJ)"),
    "INST": (b"(" + text("touch executed") + b"ios\nsystem\n.", "would make an object of 'os.system' (INST)"),
    "BUILD on a global": (GLOBALS["GLOBAL"] + b"}b.", "would set attributes of 'os.system'"),
    "BUILD on a list": (b"]}b.", "would set attributes of type list"),
    "an extension": (b"\x82\x01.", "would make an object of a kind that is not known here"),
    "a call within a call": (
        b"ccollections\nOrderedDict\n(" + GLOBALS["GLOBAL"] + TOUCH + b"RtR.",
        "would call 'os.system'",
    ),
    "getattr to reach it": (
        b"cbuiltins\ngetattr\n(cos\nsystem\n" + text("__call__") + b"tR.",
        "would call 'builtins.getattr'",
    ),
    "a dotted name": (
        text("collections") + text("OrderedDict.__init__.__globals__") + b"\x93)R.",
        "would call 'collections.Ord",
    ),
    "a call of a list": (b"])R.", "would call an object of type list"),
    "a call of what a call gave": (b"ccollections\nOrderedDict\n)R)R.", "would call an object of type dict"),
    "a global as arguments": (
        b"ccollections\nOrderedDict\ncos\nsystem\nR.",
        "would call 'collections.OrderedDict' with an object of type Global",
    ),
    "a change of a global": (
        GLOBALS["GLOBAL"] + text("a") + text("b") + b"s.",
        "would change 'os.system' as if it were",
    ),
    "torch.load": (b"ctorch\nload\n(" + text("x") + b"tR.", "would call 'torch.load'"),
    "a wrong number of arguments": (b"ctorch._utils\n_rebuild_parameter\n)R.", "is no whole pickle (TypeError"),
    "a storage of no type": (
        b"(" + text("storage") + GLOBALS["GLOBAL"] + text("0") + text("cpu") + b"K\1tQ.",
        "has a storage of type os.system",
    ),
    "a reference to anything": (text("secret") + b"Q.", "refers to 'secret', which is no storage"),
    "another file's text": (b"Psecret\n.", "refers to 'secret', which is no storage"),
    "a large number": (b"\x8b" + struct.pack("<i", 10**6) + b"\x7f" * 10**6 + b".", "holds a number of 7,999,9"),
    "a number in digits": (b"L" + b"9" * 10**5 + b"L\n.", "is no whole pickle"),
    "a tuple in a tuple ... as key": (
        b"}" + b")" + b"\x85" * 20_000 + b"K\1s.",
        "has a key of type tuple that is not plain",
    ),
    "a key twice, one by one": (b"}" + (text("wq") + b"K\1s") * 2 + b".", "has 'wq' twice"),
    "a key twice, all at once": (b"}(" + (text("wq") + b"K\1") * 2 + b"u.", "has 'wq' twice"),
    "a key twice in a whole dict": (b"(" + (text("wq") + b"K\1") * 2 + b"d.", "has 'wq' twice"),
    "a key twice in an ordered dict": (
        b"ccollections\nOrderedDict\n]" + (text("wq") + b"K\1\x86a") * 2 + b"\x85R.",
        "has 'wq' twice",
    ),
    "a key twice, given and added": (
        b"ccollections\nOrderedDict\n]" + text("wq") + b"K\1\x86a\x85R" + text("wq") + b"K\2s.",
        "has 'wq' twice",
    ),
    "a long key twice": (b"}" + (text("w" * 10**5) + b"K\1s") * 2 + b".", "has 'wwww"),
    "a list as key": (b"}]K\1s.", "has a key of type list that is not plain"),
    "a long text copied again and again": (
        b"X"
        + struct.pack("<I", 10**6)
        + b"x" * 10**6
        + b"q\0"
        + text("latin1")
        + b"q\1c_codecs\nencode\nq\2"
        + b"h\2h\0h\1\x86R0" * 9
        + b".",
        "hands over more than 8,388,608 things to '_codecs.encode'",
    ),
    "a memo that is not there": (b"h\5.", "is no whole pickle"),
    "nothing on the stack": (b".", "is no whole pickle"),
    "no end": (b"K\1", "is no whole pickle"),
    "an unknown instruction": (b"\xff.", "is no whole pickle"),
    "nothing": (b"", "is no whole pickle"),
    "a length of 2**63": (b"\x8d" + b"\xff" * 7 + b"\x7fabc.", "is no whole pickle"),
    "a mark too few": (b"t.", "is no whole pickle"),
}


@pytest.mark.parametrize("script", [False, True], ids=["", "in a program"])
@pytest.mark.parametrize("name", MALICE)
def test_a_pickle_that_would_run_code_or_is_broken_is_refused_by_name(name, script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickled, message = MALICE[name]
    for protocol in (b"", b"\x80\x02", b"\x80\x04"):
        path = archive(tmp_path / "weights", protocol + pickled, script=script)
        with pytest.raises(UserError) as e:
            tensors.open(path)
        assert f"{path}: its pickle {message}" in str(e.value) and "nothing was executed" in str(e.value)
        assert "\n" not in str(e.value) and len(str(e.value)) < 700
    assert not (tmp_path / "executed").exists()


@both
@pytest.mark.parametrize(
    ("thing", "named"),
    [
        (Runs(os.system, "touch executed"), f"{os.name}.system" if os.name == "nt" else "posix.system"),
        (Runs(eval, "open('executed', 'w')"), "builtins.eval"),
        (Runs(exec, "open('executed', 'w')"), "builtins.exec"),
        ({"state_dict": {"w": Runs(os.mkdir, "executed")}}, "posix.mkdir"),
        ([Runs(collections.OrderedDict, Runs(os.mkdir, "executed"))], "posix.mkdir"),
        (Runs(torch._utils._rebuild_parameter, Runs(os.mkdir, "executed"), True, None), "posix.mkdir"),
        (Plain(), "test_torch_files.Plain"),
        (WithState(a=1), "test_torch_files.WithState"),
        (torch.nn.Linear(2, 3), "torch.nn.modules.linear.Linear"),
        (torch.eye(3).to_sparse(), "torch.serialization._get_layout"),
        (np.float32(3), "numpy.dtype"),
    ],
)
def test_what_torch_itself_saved_and_would_run_code_is_refused_by_name(kind, thing, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=rf"a: its pickle would (call|make an object of) '[\w.]*{named.split('.')[-1]}'"
    ):
        saved(tmp_path / "a", thing, kind)
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------------------------------------------------- TorchScript


def openais():
    """Return a module with the attributes of OpenAI's CLIP, some of them shared, lists and numbers among them."""
    block = torch.nn.Module()
    block.attn = torch.nn.Module()
    block.attn.in_proj_weight = torch.nn.Parameter(torch.randn(6, 2).half())
    block.attn.out_proj = torch.nn.Linear(2, 2)
    block.mlp = torch.nn.Sequential(collections.OrderedDict(c_fc=torch.nn.Linear(2, 8), c_proj=torch.nn.Linear(8, 2)))
    clip = torch.nn.Module()
    clip.visual = torch.nn.Module()
    clip.visual.conv1 = torch.nn.Conv2d(3, 2, 4, bias=False).bfloat16()
    clip.visual.class_embedding = torch.nn.Parameter(torch.randn(2).half())
    clip.visual.transformer = torch.nn.Module()
    clip.visual.transformer.resblocks = torch.nn.Sequential(torch.nn.LayerNorm(2), torch.nn.Linear(2, 2))
    clip.transformer = torch.nn.Module()
    clip.transformer.add_module("resblocks", torch.nn.ModuleList([block, block]))
    clip.logit_scale = torch.nn.Parameter(torch.tensor(4.6))
    clip.register_buffer("context_length", torch.tensor(77))
    clip.sizes, clip.heads, clip.scale, clip.name = [1, 2], {"a": 1}, 0.5, "ViT"
    clip.flags, clip.means, clip.more = [True], [0.5, 0.25], [torch.ones(2)]
    return clip


@pytest.mark.parametrize("traced", [False, True], ids=["scripted", "traced"])
def test_a_torchscript_file_has_the_names_of_its_state_dict(traced, tmp_path):
    torch.manual_seed(0)
    module = torch.nn.Sequential(openais().visual.transformer.resblocks) if traced else openais()
    made = torch.jit.trace(module, torch.randn(1, 2)) if traced else torch.jit.script(module)
    torch.jit.save(made, tmp_path / "ViT-B-32.pt")
    found, state = tensors.open(tmp_path / "ViT-B-32.pt"), module.state_dict()
    lists = [] if traced else ["more.0"]
    assert set(found.found) == {*state, *lists}
    assert [name for name in found.found if name in state] == [*torch.jit.load(tmp_path / "ViT-B-32.pt").state_dict()]
    assert all(same(found.read(name), tensor) for name, tensor in state.items())
    if not traced:
        assert found.values["name"] == "ViT" and found.values["sizes.1"] == 2 and found.values["means.1"] == 0.25
        assert found.values["heads.a"] == 1 and found.values["training"] is True


MODULE = b"c__torch__.a\nBlock\n)\x81"
SPOILT = {
    "arguments": (b"c__torch__\nA\n(K\1t\x81.", "would make an object of '__torch__.A' (NEWOBJ)"),
    "arguments by name": (b"c__torch__\nA\n)}\x92.", "would make an object of '__torch__.A' (NEWOBJ_EX)"),
    "a call": (b"c__torch__\nA\n)R.", "would call '__torch__.A'"),
    "a call of its object": (MODULE + b")R.", "would call an object of type Attributes"),
    "another's class": (b"c__torch__x\nA\n)\x81.", "would make an object of '__torch__x.A' (NEWOBJ)"),
    "no attributes": (MODULE + b"K\1b.", "would set attributes by an object of type int"),
    "an attribute twice": (MODULE + (b"}" + text("wq") + b"K\1sb") * 2 + b".", "has 'wq' twice"),
    "many attributes again and again": (
        b"}q\0(" + b"".join(b"J" + struct.pack("<i", i) + b"N" for i in range(10**3)) + b"u0" + (MODULE + b"h\0b") * 99,
        "hands over more than 65,536 things to 'an object'",
    ),
}


@pytest.mark.parametrize(("pickled", "message"), SPOILT.values(), ids=SPOILT)
def test_a_program_whose_modules_are_no_plain_attributes_is_refused(pickled, message, tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "MOST_COPIED", 2**16)
    with pytest.raises(UserError) as e:
        tensors.open(archive(tmp_path / "a", pickled, script=True))
    assert f"a: its pickle {message}" in str(e.value)


def test_classes_of_a_program_are_refused_where_there_is_none(tmp_path):
    with pytest.raises(UserError, match=r"would make an object of '__torch__.a.Block' \(NEWOBJ\)"):
        tensors.open(archive(tmp_path / "a", MODULE + b"."))


def test_a_programs_numbers_are_not_compressed_and_modules_end(tmp_path):
    with pytest.raises(UserError, match="entry 'a/constants.pkl': is compressed|entry 'a/data.pkl': is compressed"):
        tensors.open(archive(tmp_path / "a", claim(), {"0": bytes(2**20)}, zipfile.ZIP_DEFLATED, script=True))
    with pytest.raises(UserError, match="64 containers in one another"):
        tensors.open(archive(tmp_path / "b", MODULE + b"q\0}" + text("x") + b"h\0sb.", script=True))


def test_numbers_that_are_not_what_is_stored_are_refused(tmp_path):
    with pytest.raises(UserError, match="resolve_neg"):
        saved(tmp_path / "a", {"x": torch.randn(3, dtype=torch.cfloat).conj().imag})


def test_reading_imports_nothing_that_the_pickle_names(tmp_path):
    """`this` prints when it is imported."""
    found = tensors.open(archive(tmp_path / "a", b"\x80\x02}cthis\ns\ncantigravity\nfly\ns."))
    assert found.values == {"this.s": pickles.Global("antigravity", "fly")}
    assert not {"this", "antigravity"} & set(__import__("sys").modules)


@hypothesis.given(st.binary(max_size=80))
@hypothesis.settings(max_examples=300)
def test_any_bytes_give_plain_things_or_a_refusal(data):
    try:
        pickles.load(io.BytesIO(data), torch_files.CALLS, torch_files._persistent)
    except pickles.Refused as e:
        assert len(str(e)) < 600


@hypothesis.given(st.lists(st.sampled_from(pickletools.opcodes), max_size=30), st.randoms())
@hypothesis.settings(max_examples=300)
def test_any_instructions_give_plain_things_or_a_refusal(opcodes, random):
    data = b"".join(o.code.encode("latin1") + (bytes([random.randrange(4)]) * 4 if o.arg else b"") for o in opcodes)
    start = b"K\1" + text("os") + b"(" + b"c__torch__\nA\n)\x81cos\nsystem\n)}]"
    for plain in (lambda kind: False, torch_files._of_the_program):
        try:
            pickles.load(io.BytesIO(start + data + b"."), torch_files.CALLS, torch_files._persistent, plain)
        except pickles.Refused as e:
            assert len(str(e)) < 600


def test_plain_pickles_are_read_as_python_reads_them():
    things = [
        {"a": [1, -1, 300, 2**40, -(2**70), 1.5]},
        ({"x"}, frozenset({1, 2})),
        [(), (1,), (1, 2, 3, 4)],
        "é\n",
        b"\0",
    ]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        for thing in things[: 5 if protocol > 3 else 1]:
            data = pickle.dumps(thing, protocol)
            assert pickles.load(io.BytesIO(data), {}, torch_files._none) == thing


# ---------------------------------------------------------------------------------------- what does not fit in its file


def claim(shape=(2, 3), stride=(3, 1), offset=0, count=6, kind="FloatStorage", key="0"):
    """Return the pickle of {"wq": tensor} as torch writes it, with these claims."""

    class Pickler(pickle._Pickler):
        def persistent_id(self, thing):
            return thing.id if isinstance(thing, Reference) else None

    class Reference:
        id = ("storage", getattr(torch, kind), key, "cpu", count)

    class Tensor:
        def __reduce__(self):
            hooks = collections.OrderedDict()
            return torch._utils._rebuild_tensor_v2, (Reference(), offset, shape, stride, False, hooks)

    data = io.BytesIO()
    Pickler(data, 2).dump({"wq": Tensor()})
    return data.getvalue()


STORED = np.arange(6, dtype=np.float32).tobytes()


def test_the_claim_that_the_tests_below_change_is_good(tmp_path):
    found = tensors.open(archive(tmp_path / "a", claim(), {"0": STORED}))
    np.testing.assert_array_equal(found.read("wq"), [[0, 1, 2], [3, 4, 5]])


CLAIMS = {
    "a shape beyond the storage": (dict(shape=(2, 4)), "shape (2, 4) with stride (3, 1) from 0 on does not fit the 6"),
    "a stride beyond the storage": (
        dict(stride=(4, 1)),
        "shape (2, 3) with stride (4, 1) from 0 on does not fit the 6",
    ),
    "an offset beyond the storage": (dict(offset=1), "from 1 on does not fit the 6 numbers"),
    "an absurd offset": (dict(offset=2**60), "offset, shape and stride"),
    "a negative offset": (dict(offset=-1), "offset, shape and stride"),
    "a negative stride": (dict(stride=(-3, 1)), "offset, shape and stride"),
    "a negative shape": (dict(shape=(-2, -3)), "offset, shape and stride"),
    "an absurd shape": (dict(shape=(2**40, 2**40), stride=(0, 0)), "offset, shape and stride"),
    "a bomb of strides of nothing": (dict(shape=(2**20, 2**20), stride=(0, 0)), "does not fit the 6 numbers"),
    "an empty absurd shape": (dict(shape=(0, 2**55, 2**55), stride=(1, 1, 1)), "offset, shape and stride"),
    "a shape in words": (dict(shape="ab"), "offset, shape and stride"),
    "a true shape": (dict(shape=(True,), stride=(1,)), "offset, shape and stride"),
    "too few strides": (dict(stride=(1,)), "shape (2, 3) and stride (1,) are not of one length"),
    "another count": (dict(count=7), "its storage has 24 bytes, 28 are claimed"),
    "another type": (dict(kind="HalfStorage"), "its storage has 24 bytes, 12 are claimed"),
    "a storage that is not there": (dict(key="1"), "its storage '1' is not in the file"),
    "a path for a storage": (dict(key="../0"), "its storage '../0' is not in the file"),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_a_tensor_that_does_not_fit_its_storage_is_refused_by_name(name, tmp_path):
    changes, message = CLAIMS[name]
    path = archive(tmp_path / "a", claim(**changes), {"0": STORED})
    with pytest.raises(UserError) as e:
        tensors.open(path)
    assert str(e.value).startswith(f"{path}: tensor 'wq': ") and "\n" not in str(e.value)
    assert message in str(e.value)


def test_a_compressed_entry_is_refused_by_name(tmp_path):
    path = archive(tmp_path / "a", claim(), {"0": bytes(2**20)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="entry 'a/data.pkl': is compressed"):
        tensors.open(path)


def test_entries_that_overlap_or_stand_twice_or_lie_outside_are_refused_by_name(tmp_path):
    path = archive(tmp_path / "a", claim(), {"0": STORED, "1": STORED})
    good = path.read_bytes()
    central = [i for i in range(len(good)) if good[i : i + 4] == b"PK\1\2"]  # of data.pkl, data/0 and data/1

    def changed(at, data, message):
        path.write_bytes(good[:at] + data + good[at + len(data) :])
        with pytest.raises(UserError, match=message):
            tensors.open(path)

    first = good[central[1] + 42 : central[1] + 46]
    changed(central[2] + 42, first, "entry 'a/data/[01]': overlaps the one before it")
    changed(central[2] + 46, b"a/data/0", "entry 'a/data/0': stands twice")
    changed(
        central[2] + 20, struct.pack("<II", 10**6, 10**6), "entry 'a/data/1': 1,000,000 bytes from .* behind the file"
    )
    changed(central[2] + 42, struct.pack("<I", len(good) - 10), "entry 'a/data/1': does not begin where")
    changed(40, b"\0", "entry 'a/data.pkl' is not what its checksum says|does not begin")


@both
def test_a_file_cut_off_is_refused(kind, tmp_path):
    saved(tmp_path / "a", views(), kind)
    whole = (tmp_path / "a").read_bytes()
    for part in (0.999, 0.9, 0.5, 0.1, 0.01):
        (tmp_path / "a").write_bytes(whole[: int(len(whole) * part)])
        with pytest.raises(UserError, match="a: "):
            tensors.open(tmp_path / "a")


@both
@hypothesis.given(data=st.data())
def test_changed_bytes_are_read_within_bounds_or_refused(kind, tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / f"changed {kind}"
    torch.save({"a": torch.ones(3, 2), "b": [torch.ones(2).half()]}, path, **KINDS[kind])
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(4, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole)
    try:
        found = tensors.open(path)
    except UserError as e:
        assert str(path) in str(e) and len(str(e)) < 900
    else:
        assert sum(found.read(name).nbytes for name in found.found) <= len(whole)


def test_containers_without_end_are_refused(tmp_path):
    doubling = (
        b"]q\0"
        + b"".join(b"]q" + bytes([i + 1]) + b"h" + bytes([i]) + b"ah" + bytes([i]) + b"a" for i in range(60))
        + b"."
    )
    with pytest.raises(UserError, match="more than 1,000,000 things"):
        tensors.open(archive(tmp_path / "a", doubling))
    with pytest.raises(UserError, match="64 containers in one another"):
        tensors.open(archive(tmp_path / "b", b"]q\0h\0a."))


def test_two_things_of_one_name_are_refused(tmp_path):
    with pytest.raises(UserError, match="'a.b' stands twice"):
        saved(tmp_path / "a", {"a.b": torch.ones(1), "a": {"b": torch.ones(1)}})


def test_files_that_are_not_torchs_are_told_apart(tmp_path):
    (tmp_path / "a").write_bytes(pickle.dumps({"x": 1}))
    with pytest.raises(UserError, match="a: a pickle, but not one of torch.save"):
        tensors.open(tmp_path / "a")
    with zipfile.ZipFile(tmp_path / "b", "w") as file:
        file.writestr("hello.txt", "hello")
    with pytest.raises(UserError, match="b: a zip file with 0 entries NAME/data.pkl"):
        tensors.open(tmp_path / "b")
