"""All the words of the demo's corpus: LANGUAGES for scenes, GRAMMARS for counted animals ("four red dogs")."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from data.demo_words_east import EAST
from data.demo_words_west import WEST

_ORDER = ("en", "de", "fr", "ru", "zh", "es", "it", "pt", "nl", "pl", "tr", "hi", "ja", "ko")
LANGUAGES = {code: (WEST | EAST)[code] for code in _ORDER}


@dataclass(frozen=True)
class Grammar:
    """Counted, coloured animals in one language: "four red dogs"."""

    numbers: tuple[str, ...]
    colours: tuple[str, ...]
    animals: tuple[str, ...]
    sentence: str = "{number} {colour} {animal}"
    counted: str = "{number} {animal}"
    coloured: str = "{colour} {animal}"

    def sentences(self) -> list[str]:
        """Every whole sentence, in a fixed order."""
        return self._fill(self.sentence)

    def phrases(self) -> list[str]:
        """Every pair of words of a sentence."""
        return self._fill(self.counted) + self._fill(self.coloured)

    def words(self) -> list[str]:
        """Every word alone."""
        return [*self.numbers, *self.colours, *self.animals]

    def _fill(self, template: str) -> list[str]:
        choices = itertools.product(self.numbers, self.colours, self.animals)
        return list(dict.fromkeys(template.format(number=n, colour=c, animal=a) for n, c, a in choices))


def _grammar(numbers: str, colours: str, animals: str, *templates: str) -> Grammar:
    return Grammar(tuple(numbers.split()), tuple(colours.split()), tuple(animals.split()), *templates)


_NOUN_FIRST = ("{number} {animal} {colour}", "{number} {animal}", "{animal} {colour}")

# Numbers, genders and cases are chosen so that one form of each word fits every sentence.
GRAMMARS = {
    "en": _grammar("two three four five six", "red blue green white", "dogs cats birds horses"),
    "de": _grammar("zwei drei vier fünf sechs", "rote blaue grüne weiße", "Hunde Katzen Vögel Pferde"),
    "fr": _grammar(
        "deux trois quatre cinq six", "rouges bleus verts blancs", "chiens chats poissons lapins", *_NOUN_FIRST
    ),
    "ru": _grammar("пять шесть семь восемь девять", "красных синих зелёных белых", "собак котов птиц лошадей"),
    "zh": _grammar(
        "两 三 四 五 六",
        "红 蓝 绿 白",
        "狗 猫 鸟 兔",
        "{number}只{colour}{animal}",
        "{number}只{animal}",
        "{colour}{animal}",
    ),
    "es": _grammar(
        "dos tres cuatro cinco seis", "rojos azules verdes blancos", "perros gatos caballos conejos", *_NOUN_FIRST
    ),
    "it": _grammar(
        "due tre quattro cinque sei", "rossi gialli verdi bianchi", "cani gatti uccelli cavalli", *_NOUN_FIRST
    ),
    "pt": _grammar(
        "dois três quatro cinco seis",
        "vermelhos azuis verdes brancos",
        "cachorros gatos pássaros cavalos",
        *_NOUN_FIRST,
    ),
    "nl": _grammar("twee drie vier vijf zes", "rode blauwe groene witte", "honden katten vogels paarden"),
    "pl": _grammar(
        "pięć sześć siedem osiem dziewięć", "czerwonych niebieskich zielonych białych", "psów kotów ptaków koni"
    ),
    "tr": _grammar("iki üç dört beş altı", "kırmızı mavi yeşil beyaz", "köpek kedi kuş at"),
    "hi": _grammar("दो तीन चार पाँच छह", "लाल नीले हरे सफ़ेद", "कुत्ते घोड़े पक्षी खरगोश"),
    "ja": _grammar(
        "にひき さんびき よんひき ごひき ろっぴき",
        "あかい あおい くろい しろい",
        "いぬ ねこ さる くま",
        "{number}の {colour} {animal}",
        "{number}の {animal}",
        "{colour} {animal}",
    ),
    "ko": _grammar(
        "두 세 네 다섯 여섯",
        "빨간 파란 노란 하얀",
        "개 고양이 새 토끼",
        "{colour} {animal} {number} 마리",
        "{animal} {number} 마리",
        "{colour} {animal}",
    ),
}
