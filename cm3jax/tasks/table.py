"""Every task of instruction tuning, one declaration each (arXiv 2309.02591 table 5).

A task is text: inputs and outputs are written into one document in the order of a template, and the CM3 objective
trains on it as on any other. `{name}` is filled in with a field's value, `<break>` parts the document; a field whose
name ends with `image` is a picture and a part of its own. Answers in words stand before the picture that they are
about, so that answering is filling in a mask; an answer that is a picture stands last, so that drawing it is going on.

To add a task: one declaration here and a line in `tests/test_tasks.py`.
"""

import dataclasses
import re

from cm3jax.types import UserError

BREAK = "<break>"
FIELD = re.compile(r"\{(\w+)\}")
PICTURE = "image"
"""How the names of fields that hold pictures end."""


@dataclasses.dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
      name: What `templates.make` calls it.
      about: One line for people.
      templates: Wordings of the same fields; a data set takes each in turn.
      answer: The fields that a model is asked for, in reading order: texts of one part, or the last part, a picture.
      example: A value for each text field.
    """

    name: str
    about: str
    templates: tuple[str, ...]
    answer: tuple[str, ...]
    example: dict[str, str]

    def __post_init__(self):
        """Raises ValueError for a declaration that contradicts itself."""
        texts = {name for name in self.fields if not is_picture(name)}
        for template in self.templates:
            found = FIELD.findall(template)
            if sorted(found) != sorted(self.fields):
                raise ValueError(f"task {self.name}: {template!r} has the fields {found}, another {list(self.fields)}")
            for part in split(template):
                pictures = [name for name in FIELD.findall(part) if is_picture(name)]
                if pictures and part != f"{{{pictures[0]}}}":
                    raise ValueError(f"task {self.name}: {part!r}: a picture must be a part of its own")
            parts = [i for i, part in enumerate(split(template)) if set(FIELD.findall(part)) & set(self.answer)]
            wanted = [name for name in found if name in self.answer]
            if len(parts) != 1 or wanted != list(self.answer):
                raise ValueError(f"task {self.name}: answer {self.answer}: must be fields of one part, in its order")
            if is_picture(self.answer[0]) and parts[0] != len(split(template)) - 1:
                raise ValueError(f"task {self.name}: answer {self.answer}: a picture must stand last")
        if set(self.example) != texts:
            raise ValueError(f"task {self.name}: example {sorted(self.example)}: must be {sorted(texts)}")

    @property
    def fields(self) -> tuple[str, ...]:
        """All fields, in the order of the first template."""
        return tuple(FIELD.findall(self.templates[0]))

    @property
    def draws(self) -> bool:
        """Whether the answer is a picture."""
        return is_picture(self.answer[0])


def is_picture(field: str) -> bool:
    return field.endswith(PICTURE)


def split(template: str) -> list[str]:
    """Return the parts of a template, without the blanks around each <break>."""
    return [part.strip(" ") for part in template.split(BREAK)]


# ----------------------------------------------------------------------------------------------------------- the table

FEATURES = {
    "edges": ("canny edge features", "its edges (Canny)"),
    "segmentation": ("a segmentation map", "a map of what is where"),
    "hed": ("hed features", "its soft edges (HED)"),
    "pose": ("openpose features", "the poses of its people"),
    "depth": ("depth features", "a map of how near things are"),
    "normals": ("3D norm features", "a map of where surfaces face"),
    "scribble": ("children's scribbles", "a scribble of it"),
}
"""Feature image -> its words in the template, and what it is."""
_ALIKE = "a red apple on a wooden table"
_LONG = "A red apple lies on a wooden table. Behind it stands a blue cup, and light falls in from the left."
_SCIENCE = "Question: {question} \n Context: {context} \n Options: {options} \n Answer: "
_ASKED = {
    "question": "Which of these is a fruit?",
    "context": "The picture shows what lies on a table.",
    "options": "(A) apple (B) cup",
    "answer": "(A) apple",
}

_TASKS = (
    Task(
        "edit",
        "change a picture as an instruction says",
        ("Edit first image following the instruction <break> {image} <break> {instruction} <break> {edited_image}",),
        ("edited_image",),
        {"instruction": "make the apple green"},
    ),
    Task(
        "words",
        "write a text into a picture",
        ('draw "{text}" <break> {image}',),
        ("image",),
        {"text": "OPEN"},
    ),
    Task(
        "located",
        "draw a caption with things at given places",
        ("Generate high quality image of {caption} with segmentations {objects} <break> {image}",),
        ("image",),
        {"caption": _ALIKE, "objects": "apple at (96, 80) -> (160, 144), table at (0, 120) -> (256, 256)"},
    ),
    *(
        Task(
            name,
            f"draw a caption from {what}",
            (f"Make high quality image from {words} <break> {{feature_image}} <break> {{caption}} <break> {{image}}",),
            ("image",),
            {"caption": _ALIKE},
        )
        for name, (words, what) in FEATURES.items()
    ),
    Task(
        "caption",
        "describe a picture",
        ("{caption} <break> {image}", "Describe the given picture. {caption} <break> {image}"),
        ("caption",),
        {"caption": _ALIKE},
    ),
    Task(
        "long_caption",
        "describe all of a picture",
        (
            "Describe the given picture in very detail. {caption} <break> {image}",
            "Describe all the objects in the given image in very detail. {caption} <break> {image}",
            "Generate a long caption for the given image. {caption} <break> {image}",
            "Generate a long narration of what is happening in the given image. {caption} <break> {image}",
        ),
        ("caption",),
        {"caption": _LONG},
    ),
    Task(
        "question",
        "answer a question about a picture",
        (
            "Question: {question} Answer: {answer}. <break> {image}",
            "Question: {question}\nAnswer: {answer}. <break> {image}",
            "Question: {question} The answer is {answer}. <break> {image}",
        ),
        ("answer",),
        {"question": "What lies on the table?", "answer": "an apple"},
    ),
    Task(
        "choice",
        "choose among given answers",
        (_SCIENCE + "{answer}. <break> {image}",),
        ("answer",),
        _ASKED,
    ),
    Task(
        "reasoning",
        "choose among given answers, and say why first",
        (_SCIENCE + "Let's think step-by-step: {explanation} So the answer is {answer}. <break> {image}",),
        ("explanation", "answer"),
        _ASKED | {"explanation": "Apples grow on trees and hold seeds, cups do not."},
    ),
)

TASKS = {task.name: task for task in _TASKS}
"""Name -> task."""


def find(name: str) -> Task:
    """Return a task by its name.

    Raises:
      UserError: if there is none.
    """
    if name not in TASKS:
        raise UserError(f"task {name!r}: no such task; tasks: {', '.join(TASKS)}")
    return TASKS[name]
