"""Laws of the CLIP score and of R-precision; the score of torchmetrics with the same network."""

import types

import numpy as np
import pytest

from cm3jax.evaluate import clip_score
from cm3jax.types import UserError


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


RNG = np.random.default_rng(0)
TEXTS, PICTURES = unit(RNG.normal(size=(23, 7)) + 0.3), unit(RNG.normal(size=(23, 7)) + 0.3)
CAPTIONS = [f"caption {i}" for i in range(23)]


def test_the_score_is_a_hundred_times_the_mean_cosine_and_never_below_0():
    assert clip_score.score(TEXTS, TEXTS) == pytest.approx(100)
    assert clip_score.score(TEXTS, PICTURES) == pytest.approx(
        100 * np.mean([a @ b for a, b in zip(TEXTS, PICTURES, strict=True)])
    )
    assert clip_score.score(TEXTS, -TEXTS) == 0


def test_with_all_captions_as_candidates_it_is_the_share_of_pictures_nearest_to_their_own():
    wanted = np.mean((PICTURES @ TEXTS.T).argmax(1) == np.arange(23))
    assert clip_score.r_precision(CAPTIONS, TEXTS, PICTURES, 23) == wanted
    assert clip_score.r_precision(CAPTIONS, TEXTS, TEXTS, 23) == 1
    assert clip_score.r_precision(CAPTIONS, TEXTS, TEXTS[::-1], 23) == 1 / 23  # the one in the middle


def test_fewer_candidates_are_easier_and_follow_from_the_seed():
    few = [clip_score.r_precision(CAPTIONS, TEXTS, PICTURES, 2, seed) for seed in range(20)]
    assert np.mean(few) > 2 * clip_score.r_precision(CAPTIONS, TEXTS, PICTURES, 23)
    assert few[3] == clip_score.r_precision(CAPTIONS, TEXTS, PICTURES, 2, 3) and len(set(few)) > 3


def test_a_picture_does_not_depend_on_the_others_of_its_block(monkeypatch):
    whole = clip_score.r_precision(CAPTIONS, TEXTS, PICTURES, 5)
    monkeypatch.setattr(clip_score, "BLOCK", 4)
    assert clip_score.r_precision(CAPTIONS, TEXTS, PICTURES, 5) == whole


def test_equal_captions_are_one_candidate():
    """Else a picture would be compared with its own words, and never be nearer to them than to themselves."""
    twice = lambda x: np.concatenate([x, x])  # noqa: E731
    assert clip_score.r_precision(CAPTIONS * 2, twice(TEXTS), twice(TEXTS), 23) == 1
    with pytest.raises(UserError, match="among 24 candidates with 23 different captions"):
        clip_score.r_precision(CAPTIONS * 2, twice(TEXTS), twice(TEXTS), 24)


@pytest.mark.slow
def test_the_score_equals_that_of_torchmetrics(tmp_path):
    import jax.numpy as jnp
    import torch
    import torch_references  # noqa: F401
    from test_clip_parity import SIZES, theirs
    from torchmetrics.multimodal.clip_score import CLIPScore

    from cm3jax.evaluate import features
    from cm3jax.nn import clip
    from cm3jax.retrieval import weights

    model = theirs(SIZES["gelu"], tmp_path)
    model.visual_projection.weight.data.neg_()  # with these weights all cosines are below 0, and the score is 0
    model.save_pretrained(tmp_path)
    config, params = weights.load(tmp_path)
    rng = np.random.default_rng(3)
    pictures = rng.integers(0, 256, (9, config.resolution, config.resolution, 3), np.uint8)
    ids = rng.integers(1, 60, (200, config.context)).astype(np.int32)
    ids[:, -1] = 60
    net = clip.CLIP(config, len(params["text"]["table"]))
    ends = jnp.full(len(ids), config.context - 1)
    texts = np.asarray(net.apply({"params": params}, jnp.asarray(ids), ends, method="texts"))
    encoder = types.SimpleNamespace(config=config, params=params, size=config.size, identity="random")
    shown = unit(features.of_clip(encoder, 4)(pictures))
    chosen = (shown @ texts.T).argmax(1)

    class Bare:
        """transformers 5 returns more than vectors, which torchmetrics does not expect."""

        config = model.config

        def to(self, device):
            return self

        def eval(self):
            return self

        def get_image_features(self, x):
            return model.get_image_features(x).pooler_output

        def get_text_features(self, x, mask):
            return model.get_text_features(x, mask).pooler_output

    def processor(text=None, images=None, **other):
        if text is not None:
            rows = torch.tensor(ids[[int(t) for t in text]], dtype=torch.long)
            return {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
        x = np.stack([np.asarray(picture).transpose(1, 2, 0) for picture in images])
        return {"pixel_values": torch.tensor(np.asarray(clip.normalise(jnp.asarray(x))).transpose(0, 3, 1, 2))}

    reference = CLIPScore(model_name_or_path=lambda: (Bare(), processor))
    reference.update(list(torch.tensor(pictures.transpose(0, 3, 1, 2))), [str(i) for i in chosen])

    found = clip_score.score(texts[chosen], shown)
    assert found > 1 and found == pytest.approx(float(reference.compute()), abs=1e-3)
