"""The page and the pictures that a person looks at after a run: report.html, samples.png, and tasks.png if it has any.

All are made from what lies in the run folder, so that they can be made again at any time: report.json (figures),
evaluate/examples.json and its pictures, */metrics.jsonl (curves), recipe.json.
"""

import base64
import contextlib
import dataclasses
import importlib.metadata
import io
import json
import pathlib
import platform
import unicodedata
from collections.abc import Sequence
from typing import Any

import jinja2
from PIL import Image, ImageDraw, ImageFont

from cm3jax import config as configs
from cm3jax import curves, metrics, provenance
from cm3jax.tasks import table
from cm3jax.types import UserError

PACKAGES = ("cm3jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "sentencepiece", "numpy")

NATS = "nats per token"
CHARTS = (
    ("decoder", "loss_text", "Decoder: text", NATS, None),
    ("decoder", "loss_image", "Decoder: picture codes", NATS, None),
    ("decoder", "loss_infill", "Decoder: infilled spans", NATS, None),
    ("decoder", "loss_retrieved_text", "Decoder: text of retrieved documents", NATS, None),
    ("decoder", "loss_retrieved_image", "Decoder: picture codes of retrieved documents", NATS, None),
    ("retriever", "loss", "Retriever: contrastive loss", "nats per pair", None),
    ("retriever", "image_accuracy", "Retriever: captions of a batch found by their picture", "share", (0.0, 1.0)),
    ("image", "psnr", "Image tokenizer: reconstruction", "PSNR, dB", None),
    ("image", "usage", "Image tokenizer: codes in use", "share of the codebook", (0.0, 1.0)),
)
"""(stage folder, metric, title, unit, ends of the vertical axis)."""


def write(run) -> None:
    """Write `run`/report.html, `run`/samples.png, and `run`/tasks.png if the model was asked for tasks.

    Raises:
      UserError: if the run has not been evaluated, or its files are broken.
    """
    run = pathlib.Path(run)
    report, examples = read(run / "report.json"), read(run / "evaluate" / "examples.json")
    drawn, name = examples.get("text_to_image", []), report.get("name", run.name)
    pictures, captions = [picture(run, e["picture"]) for e in drawn], [e["caption"] for e in drawn]
    shown = sheet(f"{name}: pictures from captions, not picked", pictures, captions, [e.get("correct") for e in drawn])
    shown.save(run / "samples.png", pnginfo=provenance.fields(made(report, drawn, captions)))
    if asked := examples.get("tasks", []):
        given, texts = [strip(run, e) for e in asked], [told(e) for e in asked]
        title = f"{name}: tasks, the first of each; what is given, and what is drawn or answered"
        shown = sheet(title, given, texts, [e.get("correct") for e in asked], Look(columns=5, side=297))
        shown.save(run / "tasks.png", pnginfo=provenance.fields(made(report, asked, texts)))
    (run / "report.html").write_text(page(run, report, examples), encoding="utf-8")


def read(path: pathlib.Path) -> dict[str, Any]:
    """Return a JSON object of the run.

    Raises:
      UserError: if there is none.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; make it with: cm3jax evaluate RUN") from None
    except ValueError as e:
        raise UserError(f"{path}: not readable ({e}); make it again with: cm3jax evaluate RUN") from None


def made(report: dict[str, Any], drawn: list[dict[str, Any]], prompts: list[str]) -> provenance.Made:
    """Return what the pictures of a sheet were made from."""
    seed, how = report.get("protocol", {}).get("seed"), report.get("text_to_image", {}).get("sampling", {})
    return provenance.Made(provenance.evaluated(report), "\n".join(prompts), seed, 0, how, provenance.documents(drawn))


def picture(run: pathlib.Path, name: str) -> Image.Image:
    """Return a picture of an example."""
    return Image.open(io.BytesIO(picture_bytes(run / "evaluate" / name))).convert("RGB")


def strip(run: pathlib.Path, example: dict[str, Any]) -> Image.Image:
    """Return what was given for a task and what was drawn, side by side; room is left where there is one of these."""
    names = [*example["given"], *([example["drawn"]] if table.TASKS[example["task"]].draws else [])]
    pictures = [picture(run, name) for name in names]
    width, height = pictures[0].size
    found = Image.new("RGB", (2 * width + 1, height), Look.paper)
    for i, one in enumerate(pictures):
        found.paste(one, (i * (width + 1), 0))
    return found


def told(example: dict[str, Any]) -> str:
    """Return what a task asked for, and an answer in words."""
    answer = "" if table.TASKS[example["task"]].draws else f" Answer: {example['drawn']}"
    return f"{example['task']}: {example['said']}{answer}"


# ------------------------------------------------------------------------------------------------------------ the page


def page(run: pathlib.Path, report: dict[str, Any], examples: dict[str, list]) -> str:
    """Return report.html: one file, no network, no script."""
    environment = jinja2.Environment(loader=jinja2.PackageLoader("cm3jax", "."), autoescape=True, trim_blocks=True)
    environment.filters |= {"figure": figure, "duration": duration, "json": lambda x: json.dumps(x, indent=1)}
    recipe = run / "recipe.json"
    return environment.get_template("report.html.jinja").render(
        report=report,
        examples=examples,
        picture=lambda name: data_uri(run / "evaluate" / name),
        charts=charts(run),
        settings=settings(report),
        drawing={name for name, task in table.TASKS.items() if task.draws},
        recipe=read(recipe) if recipe.is_file() else {},
        versions=report.get("protocol", {}).get("versions") or versions(),
    )


def charts(run: pathlib.Path) -> list[dict[str, Any]]:
    """Return the curves that the run has, each {"title", "unit", "svg"}; training and validation in one chart."""
    found = []
    for stage, name, title, unit, ends in CHARTS:
        lines = metrics.lines(run / stage / "metrics.jsonl")
        pair = [curves.Line(group, curves.series(lines, f"{group}/{name}")) for group in ("train", "validation")]
        if any(line.points for line in pair):
            drawn = curves.svg(f"{title}, {unit}, by step", pair, *(ends or (None, None)))
            found.append({"title": title, "unit": unit, "svg": drawn})
    return found


def settings(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row per candidate setting of the pictures: {"name", "chosen", "validation", "test"}; None: not run."""
    drawn = report.get("text_to_image", {})
    return [
        {
            "name": sampling_name(row["sampling"]),
            "chosen": row["sampling"] == drawn.get("sampling"),
            "validation": row.get("validation"),
            "test": row.get("object_accuracy"),
        }
        for row in drawn.get("settings", [])
    ]


def sampling_name(sampling: dict[str, Any]) -> str:
    """Return what sets a setting apart from plain sampling: "temperature 0.5, guidance 1.5"."""
    plain = configs.to_json(configs.Sampling())
    changed = {k: v for k, v in sampling.items() if v != plain.get(k)}
    if changed.get("temperature") == 0:
        return "greedy"
    shown = {"temperature": sampling.get("temperature", 1.0), **changed}
    return ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in shown.items())


