"""CLIP against the one that nobody here wrote: transformers' CLIPModel, with the same random weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from cm3jax import config, foreign, sharding
from cm3jax.nn import clip
from cm3jax.retrieval import encoder, weights
from cm3jax.tokenizers import clip as tokenizers
from cm3jax.tokenizers import text

pytestmark = pytest.mark.slow  # transformers takes its time to import

SIZES = {
    "quick_gelu": dict(activation="quick_gelu", resolution=15, patch=5, vision=(24, 3, 2), text=(20, 2, 5), context=13),
    "gelu": dict(activation="gelu", resolution=14, patch=7, vision=(21, 1, 3), text=(33, 3, 3), context=11),
    "one patch": dict(activation="quick_gelu", resolution=9, patch=9, vision=(10, 2, 1), text=(14, 1, 7), context=7),
}
"""Width, layers and heads of each tower."""
VOCAB, SIZE, B = 61, 19, 5
END = VOCAB - 1


def theirs(sizes, folder):
    """Save a transformers model with random weights in `folder`; return it."""
    import torch
    import transformers

    torch.manual_seed(0)

    def tower(width, layers, heads):
        return {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "hidden_act": sizes["activation"],
        }

    model = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=tower(*sizes["text"])
            | {
                "vocab_size": VOCAB,
                "max_position_embeddings": sizes["context"],
                "eos_token_id": END,
                "bos_token_id": 0,
            },
            vision_config=tower(*sizes["vision"]) | {"image_size": sizes["resolution"], "patch_size": sizes["patch"]},
            projection_dim=SIZE,
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too, which start as 1 and 0
            parameter.copy_(torch.randn(parameter.shape) * (0.3 if parameter.ndim > 1 else 0.5) + 0.1)
        model.logit_scale.fill_(1.7)
    model.save_pretrained(folder)
    return model


def inputs(context, resolution):
    """Return ids [b, t] with an end somewhere, where it is, and pictures."""
    rng = np.random.default_rng(1)
    ids, ends = rng.integers(1, END, (B, context)), rng.integers(1, context, B)
    ids[np.arange(context) >= ends[:, None]] = END
    return ids.astype(np.int32), ends.astype(np.int32), rng.integers(0, 256, (B, resolution, resolution, 3), np.uint8)


@pytest.mark.parametrize("name", SIZES)
def test_outputs_equal_those_of_transformers(name, tmp_path):
    import torch

    model = theirs(SIZES[name], tmp_path)
    config, params = weights.load(tmp_path)
    ids, ends, pictures = map(jnp.asarray, inputs(config.context, config.resolution))
    pixels = torch.tensor(np.asarray(clip.normalise(pictures)).transpose(0, 3, 1, 2))
    with torch.no_grad():
        found = model(input_ids=torch.tensor(np.asarray(ids), dtype=torch.long), pixel_values=pixels)
        pooled = model.vision_model(pixel_values=pixels).pooler_output
    net = clip.CLIP(config, VOCAB)
    texts, vectors, scale = net.apply({"params": params}, ids, ends, pictures)
    features = net.apply({"params": params}, pictures, method="features")
    assert found.text_embeds.std() > 0.05 and found.image_embeds.std(0).max() > 1e-3, "too flat to tell a mistake"
    np.testing.assert_allclose(texts, found.text_embeds, atol=1e-5)
    np.testing.assert_allclose(vectors, found.image_embeds, atol=1e-5)
    np.testing.assert_allclose(features, pooled, atol=1e-5)
    np.testing.assert_allclose(scale * texts @ vectors.T, found.logits_per_text, atol=1e-4)  # scale: 5.5


def test_pictures_are_resized_and_cropped_as_transformers_does():
    from transformers.models.clip import image_processing_pil_clip as processing

    from cm3jax.data import pictures

    rng = np.random.default_rng(0)
    processor = processing.CLIPImageProcessorPil(
        size={"shortest_edge": 15}, crop_size={"height": 15, "width": 15}, do_normalize=False, do_rescale=False
    )
    for shape in [(15, 15), (31, 15), (15, 44), (7, 11), (101, 53), (64, 64)]:
        picture = rng.integers(0, 256, (*shape, 3), np.uint8)
        found = np.asarray(processor(picture)["pixel_values"][0]).transpose(1, 2, 0)
        np.testing.assert_array_equal(pictures.square(picture, 15), found.astype(np.uint8), err_msg=str(shape))


def openai(state):
    """Return Hugging Face's tensors under OpenAI's names, with what else stands in OpenAI's files."""
    out = {"input_resolution": np.int64(15), "context_length": np.int64(13), "vocab_size": np.int64(VOCAB)}
    for ours, tower in (("", "text_model."), ("visual.", "vision_model.")):
        for i in range(2):
            here, there = f"{ours}transformer.resblocks.{i}.", f"{tower}encoder.layers.{i}."
            for kind in ("weight", "bias"):
                parts = [state[f"{there}self_attn.{x}_proj.{kind}"] for x in "qkv"]
                out[f"{here}attn.in_proj_{kind}"] = np.concatenate(parts)
                out[f"{here}attn.out_proj.{kind}"] = state[f"{there}self_attn.out_proj.{kind}"]
                out[f"{here}mlp.c_fc.{kind}"] = state[f"{there}mlp.fc1.{kind}"]
                out[f"{here}mlp.c_proj.{kind}"] = state[f"{there}mlp.fc2.{kind}"]
                out[f"{here}ln_1.{kind}"] = state[f"{there}layer_norm1.{kind}"]
                out[f"{here}ln_2.{kind}"] = state[f"{there}layer_norm2.{kind}"]
    for kind in ("weight", "bias"):
        out[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
        out[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
        out[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
    out["token_embedding.weight"] = state["text_model.embeddings.token_embedding.weight"]
    out["positional_embedding"] = state["text_model.embeddings.position_embedding.weight"]
    out["visual.positional_embedding"] = state["vision_model.embeddings.position_embedding.weight"]
    out["visual.class_embedding"] = state["vision_model.embeddings.class_embedding"]
    out["visual.conv1.weight"] = state["vision_model.embeddings.patch_embedding.weight"]
    out["text_projection"], out["visual.proj"] = state["text_projection.weight"].T, state["visual_projection.weight"].T
    out["logit_scale"] = state["logit_scale"]
    return {name: np.ascontiguousarray(x) if x.ndim else np.asarray(x) for name, x in out.items()}


def test_both_layouts_load_to_equal_parameters(tmp_path):
    sizes = dict(activation="quick_gelu", resolution=15, patch=5, vision=(64, 2, 1), text=(128, 2, 2), context=13)
    theirs(sizes, tmp_path / "hf")
    state = safetensors.numpy.load_file(tmp_path / "hf" / weights.FILE)
    (tmp_path / "openai").mkdir()
    safetensors.numpy.save_file(openai(state), tmp_path / "openai" / weights.FILE)
    assert not {"logit_scale"} ^ (set(openai(state)) & set(state)), "all other names differ"
    (model, params), (other, others) = weights.load(tmp_path / "hf"), weights.load(tmp_path / "openai")
    assert model == other and model == weights.look(tmp_path / "openai")
    jax.tree.map(np.testing.assert_array_equal, params, others)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["text_config"]["hidden_act"] == model.activation


def test_a_retriever_exported_gives_the_same_vectors_in_transformers(tmp_path):
    """Of a run, with a tokenizer of its own."""
    import torch
    import transformers
    from transformers.models.clip import image_processing_pil_clip as processing

    pieces, run = (
        text.train(["a red circle", "two green stars"] * 9, 300, tmp_path / "tokenizer.model"),
        tmp_path / "run",
    )
    model = config.CLIP(15, 5, 24, 2, 2, 9, 20, 3, 5, 7, "gelu")
    net = clip.CLIP(model, tokenizers.Pieces(tmp_path / "tokenizer.model").rows)
    shapes = sharding.unbox(jax.eval_shape(lambda key: clip.init(net, key), jax.random.key(0)))
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda x: (0.3 * draw.normal(size=x.shape)).astype(np.float32), shapes)
    encoder.save(run / "retriever", model, params, tokenizers.load(tmp_path))
    (run / "recipe.json").write_text(json.dumps(config.to_json(config.Recipe())))
    foreign.send(run, str(tmp_path / "out"), "hf", say=lambda line: None)
    theirs, told = transformers.CLIPModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = encoder.load(run / "retriever", batch=8)
    words = ["a red circle", "green", "two stars, and far more words than fit into the context"]
    ids, _ = tokenizers.arrays([pieces.encode(x) for x in words], ours.tokenizer, model.context)
    pictures = draw.integers(0, 256, (3, 15, 15, 3), np.uint8)
    pixels = torch.tensor(np.asarray(clip.normalise(jnp.asarray(pictures))).transpose(0, 3, 1, 2))
    with torch.no_grad():
        found = theirs.eval()(input_ids=torch.tensor(ids, dtype=torch.long), pixel_values=pixels)
    assert found.text_embeds.std() > 0.05 and found.image_embeds.std(0).max() > 1e-3, "too flat to tell a mistake"
    np.testing.assert_allclose(ours.texts(words), found.text_embeds, atol=1e-5)
    np.testing.assert_allclose(ours.pictures(pictures), found.image_embeds, atol=1e-5)
    processor = processing.CLIPImageProcessorPil.from_pretrained(tmp_path / "out")
    np.testing.assert_allclose(processor(list(pictures), return_tensors="pt")["pixel_values"], pixels, atol=1e-5)
