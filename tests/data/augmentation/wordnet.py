"""A WordNet of a few words in the format of wndb(5), for tests on machines without Debian's package."""

from __future__ import annotations

from pathlib import Path

# Kind -> senses, each a list of lemmas.
SENSES = {
    "noun": [["dog", "domestic_dog", "Canis_familiaris"], ["frump", "dog"], ["fox"], ["tyke"], ["zebra", "stripes"]],
    "verb": [["chase", "tag", "dog"], ["jump", "leap", "spring"]],
    "adj": [["quick", "speedy"], ["agile", "nimble", "quick"], ["happy(p)", "glad(a)"]],
    "adv": [["quickly", "rapidly", "apace"]],
}
_LICENCE = "".join(f"  {i} This is the licence, as in the true files.  \n" for i in range(1, 30))


def write_wordnet(folder: Path) -> str:
    for kind, senses in SENSES.items():
        data, offsets = _LICENCE, {}
        for sense in senses:
            offset = len(data.encode())
            listed = " ".join(f"{word} 0" for word in sense)
            data += f'{offset:08d} 03 {kind[0]} {len(sense):02x} {listed} 001 @ 00001740 n 0000 | a gloss; "with an example"  \n'
            for word in sense:
                offsets.setdefault(word.split("(")[0].lower(), []).append(offset)
        (folder / f"data.{kind}").write_text(data)
        lines = [
            f"{word} {kind[0]} {len(at)} 1 @ {len(at)} 0 {' '.join(f'{o:08d}' for o in at)}  \n" for word, at in sorted(offsets.items())
        ]
        (folder / f"index.{kind}").write_text(_LICENCE + "".join(lines))
    return str(folder)
