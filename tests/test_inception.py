"""FID's Inception: its tensors, its blocks and the whole of it against pytorch-fid's, with the same random weights."""

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from cm3jax.interop import inception as files
from cm3jax.nn import inception
from cm3jax.types import UserError


def theirs():
    """Return pytorch-fid's network without its weights, which it would download."""
    import torch_references

    reference = torch_references.module("pytorch_fid.inception")
    give, reference.load_state_dict_from_url = reference.load_state_dict_from_url, lambda *a, **k: {}
    kind = reference.torchvision.models.Inception3
    load, kind.load_state_dict = kind.load_state_dict, lambda self, state: None
    try:
        return reference.fid_inception_v3().eval()
    finally:
        reference.load_state_dict_from_url, kind.load_state_dict = give, load


def shapes(state):
    return {name: tuple(x.shape) for name, x in state.items() if "num_batches" not in name}


def given(module, seed=0):
    """Put random weights into a module of torch; return them."""
    import torch
    import torch_references

    found = torch_references.drawn(shapes(module.state_dict()), seed)
    module.load_state_dict({name: torch.tensor(x) for name, x in found.items()}, strict=False)
    return found


def ours(found, prefix=""):
    """Return our parameters of random tensors."""
    names = {source.name: path for path, source in files.sources().items()}
    params = {}
    for name, x in found.items():
        path = names[prefix + name].removeprefix(prefix.replace(".", "/"))
        params[path] = jnp.asarray(x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T)
    return flax.traverse_util.unflatten_dict(params, sep="/")


def test_there_are_as_many_numbers_as_in_the_published_network():
    found = files.sources()
    count = sum(np.prod(s.shape) for s in found.values() if "running" not in s.name)
    assert count == 23_834_568 + 8 * 2049  # of Inception v3 with 1000 logits, and 8 more
    assert len({source.name for source in found.values()}) == len(found) == 94 * 5 + 2


@pytest.mark.parametrize(
    ("name", "block", "side"),
    [
        ("Mixed_5b", inception.A(pool=32), 5),
        pytest.param("Mixed_6a", inception.B(), 7, marks=pytest.mark.slow),
        ("Mixed_6b", inception.C(inner=128), 5),
        pytest.param("Mixed_7a", inception.D(), 7, marks=pytest.mark.slow),
        pytest.param("Mixed_7b", inception.E(), 3, marks=pytest.mark.slow),
        ("Mixed_7c", inception.E(largest=True), 3),
    ],
)
def test_a_block_equals_that_of_pytorch_fid(name, block, side):
    import torch

    module = getattr(theirs_cached(), name)
    found = given(module)
    width = found["branch3x3.conv.weight" if name == "Mixed_6a" else next(iter(found))].shape[1]
    x = np.random.default_rng(1).normal(size=(2, side, side, width)).astype(np.float32)
    with torch.no_grad():
        wanted = module(torch.tensor(x.transpose(0, 3, 1, 2))).numpy().transpose(0, 2, 3, 1)
    got = jax.jit(block.apply)({"params": ours(found, f"{name}.")}, x)
    assert wanted.std() > 0.1 and got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, atol=1e-4)


CACHE = []


def theirs_cached():
    if not CACHE:
        CACHE.append(theirs())
    return CACHE[0]


def write(path, found):
    safetensors.numpy.save_file(found, path)
    return path


def blank():
    """Return tensors of the right names and shapes that take no memory to speak of."""
    return {source.name: np.zeros(source.shape, np.float16) for source in files.sources().values()}


def test_every_tensor_of_pytorch_fids_network_is_mapped_once():
    assert {s.name: s.shape for s in files.sources().values()} == shapes(theirs_cached().state_dict())


