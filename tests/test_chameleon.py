"""Laws of Chameleon's tensors and ours; what transformers makes of them is in test_chameleon_parity."""

import dataclasses
import json

import chameleons
import flax.traverse_util
import jax
import ml_dtypes
import numpy as np
import pytest

from cm3jax import config as configs
from cm3jax import sharding, trees
from cm3jax.interop import chameleon, chameleon_vocab, mapped
from cm3jax.nn import decoder
from cm3jax.types import UserError

ALL = pytest.mark.parametrize("changes", chameleons.CONFIGS.values(), ids=chameleons.CONFIGS)


def same(a, b):
    """Tell whether two dicts hold the same bits under the same names."""
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and a[n].tobytes() == b[n].tobytes() for n in a
    )


def read(tensors):
    return {name: tensor.read() for name, tensor in tensors.items()}


@ALL
def test_tensors_come_back_bit_for_bit(changes):
    settings = chameleons.about(**changes)
    given, (network, order) = chameleons.random_tensors(settings), chameleons.opened(settings)
    params = chameleon.read(given, network.model, order)
    again = read(chameleon.tensors(mapped.named(params), network.model, order))
    assert same(given, again)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, chameleon.read(again, network.model, order)))


@ALL
def test_parameters_are_those_that_the_decoder_makes(changes):
    settings = chameleons.about(**changes)
    network, order = chameleons.opened(settings)
    params = chameleon.read(chameleons.random_tensors(settings), network.model, order)
    net = decoder.Decoder(network.model, network.rows, network.length)
    wanted = sharding.unbox(jax.eval_shape(lambda key: decoder.init(net, key), jax.random.key(0)))
    assert jax.tree.structure(params) == jax.tree.structure(wanted)
    assert jax.tree.all(jax.tree.map(lambda x, y: x.shape == y.shape and x.dtype == y.dtype, params, wanted))


