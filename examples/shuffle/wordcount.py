"""Word count with N workers that talk all to all: the shuffle of a map-reduce job, without a bucket in between.

One worker is one process (or one serverless function). It reads its part of the text, and counts its words. Each word
belongs to one rank; ``alltoall`` brings all counts of a word to that rank, which adds them up. Rank 0 gathers and
prints the words that occur most.

    python wordcount.py RELAY RANK SIZE CERTIFICATES FILE...

CERTIFICATES is the directory of ca.pem and rankN.pem and rankN.key. All workers get the same list of files.
"""

from __future__ import annotations

import json
import re
import sys
import zlib
from collections import Counter
from pathlib import Path

import frelay

JOB = "wordcount"
WORD = re.compile(r"[^\W\d_]+")


def count_words(lines: list[str]) -> Counter[str]:
    """The words of some lines, in lower case, and how often each occurs."""
    return Counter(word for line in lines for word in WORD.findall(line.lower()))


def owner(word: str, size: int) -> int:
    """The rank that adds up a word. All ranks must agree, so it is not ``hash()``, which each process salts."""
    return zlib.crc32(word.encode()) % size


def run(relay: str, rank: int, size: int, certificates: Path, files: list[Path]) -> Counter[str] | None:
    """Do the part of one worker; rank 0 returns the counts of all words, the others None."""
    with frelay.group(
        relay,
        name=JOB,
        rank=rank,
        size=size,
        # Each rank has a certificate of its own, so no other function can take its place.
        peer="dns:rank{rank}." + JOB,
        cert=certificates / f"rank{rank}.pem",
        key=certificates / f"rank{rank}.key",
        ca=certificates / "ca.pem",
    ) as group:
        # Map: every SIZEth line of all files, from line RANK on.
        lines = [line for file in files for line in file.read_text(encoding="utf-8", errors="replace").splitlines()]
        counts = count_words(lines[rank::size])

        # Shuffle: to each rank the words that it owns.
        parts: list[dict[str, int]] = [{} for _ in range(size)]
        for word, count in counts.items():
            parts[owner(word, size)][word] = count
        received = group.alltoall([json.dumps(part).encode() for part in parts])

        # Reduce: each rank adds up its own words.
        total: Counter[str] = Counter()
        for part in received:
            total.update(json.loads(bytes(part)))

        gathered = group.gather(json.dumps(total).encode(), root=0)
        if gathered is None:
            return None
        result: Counter[str] = Counter()
        for part in gathered:
            result.update(json.loads(bytes(part)))
        return result


def main(arguments: list[str]) -> None:
    """Run one worker."""
    relay, rank, size, certificates, *files = arguments
    counts = run(relay, int(rank), int(size), Path(certificates), [Path(file) for file in files])
    if counts is not None:
        print(f"{counts.total()} words, {len(counts)} different")
        for word, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:10]:
            print(f"{count:8}  {word}")


if __name__ == "__main__":
    main(sys.argv[1:])
