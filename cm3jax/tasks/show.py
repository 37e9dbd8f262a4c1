"""The tasks as lines for people: `cm3jax tasks`."""

from cm3jax.tasks import table, templates


def all() -> str:
    """Return a paragraph for each task: what it does, and an example in which [brackets] hold the answer."""
    return "\n\n".join(f"{task.name}: {task.about}\n  {example(task)}" for task in table.TASKS.values())


def one(name: str) -> str:
    """Return a task's fields, its answer and an example in each of its wordings.

    Raises:
      UserError: if there is no such task.
    """
    task = table.find(name)
    lines = [f"{task.name}: {task.about}", f"fields: {', '.join(task.fields)}", f"answer: {', '.join(task.answer)}"]
    return "\n".join([*lines, *(f"  {example(task, n)}" for n in range(len(task.templates)))])


def example(task: table.Task, n: int = 0) -> str:
    """Return a task's example in one of its wordings, on one line, in [brackets] what a model is asked for."""
    pictures = {name: f"<{name.replace('_', ' ')}>" for name in task.fields if table.is_picture(name)}
    values = task.example | {name: text.encode() for name, text in pictures.items()}  # not text, so a picture
    parts, regions = templates.make(task.name, values, n)
    texts = [part if isinstance(part, str) else part.decode() for part in parts]
    for region in reversed(regions):
        text = texts[region.part]
        start, end = (round(x * len(text)) for x in (region.box[0], region.box[2]))
        texts[region.part] = f"{text[:start]}[{text[start:end]}]{text[end:]}"
    return " <break> ".join(texts).replace("\n", "\\n")
