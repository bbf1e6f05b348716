"""Lays out a whole project in which nothing has run: the repository's files, tiny parameters, and a little text."""

import compileall
import json
import random
import shutil
import subprocess
from pathlib import Path

import tiny
from chain import Chain

from flows.land import is_pointer

# Lines that are no records: cut short, of the wrong type, without the field.
MALFORMED = ['{"text": "in the begin', '{"text": 7, "group": "book 1"}', '{"words": "night", "group": "book 2"}']
PACKAGES = ("flows", "lm", "tasks")
_WORDS = [
    *("beginning", "light", "darkness", "face", "deep", "waters", "day", "night", "morning", "evening", "river"),
    *("mountain", "king", "servant", "bread", "house", "field", "seed", "stone", "fire", "wind", "sea", "fish", "bird"),
    *("tree", "fruit", "name", "word", "voice", "path", "hand", "eye", "heart", "was", "and", "of the", "upon", "in"),
]


def lay_out(root: Path, home: Path) -> Chain:
    """Copies the repository's files, but for ignored ones, to ``root``, with tiny parameters, text, Git and DVC."""
    root.mkdir(parents=True)
    settings = {
        "collect__sources": [
            {
                "name": "small",
                "uri": "texts",
                "format": "jsonl",
                "licence": "none",
                "text_field": "text",
                "group_field": "group",
            }
        ],
        "evaluate__test_tokens": 3000,
        "ingest__max_reject_rate": 0.05,
        "ingest__split": {"seed": 1, "valid": 0.2, "test": 0.2},
        "train__steps": 40,
        "train__micro_batch": 4,
        "quantize__micro_batch": 4,
        "train__checkpoint_every": 4,
        "train__validate_every": 10,
        "quantize__steps": 12,
        "quantize__world_size": 1,
        "flow__retries": {},
        "flow__retry_delay_seconds": 0.0,
    }
    tiny.write_params(root, **settings)
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=tiny.ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        # What runs have written here is about text that the copy does not have.
        written = name == "params.yaml" or (is_pointer(name) and not name.endswith(".gitignore"))
        if not written and (tiny.ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(tiny.ROOT / name, root / name)
    # In each copy else, by the first process that imports it.
    for package in PACKAGES:
        compileall.compile_dir(root / package, quiet=1)
    write_texts(root / "texts")
    chain = Chain(root, home)
    for command in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "-q", "-m", "The project"],
    ):
        subprocess.run(["git", *command], cwd=root, env=chain.environment(), check=True)
    return chain


def write_texts(folder: Path, groups: int = 24, documents: int = 6, words: int = 80) -> None:
    """Writes three files of JSON lines with ``documents`` documents of each group, and ``MALFORMED`` among them."""
    folder.mkdir()
    drawn = random.Random(0)
    rows = [
        json.dumps({"text": " ".join(drawn.choices(_WORDS, k=words)) + ".", "group": f"book {group}"})
        for group in range(groups)
        for _ in range(documents)
    ]
    rows[20:20] = MALFORMED
    for index in range(3):
        (folder / f"part-{index}.jsonl").write_text("".join(f"{row}\n" for row in rows[index::3]))