def figure(value: curves.Number | None) -> str:
    """Return 0.91328 as "0.913", 28.2041 as "28.20", 301.7 as "302", None as "–"."""
    if value is None:
        return "–"
    size = abs(value)
    return f"{value:.3f}" if size < 10 else f"{value:.2f}" if size < 100 else f"{value:,.0f}"


def duration(seconds: curves.Number) -> str:
    """Return 4.21 as "4.2 s", 538 as "8 min 58 s", 8000 as "2 h 13 min"."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def versions() -> dict[str, str]:
    """Return the versions of what this process runs on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def data_uri(path: pathlib.Path) -> str:
    """Return a PNG file as the address of an inline picture."""
    return f"data:image/png;base64,{base64.b64encode(picture_bytes(path)).decode()}"


def picture_bytes(path: pathlib.Path) -> bytes:
    """Return the bytes of a picture of the run.

    Raises:
      UserError: if it is not there.
    """
    try:
        return path.read_bytes()
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}; make it again with: cm3jax evaluate RUN") from None


# ------------------------------------------------------------------------------------------------------------- sheets


@dataclasses.dataclass(frozen=True)
class Look:
    """Measures of a sheet, in pixels."""

    columns: int = 4
    side: int = 256
    """Largest side of a picture; a smaller one is enlarged by a whole number."""
    gap: int = 24
    line: int = 20
    text: int = 15
    head: int = 22
    paper: str = "#ffffff"
    ink: str = "#1d2129"
    soft: str = "#5c6470"
    wrong: str = "#b3261e"


