"""Words that this project's text avoids: the reader expects the field's term (docs/glossary.md)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "quant", "replicas", "cluster", "deploy", "tests", "benchmarks", "examples", "docs")
SUFFIXES = (".py", ".md", ".yaml", ".toml", ".txt")

# A pattern, in which a space stands for any white space and a comment's `#`, and what to write instead.
AVOIDED = {
    "told": "receives, is notified, reports, logs",
    "who(m?)ever": "the process (rank, caller) that",
    "(nobody|everybody)('s)?": "no process, no rank; every rank",
    "be it": "whether ... or",
    "of which": "a sentence of its own",
    "befell": "happened to",
    "(spoil|spoils|spoilt)": "corrupt, invalidate",
    "likeliest": "most probable (top-k)",
    "in a circle": "deadlock",
    "there and back": "round trip",
    "(send|sends) for": "prefetch, issue the load",
    "(hands?|handed) on": "send, pass, forward",
    "keepers?": "supervisor",
    r"rehears\w*": "warm up, dry run",
    "(un)?abridged": "layer-deduplicated",
    "(cannot|can|could|is|are|to) be had": "(not) available",
    "interpreter's lock": "GIL",
    "multiprocessors?": "SM",
}


def files() -> Iterator[Path]:
    yield from (path for path in ROOT.iterdir() if path.suffix in SUFFIXES or path.name == "Makefile")
    for folder in FOLDERS:
        yield from (path for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES)


def test_the_fields_words_are_used() -> None:
    avoided = {
        re.compile(rf"\b(?:{pattern})\b".replace(" ", r"[\s#]+"), re.IGNORECASE): instead
        for pattern, instead in AVOIDED.items()
    }
    found = []
    for path in sorted(set(files()) - {Path(__file__).resolve()}):
        text = path.read_text(encoding="utf-8")
        for pattern, instead in avoided.items():
            for match in pattern.finditer(text):
                line = text.count("\n", 0, match.start()) + 1
                found.append(f"{path.relative_to(ROOT)}:{line}: '{match[0]}'; better: {instead}")
    assert found == []
