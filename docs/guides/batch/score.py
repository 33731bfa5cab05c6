"""How many of the questions were answered: `python score.py questions.csv answers.csv`.

An answer counts when it has the expected words in it, whole, upper and lower case alike.
"""

import csv
import re
import sys
from pathlib import Path


def read(path: str) -> list[dict[str, str]]:
    """Return the rows of a CSV file."""
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


expected = {row["id"]: row["answer"] for row in read(sys.argv[1])}
given = {row["id"]: row["text"] for row in read(sys.argv[2]) if not row["error"]}
right = [
    name
    for name, answer in expected.items()
    if re.search(rf"\b{re.escape(answer)}\b", given.get(name, ""), re.IGNORECASE)
]
print(f"{len(right)} of {len(expected)} right, {len(expected) - len(given)} not answered")
