"""Each operation alone, then what holds for all: seeds, labels, placeholders, scripts, rates."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from largeformer.config.augment import (
    AnyAugmentStep,
    AugmentConfig,
    CharacterNoiseStep,
    DeletionStep,
    InsertionStep,
    SwapStep,
    SynonymsStep,
)
from largeformer.data.augmentation.augment import Augmenter, augmenter_for
from largeformer.data.augmentation.segment import joined, segment
from tests.data.augmentation.wordnet import write_wordnet

ENGLISH = "The quick dog, happy as ever, likes to jump over <NUM> lazy foxes; see <URL>."
CHINESE = "我们在北京大学学习语言学，今天天气很好。"
EDA: tuple[AnyAugmentStep, ...] = (SynonymsStep(), InsertionStep(), SwapStep(), DeletionStep(), CharacterNoiseStep())


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("wordnet")
    table = folder / "table.tsv"
    table.write_text("学习\t研习\t念书\n今天\t今日\n", encoding="utf-8")
    return {"wordnet": write_wordnet(folder), "synonym_table": str(table)}


def augmenter(sources: dict[str, str], *steps: AnyAugmentStep, probability: float = 1.0, seed: int = 0) -> Augmenter:
    return Augmenter(AugmentConfig(probability=probability, steps=steps, **sources), seed)


def texts(sources: dict[str, str], *steps: AnyAugmentStep, text: str = ENGLISH, count: int = 200) -> list[str]:
    vary = augmenter(sources, *steps)
    return [vary.text(text, sample, 0) for sample in range(count)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("Hello, <NUM> x2!", ["Hello", "<NUM>", "x2"], id="English"),
        pytest.param(CHINESE, ["我们", "在", "北京大学", "学习", "语言学", "今天天气", "很", "好"], id="Chinese"),
        pytest.param("用GPU训练3次", ["用", "GPU", "训练", "3", "次"], id="mixed"),
        pytest.param("ที่ดี", ["ที่", "ดี"], id="Thai"),
        pytest.param("", [], id="empty"),
        pytest.param(" .,。\n", [], id="no words"),
    ],
)
def test_segments_cover_the_text(text: str, expected: list[str]) -> None:
    found, tail = segment(text)
    assert joined(found, tail) == text
    assert [word.text for word in found] == expected


def test_segments_cover_any_text() -> None:
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice("ab 中文学习かな한국ที่हिन्दी,。\n<NUM>123é😀") for _ in range(40))
        assert joined(*segment(text)) == text


def test_synonyms_replace_as_many_as_asked(sources: dict[str, str]) -> None:
    for count in (1, 2):
        for varied in texts(sources, SynonymsStep(count=count), text=ENGLISH.replace("dog", "hare"), count=50):
            assert sum(word not in varied for word in ("quick", "happy", "jump")) == count, varied
            assert varied.startswith("The ") and varied.endswith(" over <NUM> lazy foxes; see <URL>.")
    seen = {varied.split(" jump")[0] for varied in texts(sources, SynonymsStep(count=1))}
    assert "The speedy dog, happy as ever, likes to" in seen and "The quick frump, happy as ever, likes to" in seen


def test_synonyms_keep_capitals(sources: dict[str, str]) -> None:
    assert set(texts(sources, SynonymsStep(), text="Quickly")) == {"Rapidly", "Apace"}
    assert set(texts(sources, SynonymsStep(), text="QUICKLY")) == {"RAPIDLY", "APACE"}


def test_chinese_words_are_replaced_whole(sources: dict[str, str]) -> None:
    assert set(texts(sources, SynonymsStep(count=1), text="他们在学习。")) == {"他们在研习。", "他们在念书。"}


def test_insertion_adds_a_synonym(sources: dict[str, str]) -> None:
    for varied in texts(sources, InsertionStep(count=1), text="jump high", count=100):
        words = varied.split()
        assert sorted(words) in (["high", "jump", "leap"], ["high", "jump", "spring"]) and varied == " ".join(words)
    places = Counter(varied.split().index("leap") for varied in texts(sources, InsertionStep(), text="jump high") if "leap" in varied)
    assert set(places) == {0, 1, 2}
    assert set(texts(sources, InsertionStep(), text="他在学习。")) >= {"他研习在学习。", "念书他在学习。"}
    assert texts(sources, InsertionStep(), text="no such words here", count=1) == ["no such words here"]


def test_swap_exchanges_two_words(sources: dict[str, str]) -> None:
    seen = set(texts(sources, SwapStep(count=1), text="a, b c!"))
    assert seen == {"b, a c!", "c, b a!", "a, c b!"}
    assert texts(sources, SwapStep(), text="alone.", count=1) == ["alone."]


def test_deletion_rate_and_what_stays(sources: dict[str, str]) -> None:
    long = " ".join(["word"] * 200)
    left = [len(varied.split()) for varied in texts(sources, DeletionStep(rate=0.1), text=long)]
    # 200 texts of 200 words: the standard error of the mean is 0.3 words.
    assert abs(sum(left) / len(left) - 180) < 1.5
    assert set(texts(sources, DeletionStep(rate=1.0), text="a, b c!", count=60)) == {"a!", ", b!", ",c!", ", c!"} & set(
        texts(sources, DeletionStep(rate=1.0), text="a, b c!", count=60)
    )
    assert all("<NUM>" in varied and "<URL>" in varied for varied in texts(sources, DeletionStep(rate=1.0), count=20))
    assert all("," in varied and varied.endswith(".") for varied in texts(sources, DeletionStep(rate=0.5)))


def test_character_noise_disturbs_words_at_its_rate(sources: dict[str, str]) -> None:
    for varied in texts(sources, CharacterNoiseStep(rate=0.3), text="transformer <NUM> a", count=50):
        first, number, last = varied.split()
        assert first[0] == "t" and number == "<NUM>" and last == "a"
    changed = [varied != "transformer" for varied in texts(sources, CharacterNoiseStep(rate=0.05), text="transformer", count=400)]
    assert 0.25 < sum(changed) / len(changed) < 0.5  # 1 - 0.95^10 is 0.40; a letter may be replaced by itself.


def test_probability_is_the_share_of_examples(sources: dict[str, str]) -> None:
    vary = augmenter(sources, SwapStep(), probability=0.1)
    changed = sum(vary.text("a b", sample, 0) != "a b" for sample in range(4000))
    assert 320 < changed < 480  # 400, four standard deviations of 19


@pytest.mark.parametrize("text", ["", " ", "\n", ".,!", "<NUM>"])
def test_a_text_without_words_passes(sources: dict[str, str], text: str) -> None:
    assert set(texts(sources, *EDA, text=text, count=20)) == {text}
    assert augmenter(sources, *EDA).words([], [], 0, 0) == ([], [])


@pytest.mark.parametrize("text", [ENGLISH, CHINESE])
def test_seed_sample_and_epoch_decide_and_nothing_else(sources: dict[str, str], text: str) -> None:
    vary = augmenter(sources, *EDA)
    other = pickle.loads(pickle.dumps(augmenter(sources, *EDA)))
    places = [(sample, epoch) for sample in range(5) for epoch in range(5)]
    expected = {place: vary.text(text, *place) for place in places}
    assert {place: other.text(text, *place) for place in reversed(places)} == expected
    assert len(set(expected.values())) > 20
    assert [augmenter(sources, *EDA, seed=1).text(text, *place) for place in places] != list(expected.values())


def spans(words: Sequence[str], tags: Sequence[str]) -> list[tuple[str, str]]:
    """Entities and their kinds; raises where an I- follows nothing of its kind."""
    found: list[tuple[str, str]] = []
    before = "O"
    for word, tag in zip(words, tags, strict=True):
        if tag.startswith("B-"):
            found.append((word, tag[2:]))
        elif tag.startswith("I-"):
            assert before[2:] == tag[2:], f"{tag} after {before}"
            found[-1] = (f"{found[-1][0]} {word}", tag[2:])
        before = tag
    return found


def test_named_entities_stay_whole_and_labelled(sources: dict[str, str]) -> None:
    words = ["John", "Smith", "quickly", "chased", "a", "dog", "in", "New", "York", "and", "jump", "Anna"]
    tags = ["B-PER", "I-PER", "O", "O", "O", "O", "O", "B-LOC", "I-LOC", "O", "O", "B-PER"]
    vary = augmenter(
        sources, SynonymsStep(), InsertionStep(count=3), SwapStep(count=3), DeletionStep(rate=0.3), CharacterNoiseStep(rate=0.2)
    )
    results = [vary.words(words, tags, sample, 0) for sample in range(300)]
    for varied, labels in results:
        assert spans(varied, labels) == spans(words, tags)
        assert not any(" " in word for word in varied)
    assert len({tuple(varied) for varied, _ in results}) > 250


def test_back_translation_in_one_call(sources: dict[str, str]) -> None:
    calls: list[list[str]] = []

    def translator(batch: Sequence[str]) -> list[str]:
        calls.append(list(batch))
        return ["" if text == "untranslatable" else text.upper() for text in batch]

    batch = ["a", "", "b", "untranslatable", "c"]
    assert augmenter(sources).translated(batch, range(5), 0, translator) == ["A", "", "B", "untranslatable", "C"]
    assert calls == [["a", "b", "untranslatable", "c"]]
    some = augmenter(sources, probability=0.5)
    epochs = [some.translated(["x"] * 50, range(50), epoch, translator) for epoch in (0, 0, 1)]
    assert epochs[0] == epochs[1] != epochs[2] and 10 < epochs[0].count("X") < 40


def test_evaluation_is_not_varied(sources: dict[str, str]) -> None:
    config = AugmentConfig(steps=(SwapStep(),))
    assert augmenter_for(config, 0, training=False) is None and augmenter_for(None, 0, training=True) is None
    assert isinstance(augmenter_for(config, 0, training=True), Augmenter)


def test_real_sentences(sources: dict[str, str], real_data: Path) -> None:
    rows = (real_data / "sst2" / "train.tsv").read_text().splitlines()[1:300]
    vary = augmenter(sources, *EDA)
    sentences = [row.split("\t")[0] for row in rows]
    varied = [vary.text(sentence, i, 0) for i, sentence in enumerate(sentences)]
    assert all(varied) and sum(a != b for a, b in zip(sentences, varied, strict=True)) > 280