def sheet(title: str, pictures: Sequence, captions: Sequence[str], correct=None, look: Look = Look()) -> Image.Image:
    """Return pictures with their captions below, in rows.

    Args:
      pictures: uint8 [h, w, 3] arrays, or what `PIL.Image.open` returns.
      correct: Verdict on each, or None; a picture whose verdict is False is framed and says so.
    """
    verdicts = list(correct or [None] * len(pictures))
    opened = [x if isinstance(x, Image.Image) else Image.fromarray(x) for x in pictures]
    pictures = [enlarge(x.convert("RGB"), look.side) for x in opened]
    font, head = font_for([title, *captions], look.text), font_for([title, *captions], look.head)
    lines = [wrap(plain(caption, font), font, look.side) for caption in captions]
    notes = [["not as asked"] if verdict is False else [] for verdict in verdicts]
    rows = [range(i, min(i + look.columns, len(pictures))) for i in range(0, len(pictures), look.columns)]
    heights = [
        max(pictures[i].height for i in row) + 8 + look.line * max(len(notes[i] + lines[i]) for i in row)
        for row in rows
    ]
    top = look.gap + look.head + look.gap
    size = (look.gap + look.columns * (look.side + look.gap), top + sum(heights) + look.gap * max(len(rows), 1))
    canvas = Image.new("RGB", size, look.paper)
    draw = ImageDraw.Draw(canvas)
    draw.text((look.gap, look.gap), plain(title, head), look.ink, head)
    for row, height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            x = look.gap + column * (look.side + look.gap)
            y = top + place(canvas, draw, look, (x, top), pictures[i], verdicts[i]) + 8
            for j, line in enumerate(notes[i] + lines[i]):
                draw.text((x, y + j * look.line), line, look.wrong if j < len(notes[i]) else look.ink, font)
        top += height + look.gap
    return canvas


FONTS = (
    *(
        "DejaVuSans.ttf",
        "NotoSans-Regular.ttf",
        "LiberationSans-Regular.ttf",
        "FreeSans.ttf",
        "NotoSansCJK-Regular.ttc",
    ),
    *("Arial Unicode.ttf", "Helvetica.ttc", "arial.ttf", "segoeui.ttf", "msgothic.ttc"),
)
"""Looked for among the system's fonts where a text has signs that Pillow's own font, hardly more than ASCII, lacks."""


def font_for(texts: Sequence[str], size: int):
    """Return Pillow's own font if it has all signs of the texts, else the one on this machine that lacks the fewest."""
    wanted = {sign for text in texts for sign in text if not sign.isspace()}
    found = [ImageFont.load_default(size)]
    if lacking(found[0], wanted):
        for name in FONTS:
            with contextlib.suppress(OSError):  # not installed
                found.append(ImageFont.truetype(name, size))
    return min(found, key=lambda font: len(lacking(font, wanted)))


def lacking(font, signs) -> set[str]:
    """Return the signs for which a font has no picture but its empty box."""

    def look(sign: str) -> tuple:
        mask = font.getmask(sign)
        return mask.size, bytes(mask)

    box = look("\uffff")  # no character, in any font
    return {sign for sign in signs if look(sign) == box}


def plain(text: str, font) -> str:
    """Return a text in which accents that the font lacks are left out; what it lacks otherwise stays an empty box."""
    missing = lacking(font, set(text))
    bare = {sign: unicodedata.normalize("NFKD", sign)[0] for sign in missing}
    return "".join(bare.get(sign, sign) for sign in text)


def place(canvas: Image.Image, draw, look: Look, corner: tuple[int, int], picture, verdict: bool | None) -> int:
    """Draw a picture with its upper left corner at `corner`; return its height there."""
    (x, y), (w, h) = corner, picture.size
    if verdict is False:
        draw.rectangle((x - 3, y - 3, x + w + 2, y + h + 2), None, look.wrong, 3)
    canvas.paste(picture, (x, y))
    return h


def enlarge(picture: Image.Image, side: int) -> Image.Image:
    """Return the picture at most `side` large: enlarged by a whole number, or reduced."""
    largest = max(picture.size)
    if largest > side:
        scale = side / largest
        return picture.resize([max(1, round(n * scale)) for n in picture.size], Image.Resampling.LANCZOS)
    factor = side // largest
    return picture.resize([n * factor for n in picture.size], Image.Resampling.NEAREST)


def wrap(text: str, font, width: int, most: int = 6) -> list[str]:
    """Return the text in lines no wider than `width` pixels; what exceeds `most` lines is cut with an ellipsis."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    lines = [clip(line, font, width) for line in lines]
    return lines if len(lines) <= most else [*lines[: most - 1], clip(f"{lines[most - 1]} …", font, width)]


def clip(line: str, font, width: int) -> str:
    """Return a line cut to `width` pixels."""
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(f"{line}…") > width:
        line = line[:-1]
    return f"{line}…"
