"""Wikipedia articles in the typography of WikiText, as training text where WikiText's own train split cannot be had.

    python benchmarks/wikitext_style.py wikipedia.parquet -o build/wikitext-style.jsonl

The papers train on WikiText-2's train split and evaluate on its test split. Both are Moses-tokenized: punctuation stands apart,
` @-@ ` joins what a hyphen joined, ` @,@ ` and ` @.@ ` stand in numbers. A student that has seen only ordinary text is
measured on that typography as much as on the language. What is written here comes from the articles given and from nothing else.
Needs `pip install sacremoses`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet
from sacremoses import MosesTokenizer

# What extractors make of a section's heading: up to six words and a full stop.
HEADING = re.compile(r"[A-Z0-9]\S*( [^\s.!?:;,]+){0,5}\.")


def rows(title: str, text: str, moses: MosesTokenizer) -> Iterator[str]:
    """The rows of one article as in the data set: headings and paragraphs; blank rows around a heading."""
    if title:
        yield from ("", f" = {typeset(title, moses)} = \n", "")
    for paragraph in map(str.strip, text.split("\n")):
        if HEADING.fullmatch(paragraph):
            yield from ("", f" = = {typeset(paragraph.removesuffix('.'), moses)} = = \n", "")
        elif paragraph and paragraph != title.strip():
            yield f" {typeset(paragraph, moses)} \n"


def typeset(line: str, moses: MosesTokenizer) -> str:
    """One line, tokens apart."""
    tokens = moses.tokenize(line, aggressive_dash_splits=True, escape=False, return_str=True)
    return re.sub(r"(?<=\d)([,.])(?=\d)", r" @\1@ ", tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("articles", type=Path, nargs="+", help="parquet files with columns `text` and, if known, `title`")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    moses = MosesTokenizer("en")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.open("w", encoding="utf-8") as file:
        for path in arguments.articles:
            for article in pyarrow.parquet.read_table(path).to_pylist():
                # As evaluation joins the rows of the data set.
                text = "\n\n".join(rows(article.get("title") or "", article["text"] or "", moses))
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
