"""A run folder with made-up results, for the tests of what is made from them."""

import json
import math

import numpy as np
from PIL import Image

SHAPES = ("circle", "square", "triangle", "star")


def picture(i: int, side: int = 64) -> Image.Image:
    """Return a disc of a colour and place of its own."""
    y, x = np.mgrid[:side, :side]
    out = np.full((side, side, 3), 235, np.uint8)
    center = side * (0.3 + 0.4 * ((i * 37 % 10) / 10))
    out[(x - center) ** 2 + (y - side / 2) ** 2 < (side / 5) ** 2] = [(i * 53) % 200, (i * 91) % 200, (i * 17) % 200]
    return Image.fromarray(out)


def examples(folder, n: int, truth: bool) -> dict:
    """Write n pictures per sheet; return the content of examples.json."""
    folder.mkdir(parents=True, exist_ok=True)

    def save(kind: str, i: int) -> str:
        name = f"{kind}-{i:03d}.png"
        picture(i).save(folder / name)
        return name

    def correct(i: int):
        return i % 5 != 3 if truth else None

    def caption(i: int) -> str:
        first = f"a large red {SHAPES[i % 4]} at the upper left <{i}> & nothing else"
        return first if i % 3 else f"{first}, and below it a small yellow {SHAPES[(i + 1) % 4]} on a grey background"

    return {
        "text_to_image": [{"caption": caption(i), "picture": save("t2i", i), "correct": correct(i)} for i in range(n)],
        "image_to_text": [
            {"picture": save("i2t", i), "caption": caption(i), "asked": caption(i + 1), "correct": correct(i)}
            for i in range(n)
        ],
        "infill": [
            {
                "masked": save("masked", i),
                "picture": save("infilled", i),
                "original": save("original", i),
                "caption": caption(i),
                "correct": correct(i),
            }
            for i in range(n)
        ],
        "reconstruction": [{"original": save("before", i), "picture": save("after", i)} for i in range(n)],
    }


def report(truth: bool) -> dict:
    """Return the content of report.json; without ground truth it has no accuracies."""
    settings = [{"temperature": 1.0}, {"temperature": 0.5}, {"temperature": 0.5, "guidance": 1.5}]
    task = {"samples": 512, "sampling": settings[2]}
    score = {"object_accuracy": 0.9128, "scene_accuracy": 0.8012, "composition": {"object_accuracy": 0.2101}}
    rows = [
        {"sampling": s, "validation": 0.8 + i / 20, "object_accuracy": 0.79 + i / 20} for i, s in enumerate(settings)
    ]
    reconstruction = {"psnr": 28.2041, "ssim": 0.934, "codebook_usage": 0.998, "codebook_perplexity": 301.7}
    drawn = {**task, **(score if truth else {}), **({"settings": rows} if truth else {})}
    return {
        "name": "quickstart",
        "source": "scenes:easy" if truth else "digits/",
        "protocol": {"samples": 512, "chosen_on": "validation"},
        "reconstruction": {**reconstruction, "codes": 512, **({"object_accuracy": 0.971} if truth else {})},
        "text_to_image": drawn,
        "image_to_text": {**task, **(score if truth else {})},
        "infill": {**task, **(score if truth else {})},
        "perplexity": {
            **{"text": 3.21, "image": 12.5, "infill": 4.02},
            "validation": {"text": 3.19, "image": 12.4, "infill": None},
        },
        "seconds": {"prepare": 21.5, "text": 2.1, "image": 83.0, "tokens": 11.2, "decoder": 431.0},
        "peak_memory_gib": 2.31,
    }


def curves(folder, names: dict[str, tuple[float, float]], steps: int) -> None:
    """Write a metrics.jsonl with curves that fall (or rise) from the first value of each name to the second."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in range(20, steps + 1, 20):
        at = {k: b + (a - b) * math.exp(-5 * step / steps) for k, (a, b) in names.items()}
        wobble = 1 + 0.03 * math.sin(step)
        lines.append({"step": step, "seconds": step / 10, **{f"train/{k}": v * wobble for k, v in at.items()}})
        if step % (steps // 10) == 0:
            lines.append({"step": step, "seconds": step / 10, **{f"validation/{k}": 1.02 * v for k, v in at.items()}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def retrieving(content: dict, scores: dict, folder) -> None:
    """Add to examples and report what a run that retrieves has."""
    picture(5).save(folder / "retrieved.png")
    document = {
        "key": "train/a<7>",
        "score": 0.625,
        "source": "web & co",
        "license": "CC0",
        "caption": "one & more",
        "picture": "retrieved.png",
    }
    bare = dict.fromkeys(("picture", "caption", "source", "license"))
    for task in ("text_to_image", "image_to_text"):
        for example in content[task][:3]:
            example["documents"] = [document, document | bare]
        rows = [{"documents": k, "validation": 0.5 + k / 10, "object_accuracy": 0.51 + k / 10} for k in range(3)]
        for row in rows if "composition" in scores[task] else ():
            row["composition"] = {"object_accuracy": 0.101 + row["documents"] / 10}
        scores[task] |= {"documents": 2, "by_documents": rows, "candidates": 4}


def make(run, n: int = 16, truth: bool = True, retrieved: bool = False):
    """Write a finished run's report.json, examples, metrics and recipe into folder `run`; return it."""
    content = examples(run / "evaluate", n, truth)
    scores = report(truth)
    if retrieved:
        retrieving(content, scores, run / "evaluate")
    (run / "evaluate" / "examples.json").write_text(json.dumps(content))
    (run / "report.json").write_text(json.dumps(scores))
    (run / "recipe.json").write_text(
        json.dumps({"name": "quickstart", "prepare": {"source": "scenes:easy", "resolution": 64}})
    )
    curves(run / "decoder", {"loss_text": (6.9, 1.1), "loss_image": (6.2, 2.5), "loss_infill": (6.9, 1.5)}, 5000)
    curves(run / "image", {"psnr": (9.0, 28.2), "usage": (0.2, 0.97)}, 1200)
    return run
