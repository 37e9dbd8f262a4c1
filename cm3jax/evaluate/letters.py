"""How well a drawn word reads: text accuracy."""


def accuracy(asked: str, read: str) -> float:
    """Return 1 minus the letters to add, drop or change over the length of the longer word; 1 for two empty ones.

    Other than a comparison place by place, a letter too many costs one letter and not all behind it.
    """
    longer = max(len(asked), len(read))
    return 1 - distance(asked, read) / longer if longer else 1.0


def distance(a: str, b: str) -> int:
    """Return the least number of letters to add, drop or change (Levenshtein 1966)."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        above, row = row, [i]
        for j, other in enumerate(b, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (letter != other)))
    return row[-1]
