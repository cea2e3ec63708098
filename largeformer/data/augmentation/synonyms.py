"""Words of the same meaning: from WordNet's own files, or from the user's table in any language.

WordNet's database is text, sorted for binary search (wndb(5), Princeton University; Debian's wordnet-base). It is read where it lies:
nothing is loaded, and workers share the same pages. NLTK's reader refuses Debian's folder, which lacks the file `lexnames`.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Protocol

from largeformer.errors import BadInputError

_PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")


class Synonyms(Protocol):
    """`synonyms.of(word)`: other words for it, the likeliest first; none where it is unknown. The same in every process."""

    def of(self, word: str) -> tuple[str, ...]: ...


class WordNet:
    """The lemmas that share a sense with a word, senses in WordNet's order of frequency. Looks the word up as written, in lower case."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder).expanduser()
        missing = [name for name in self._names() if not (self._folder / name).is_file()]
        if missing:
            raise BadInputError(
                f"data.augment.wordnet {folder!r} lacks {', '.join(missing)}: give the folder of WordNet's files (Debian: apt-get install "
                "wordnet-base puts them in /usr/share/wordnet)"
            )

    def of(self, word: str) -> tuple[str, ...]:
        lemma = word.lower().replace(" ", "_")
        if not lemma:
            return ()
        found = dict.fromkeys(other for kind in _PARTS_OF_SPEECH for other in self._of_kind(lemma, kind) if other.lower() != lemma)
        return tuple(other.replace("_", " ") for other in found)

    def __getstate__(self) -> str:
        return str(self._folder)

    def __setstate__(self, folder: str) -> None:
        self.__init__(folder)  # type: ignore[misc]

    @staticmethod
    def _names() -> list[str]:
        return [f"{file}.{kind}" for kind in _PARTS_OF_SPEECH for file in ("index", "data")]

    @cached_property
    def _files(self) -> dict[str, mmap.mmap]:
        files = {}
        for name in self._names():
            with (self._folder / name).open("rb") as handle:
                files[name] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        return files

    def _of_kind(self, lemma: str, kind: str) -> Iterator[str]:
        """lemma pos synset_cnt p_cnt [symbol...] sense_cnt tagsense_cnt synset_offset..."""
        fields = _line_of(self._files[f"index.{kind}"], lemma.encode("utf-8")).split()
        if fields:
            for offset in fields[-int(fields[2]) :]:
                yield from _synset(self._files[f"data.{kind}"], int(offset))


def _line_of(file: mmap.mmap, key: bytes) -> bytes:
    """The line of a sorted file that begins with `key` and a space; empty where there is none."""
    low, high = 0, len(file)
    while low < high:
        start = file.rfind(b"\n", 0, (low + high) // 2) + 1
        end = file.find(b"\n", start)
        end = len(file) if end < 0 else end
        line = file[start:end]
        # The licence at the head is indented: it sorts before every word.
        found = b"" if line.startswith(b"  ") else line.split(b" ", 1)[0]
        if found == key:
            return line
        if found < key:
            low = end + 1
        else:
            high = start
    return b""


def _synset(file: mmap.mmap, offset: int) -> Iterator[str]:
    """synset_offset lex_filenum ss_type w_cnt word lex_id [word lex_id...]: w_cnt is hexadecimal; an adjective may end in (p)."""
    fields = file[offset : file.find(b"\n", offset)].decode("utf-8").split()
    count = int(fields[3], 16)
    for word in fields[4 : 4 + 2 * count : 2]:
        yield word.split("(", 1)[0]


class SynonymTable:
    """A text file, UTF-8: a line holds words of the same meaning, parted by tabs; `#` begins a comment. A word may stand in many lines."""

    def __init__(self, path: str) -> None:
        self._groups: dict[str, dict[str, None]] = {}
        problems = []
        try:
            lines = Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise BadInputError(f"data.augment.synonym_table {path!r} cannot be read ({error}): give a text file in UTF-8") from error
        for number, line in enumerate(lines, start=1):
            if not line.strip() or line.startswith("#"):
                continue
            group = [word.strip() for word in line.split("\t") if word.strip()]
            if len(group) < 2:
                problems.append(f"data.augment.synonym_table {path} line {number} holds {len(group)} word: part at least two by a tab")
            for word in group:
                self._groups.setdefault(word.lower(), {}).update(dict.fromkeys(other for other in group if other != word))
        if problems:
            raise BadInputError(problems[:10])
        if not self._groups:
            raise BadInputError(
                f"data.augment.synonym_table {path} holds no words: write words of the same meaning in a line, parted by tabs"
            )

    def of(self, word: str) -> tuple[str, ...]:
        return tuple(self._groups.get(word.lower(), ()))


class EitherSynonyms:
    """Of the first source that knows the word."""

    def __init__(self, *sources: Synonyms) -> None:
        self._sources = sources

    def of(self, word: str) -> tuple[str, ...]:
        return next((found for source in self._sources if (found := source.of(word))), ())