@pytest.mark.parametrize("half", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_kept_until_asked_for_and_survives_float32(half):
    settings = chameleons.about()
    given, (network, order) = chameleons.random_tensors(settings, half), chameleons.opened(settings)
    kept = chameleon.read(given, network.model, order, dtype=None)
    assert {x.dtype for x in jax.tree.leaves(kept)} == {np.dtype(half)}
    wide = chameleon.read(given, network.model, order)
    assert same(given, read(chameleon.tensors(mapped.named(wide), network.model, order, half)))


def test_rows_of_both_tables_follow_the_vocabulary():
    settings = chameleons.about()
    given, (network, order) = chameleons.random_tensors(settings), chameleons.opened(settings)
    params, code = chameleon.read(given, network.model, order), 23
    theirs = settings["vocabulary_map"][chameleon_vocab.spelt(code)]
    assert theirs != order.vocab.image_start + code
    for ours, name in (("table", "model.embed_tokens.weight"), ("head", "lm_head.weight")):
        assert np.array_equal(params[ours][order.vocab.image_start + code], given[name][theirs])


@pytest.mark.parametrize("shape", [{"fsdp": 4, "tensor": 2}, {"fsdp": 8}, {"tensor": 4, "fsdp": 1}], ids=str)
def test_parameters_on_a_mesh_are_those_in_memory(shape):
    settings = chameleons.about(vocab_size=160)
    given, (network, order) = chameleons.random_tensors(settings), chameleons.opened(settings)
    net = decoder.Decoder(network.model, network.rows, network.length)
    boxed = jax.eval_shape(lambda key: decoder.init(net, key), jax.random.key(0))
    places = sharding.shardings(sharding.mesh(configs.Mesh(**shape)), boxed, strict="")
    found = chameleon.read(given, network.model, order, shardings=places)
    whole = chameleon.read(given, network.model, order)
    assert jax.tree.all(jax.tree.map(np.array_equal, found, whole))
    assert jax.tree.all(jax.tree.map(lambda x, y: x.sharding == y, found, places))
    assert len(found["head"].addressable_shards[0].data) < network.rows


class Sparse(dict):
    """Tensors of the right shape, without any memory."""

    def __getitem__(self, name):
        return np.broadcast_to(np.float16(0), super().__getitem__(name))


def test_the_7b_takes_each_of_its_tensors_once():
    """Sizes of arXiv 2405.09818 table 1 (the 7B), 11 tensors a layer with the two norms of q and k."""
    network = chameleon.network({"model_type": "chameleon"})
    wanted = chameleon.leaves(network.model, network.rows)
    names = [name for leaf in wanted.values() for name in leaf.names]
    assert len(names) == len(set(names)) == 32 * 13 + 3
    count = sum(len(leaf.names) * int(np.prod(leaf.theirs)) for leaf in wanted.values())
    assert count == decoder.parameter_count(network.model, network.rows, network.length) == 7_013_666_816
    chameleon.compare(Sparse({name: leaf.theirs for leaf in wanted.values() for name in leaf.names}), wanted)


def test_the_image_tokenizer_and_buffers_may_lie_beside():
    settings = chameleons.about()
    network, order = chameleons.opened(settings)
    more = {"model.vqmodel.quantize.embedding.weight": np.ones(3), "model.layers.0.self_attn.rotary_emb.inv_freq": 0}
    given = chameleons.random_tensors(settings)
    params = chameleon.read(given | more, network.model, order)
    assert trees.size(params) == sum(x.size for x in given.values())


# -------------------------------------------------------------------------------------------------------- what is wrong


Q = "model.layers.1.self_attn.q_proj.weight"
BROKEN = {
    "missing": (lambda t: t.pop(Q), f"no tensor '{Q}'"),
    "transposed": (
        lambda t: t.update({Q.replace("q_proj", "q_norm"): np.ones((8, 4))}),
        "model.layers.1.self_attn.q_norm.weight' has shape (8, 4), must be (4, 8)",
    ),
    "left over": (lambda t: t.update({"model.layers.3.mlp.up_proj.weight": t[Q]}), "model.layers.3.mlp.up_proj.weight"),
    "a bias": (
        lambda t: t.update({Q.replace("weight", "bias"): t[Q][0]}),
        "model.layers.1.self_attn.q_proj.bias' is no",
    ),
    "another row count": (
        lambda t: t.update({"lm_head.weight": np.ones((132, 32))}),
        "lm_head.weight' has shape (132, 32)",
    ),
}


@pytest.mark.parametrize(("spoil", "words"), BROKEN.values(), ids=BROKEN)
def test_a_wrong_tensor_is_refused_by_its_name(spoil, words):
    settings = chameleons.about()
    given, (network, order) = chameleons.random_tensors(settings), chameleons.opened(settings)
    spoil(given)
    with pytest.raises(UserError) as e:
        chameleon.read(given, network.model, order, where="folder 'x'")
    assert str(e.value).startswith("folder 'x': ")
    assert words in str(e.value)


def test_a_tied_head_that_is_written_out_must_be_the_table():
    settings = chameleons.about(tie_word_embeddings=True)
    given, (network, order) = chameleons.random_tensors(settings), chameleons.opened(settings)
    table = given["model.embed_tokens.weight"]
    chameleon.read(given | {"lm_head.weight": table}, network.model, order)
    with pytest.raises(UserError, match="set tie_word_embeddings to false"):
        chameleon.read(given | {"lm_head.weight": table + 1}, network.model, order)


STRANGE = {
    "another model": ({"model_type": "llama"}, "model_type = 'llama'"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    "another eps": ({"rms_norm_eps": 1e-6}, "rms_norm_eps = 1e-06"),
    "biases": ({"attention_bias": True}, "attention_bias = True"),
    "scaled waves": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type = 'linear'"),
    "waves of a word": ({"rope_theta": "10000"}, "rope_theta = '10000'"),
    "odd heads": ({"hidden_size": 36}, "hidden_size = 36"),
    "heads of their own width": ({"head_dim": 16}, "hidden_size = 32"),
    "groups": ({"num_key_value_heads": 3}, "num_attention_heads = 4: must be a multiple of num_key_value_heads = 3"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers = 0: must be a whole number from 1 on"),
    "a word": ({"num_hidden_layers": "3"}, "num_hidden_layers = '3'"),
    "a number for a switch": ({"swin_norm": 1}, "swin_norm = 1: must be true or false"),
}


@pytest.mark.parametrize(("changes", "words"), STRANGE.values(), ids=STRANGE)
def test_a_config_that_the_decoder_is_not_is_refused_by_its_field(changes, words):
    with pytest.raises(UserError) as e:
        chameleon.network(chameleons.about(**changes), "folder/config.json")
    assert str(e.value).startswith("folder/config.json: ")
    assert words in str(e.value)


def test_old_and_new_names_of_the_waves_are_one():
    old = chameleon.network(chameleons.about(rope_theta=500, rope_scaling=None))
    new = chameleon.network(chameleons.about(rope_parameters={"rope_type": "default", "rope_theta": 500.0}))
    assert old == new
    assert new.model.rope_theta == 500


@ALL
def test_settings_come_back(changes):
    settings = chameleons.about(**changes)
    network = chameleon.network(settings)
    again = chameleon.settings(network.model, network.rows, network.length, settings["vocabulary_map"])
    assert chameleon.network(json.loads(json.dumps(again))) == network


def test_what_is_no_chameleon_is_not_exported_as_one():
    model = chameleon.network(chameleons.about()).model
    for change in ({"activation": "relu"}, {"qk_norm": False}, {"position": "both"}, {"head_size": 6}):
        with pytest.raises(UserError, match=f"decoder.model.{next(iter(change))} = "):
            chameleon.settings(dataclasses.replace(model, **change), 131, 97, chameleons.vocabulary())


def test_every_parameter_has_a_name():
    assert len(set(chameleon.NAMES)) == len(chameleon.NAMES)
    paths = chameleon.leaves(chameleon.network(chameleons.about()).model, chameleons.ROWS)
    assert all("{" not in name for leaf in paths.values() for name in leaf.names)
    assert flax.traverse_util.unflatten_dict(paths, sep="/").keys() == {"table", "head", "layers", "norm"}