def test_a_file_that_is_not_the_networks_is_refused_with_the_tensors_name(tmp_path):
    full = blank()
    files.load(write(tmp_path / "good.safetensors", full | {"Mixed_5b.branch1x1.bn.num_batches_tracked": np.zeros(())}))
    wrong = {
        "no tensor 'Mixed_7c.branch_pool.bn.running_var'": {"Mixed_7c.branch_pool.bn.running_var": None},
        r"bad.safetensors: 'fc.weight' has shape \(1000, 2048\), must be \(1008, 2048\); take pt_inception": {
            "fc.weight": np.zeros((1000, 2048), np.float16)
        },
        r"bad.safetensors: 'AuxLogits.fc.bias' is no tensor of it \(1 such\)": {
            "AuxLogits.fc.bias": np.zeros(3, np.float16)
        },
        "fc.bias has numbers that are not finite": {"fc.bias": np.full(1008, np.nan, np.float16)},
    }
    for message, changes in wrong.items():
        found = {name: x for name, x in (full | changes).items() if x is not None}
        with pytest.raises(UserError, match=message):
            files.load(write(tmp_path / "bad.safetensors", found))
    with pytest.raises(UserError, match="no such file"):
        files.load(tmp_path / "nothing.pth")


@pytest.mark.slow
def test_features_and_logits_equal_those_of_pytorch_fid_from_its_own_file(tmp_path):
    import torch

    module = theirs()
    given(module, 3)
    torch.save(module.state_dict(), tmp_path / "weights.pth")
    params, digest = files.load(tmp_path / "weights.pth")
    assert len(digest) == 64
    x = np.random.default_rng(1).uniform(-1, 1, (3, 299, 299, 3)).astype(np.float32)
    features, logits = jax.jit(inception.Inception().apply)({"params": params}, x)
    seen = []
    module.avgpool.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        module.transform_input = False
        wanted = module(torch.tensor(x.transpose(0, 3, 1, 2)))
    assert seen[0].std() > 0.1
    np.testing.assert_allclose(features, seen[0][:, :, 0, 0], atol=1e-4)
    np.testing.assert_allclose(logits, wanted, atol=1e-3)


@pytest.mark.slow
def test_the_fid_of_two_folders_equals_that_of_pytorch_fid(tmp_path, monkeypatch):
    """Files to figure, each program by itself; random weights, few pictures, so that both covariances are singular."""
    import torch
    import torch_references

    from cm3jax.config import Score, Weights
    from cm3jax.evaluate import score

    reference, fid_score = (torch_references.module(f"pytorch_fid.{name}") for name in ("inception", "fid_score"))
    module = theirs()
    given(module, 3)
    torch.save(module.state_dict(), tmp_path / "weights.pth")
    rng = np.random.default_rng(0)
    for side, size in (("drawn", 8), ("real", 19)):
        (tmp_path / side).mkdir()
        for i in range(11):
            small = Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8))
            small.resize((67, 67), Image.Resampling.BICUBIC).save(tmp_path / side / f"{i}.png")
    settings = Score(weights=Weights(inception=str(tmp_path / "weights.pth")), batch=8)
    result = score.score(
        tmp_path / "drawn", tmp_path / "real", settings, tmp_path / "r.json", tmp_path / "cache", say=lambda line: None
    )
    found = result["metrics"]["fid"]

    monkeypatch.setattr(reference, "fid_inception_v3", lambda: module)
    net = reference.InceptionV3([3])
    sides = [sorted((tmp_path / side).glob("*.png")) for side in ("drawn", "real")]
    acts = [fid_score.get_activations(side, net, 11, num_workers=0) for side in sides]
    cached = next((tmp_path / "cache").glob("*/00000.npy"))
    assert min(np.abs(np.load(cached) - x).max() for x in acts) < 1e-4
    # Turned to the directions that there are, which changes no distance: a root of 2048 x 2048 takes minutes.
    basis = np.linalg.qr(np.concatenate(acts).T)[0]
    (a, b), (c, d) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (act @ basis for act in acts))
    wanted = fid_score.calculate_frechet_distance(a, b, c, d)
    assert wanted > 1 and found["value"] == pytest.approx(wanted, rel=1e-3)
    assert "from 11 samples, too few for the 2048 numbers" in found["warning"]
