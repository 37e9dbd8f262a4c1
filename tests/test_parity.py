"""The decoder against networks that nobody here wrote: transformers' OPT, Llama and Chameleon, with our weights."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from cm3jax import bench, config
from cm3jax.nn import decoder

pytestmark = pytest.mark.slow  # transformers takes its time to import

VOCAB, LENGTH = 61, 19
CM3LEON = config.Decoder(layers=3, width=24, heads=3, dtype="float32", remat="none")
LLAMA = dataclasses.replace(
    CM3LEON,
    width=32,
    heads=4,
    kv_heads=2,
    mlp_width=44,
    activation="swiglu",
    norm="rmsnorm",
    position="rope",
    tied=False,
)
IDS = np.random.default_rng(0).integers(0, VOCAB, (2, LENGTH))


def ours(model: config.Decoder):
    """Return random weights of a model, and its logits on IDS."""
    net = decoder.Decoder(model, VOCAB, LENGTH)
    params = bench.random_params(net)
    place = jnp.broadcast_to(jnp.arange(LENGTH), IDS.shape)
    hidden, _ = net.apply({"params": params}, jnp.asarray(IDS, jnp.int32), place, jnp.ones(IDS.shape, jnp.int32))
    logits = np.asarray(decoder.logits(params, model, hidden))
    assert logits.std() > 0.1, "too flat to tell a mistake"
    return params, logits


def theirs(model, state) -> np.ndarray:
    """Return the logits on IDS of a transformers model with these weights; every one of the decoder's must be given."""
    left = model.load_state_dict({name: torch.tensor(np.asarray(x)) for name, x in state.items()}, strict=False)
    missing = [name for name in left.missing_keys if name != "lm_head.weight" and "vqmodel" not in name]
    assert not left.unexpected_keys and not missing, left
    with torch.no_grad():
        return model.eval()(torch.tensor(IDS)).logits.numpy()


def test_cm3leon_is_opt_without_biases_and_learned_norms():
    import transformers

    params, logits = ours(CM3LEON)
    settings = transformers.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=CM3LEON.width,
        ffn_dim=4 * CM3LEON.width,
        num_hidden_layers=CM3LEON.layers,
        num_attention_heads=CM3LEON.heads,
        max_position_embeddings=LENGTH,
        word_embed_proj_dim=CM3LEON.width,
        do_layer_norm_before=True,
        enable_bias=False,
        layer_norm_elementwise_affine=False,
        activation_function="relu",
        dropout=0.0,
        attention_dropout=0.0,
        tie_word_embeddings=True,
    )
    table = np.asarray(params["positions"])
    state = {
        "model.decoder.embed_tokens.weight": params["table"],
        "model.decoder.embed_positions.weight": np.concatenate([np.full((2, CM3LEON.width), np.nan), table]).astype(
            np.float32
        ),  # OPT's positions begin at row 2
    }
    attention, mlp = params["layers"]["attention"], params["layers"]["mlp"]
    for i in range(CM3LEON.layers):
        layer = f"model.decoder.layers.{i}."
        for name in ("q", "k", "v", "out"):
            state[f"{layer}self_attn.{name}_proj.weight"] = attention[name]["w"][i].T
        state[f"{layer}fc1.weight"], state[f"{layer}fc2.weight"] = mlp["up"]["w"][i].T, mlp["down"]["w"][i].T
    found = theirs(transformers.OPTForCausalLM(settings), state)
    np.testing.assert_allclose(logits, found, atol=1e-4)


def llama_state(model: config.Decoder, params) -> dict:
    """Return our weights under the names that Llama and Chameleon share."""
    state = {
        "model.embed_tokens.weight": params["table"],
        "model.norm.weight": params["norm"]["scale"],
        "lm_head.weight": params["head"],
    }
    layers = params["layers"]
    for i in range(model.layers):
        layer = f"model.layers.{i}."
        for name, other in {"q": "q", "k": "k", "v": "v", "out": "o"}.items():
            state[f"{layer}self_attn.{other}_proj.weight"] = layers["attention"][name]["w"][i].T
        for name in ("gate", "up", "down"):
            state[f"{layer}mlp.{name}_proj.weight"] = layers["mlp"][name]["w"][i].T
        state[f"{layer}input_layernorm.weight"] = layers["attention_norm"]["scale"][i]
        state[f"{layer}post_attention_layernorm.weight"] = layers["mlp_norm"]["scale"][i]
        for name in ("q_norm", "k_norm") if model.qk_norm else ():
            state[f"{layer}self_attn.{name}.weight"] = layers["attention"][name]["scale"][i]
            state[f"{layer}self_attn.{name}.bias"] = layers["attention"][name]["bias"][i]
    return state


def llama_settings(model: config.Decoder) -> dict:
    """Return the settings that Llama and Chameleon share."""
    return {
        "vocab_size": VOCAB,
        "hidden_size": model.width,
        "intermediate_size": model.mlp_width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "max_position_embeddings": LENGTH,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": False,
    }


def test_rope_swiglu_rmsnorm_and_grouped_queries_are_llamas():
    import transformers

    params, logits = ours(LLAMA)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama_settings(LLAMA)))
    np.testing.assert_allclose(logits, theirs(model, llama_state(LLAMA, params)), atol=1e-4)


@pytest.mark.parametrize("order", ["pre", "post"])
def test_qk_norm_and_both_norm_orders_are_chameleons(order):
    import transformers

    chameleon = dataclasses.replace(LLAMA, qk_norm=True, norm_order=order)
    params, logits = ours(chameleon)
    tokenizer = {"resolution": 8, "base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "embed_dim": 8}
    settings = transformers.ChameleonConfig(
        **llama_settings(chameleon),
        swin_norm=order == "post",
        vq_config={**tokenizer, "num_embeddings": 4, "latent_channels": 8},
        vocabulary_map={"<image>": VOCAB - 1},
    )
    model = transformers.ChameleonForConditionalGeneration(settings)
    np.testing.assert_allclose(logits, theirs(model, llama_state(chameleon, params)), atol=1e-4)
