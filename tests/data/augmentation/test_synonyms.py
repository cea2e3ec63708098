from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from largeformer.data.augmentation.synonyms import EitherSynonyms, SynonymTable, WordNet
from largeformer.errors import BadInputError
from tests.data.augmentation.wordnet import SENSES, write_wordnet

DEBIAN = Path("/usr/share/wordnet")


def test_wordnet_senses_in_their_order(tmp_path: Path) -> None:
    wordnet = WordNet(write_wordnet(tmp_path))
    assert wordnet.of("dog") == ("domestic dog", "Canis familiaris", "frump", "chase", "tag")
    assert wordnet.of("Domestic dog") == ("dog", "Canis familiaris")
    assert wordnet.of("happy") == ("glad",) and wordnet.of("fox") == ()


@pytest.mark.parametrize("word", ["", "aaa", "do", "dogs", "zzz", "1", "licence", "This", "狗", "\n", "dog "])
def test_unknown_words_have_none(tmp_path: Path, word: str) -> None:
    assert WordNet(write_wordnet(tmp_path)).of(word) == ()


def test_every_word_is_found_again(tmp_path: Path) -> None:
    """First and last lines of each file too: the search is our own."""
    wordnet = pickle.loads(pickle.dumps(WordNet(write_wordnet(tmp_path))))
    for senses in SENSES.values():
        for sense in senses:
            for word in sense:
                others = {other.split("(")[0].replace("_", " ") for other in sense if other != word}
                assert others <= set(wordnet.of(word.split("(")[0]))


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="wordnet-base is not installed")
def test_debians_wordnet() -> None:
    wordnet = WordNet(str(DEBIAN))
    assert {"speedy", "fast"} <= set(wordnet.of("quick")) and {"domestic dog"} <= set(wordnet.of("dog"))
    lemmas = [line.split()[0] for line in (DEBIAN / "index.adj").read_text().splitlines() if not line.startswith("  ")]
    for lemma in lemmas[:: len(lemmas) // 200]:
        wordnet.of(lemma)
    assert wordnet._files["index.adj"].find(lemmas[-1].encode()) > 0


def test_a_folder_that_is_no_wordnet(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"lacks index\.noun, data\.noun.*wordnet-base"):
        WordNet(str(tmp_path))


def test_table_of_any_language(tmp_path: Path) -> None:
    path = tmp_path / "table.tsv"
    path.write_text("# groups\n学习\t研习\t念书\n\nHaus\tGebäude\nhaus\tHeim\n", encoding="utf-8")
    table = SynonymTable(str(path))
    assert table.of("研习") == ("学习", "念书")
    assert table.of("HAUS") == ("Gebäude", "Heim") and table.of("x") == ()
    assert EitherSynonyms(table, WordNet(write_wordnet(tmp_path))).of("fox") == ()
    assert EitherSynonyms(table, WordNet(str(tmp_path))).of("quickly") == ("rapidly", "apace")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"one two\n", "line 1 holds 1 word: part at least two by a tab", id="no tab"),
        pytest.param(b"# nothing\n", "holds no words", id="empty"),
        pytest.param(b"a\t\xff\n", "cannot be read", id="not UTF-8"),
        pytest.param(None, "cannot be read", id="missing"),
    ],
)
def test_bad_tables_are_told(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "t.tsv").write_bytes(content)
    with pytest.raises(BadInputError, match=message):
        SynonymTable(str(tmp_path / "t.tsv"))
