"""A small multilingual question answering set out of templates: for machines without data, and for tests.

Each article is a paragraph of a few facts, the same in every language; each question asks for one of them. Names and
facts are written as each language writes them, so that a question about a text in another language must translate.
"""

from __future__ import annotations

import random

from toolchain.tasks.qa_readers import Question

LANGUAGES = ("en", "es", "de", "ru", "zh")
ASKED = 3  # questions about a paragraph

NAMES = {
    "en": "Anna Boris Clara Daniel Emma Felix Greta Hugo Irene Jonas Laura Martin",
    "es": "Ana Boris Clara Daniel Ema Félix Greta Hugo Irene Jonás Laura Martín",
    "de": "Anna Boris Klara Daniel Emma Felix Greta Hugo Irene Jonas Laura Martin",
    "ru": "Анна Борис Клара Даниил Эмма Феликс Грета Хуго Ирина Йонас Лаура Мартин",
    "zh": "安娜 鲍里斯 克拉拉 丹尼尔 艾玛 菲利克斯 格蕾塔 雨果 艾琳 约纳斯 劳拉 马丁",
}
VALUES = {
    "city": {
        "en": "Paris Rome Vienna Moscow Madrid Berlin Beijing London",
        "es": "París Roma Viena Moscú Madrid Berlín Pekín Londres",
        "de": "Paris Rom Wien Moskau Madrid Berlin Peking London",
        "ru": "Париже Риме Вене Москве Мадриде Берлине Пекине Лондоне",
        "zh": "巴黎 罗马 维也纳 莫斯科 马德里 柏林 北京 伦敦",
    },
    "pet": {
        "en": "dog cat horse rabbit parrot goat",
        "es": "perro gato caballo conejo loro cabra",
        "de": "Hund Katze Pferd Kaninchen Papagei Ziege",
        "ru": "собака кошка лошадь кролик попугай коза",
        "zh": "狗 猫 马 兔子 鹦鹉 山羊",
    },
    "food": {
        "en": "bread soup rice cheese fish honey",
        "es": "pan sopa arroz queso pescado miel",
        "de": "Brot Suppe Reis Käse Fisch Honig",
        "ru": "хлеб суп рис сыр рыбу мёд",
        "zh": "面包 汤 米饭 奶酪 鱼 蜂蜜",
    },
    "year": dict.fromkeys(LANGUAGES, "1951 1962 1973 1984 1995 2006"),
}
SENTENCES = {
    "city": {
        "en": ("{name} lives in {value}.", "Where does {name} live?"),
        "es": ("{name} vive en {value}.", "¿Dónde vive {name}?"),
        "de": ("{name} wohnt in {value}.", "Wo wohnt {name}?"),
        "ru": ("{name} живёт в {value}.", "Где живёт {name}?"),
        "zh": ("{name}住在{value}。", "{name}住在哪里？"),
    },
    "pet": {
        "en": ("At the home of {name} there is a {value}.", "Which animal does {name} have?"),
        "es": ("En casa de {name} hay un animal: {value}.", "¿Qué animal tiene {name}?"),
        "de": ("Bei {name} lebt ein Tier: {value}.", "Welches Tier hat {name}?"),
        "ru": ("Дома у {name} есть {value}.", "Какое животное есть у {name}?"),
        "zh": ("{name}家里有一只{value}。", "{name}有什么动物？"),
    },
    "food": {
        "en": ("{name} likes {value} best.", "What does {name} like to eat?"),
        "es": ("A {name} le gusta más: {value}.", "¿Qué le gusta comer a {name}?"),
        "de": ("{name} isst am liebsten {value}.", "Was isst {name} gern?"),
        "ru": ("{name} любит больше всего {value}.", "Что любит есть {name}?"),
        "zh": ("{name}最喜欢吃{value}。", "{name}喜欢吃什么？"),
    },
    "year": {
        "en": ("{name} was born in {value}.", "When was {name} born?"),
        "es": ("{name} nació en {value}.", "¿Cuándo nació {name}?"),
        "de": ("{name} wurde {value} geboren.", "Wann wurde {name} geboren?"),
        "ru": ("Год рождения {name}: {value}.", "Когда год рождения {name}?"),
        "zh": ("{name}出生于{value}年。", "{name}出生于哪一年？"),
    },
}


def articles(part: str, count: int, seed: int) -> dict[str, list[Question]]:
    """``count`` articles of ``part`` in every language, aligned by id; (part, seed) decide."""
    rng = random.Random(f"{part} {seed}")
    found: dict[str, list[Question]] = {language: [] for language in LANGUAGES}
    names = {language: text.split() for language, text in NAMES.items()}
    values = {relation: {lang: text.split() for lang, text in texts.items()} for relation, texts in VALUES.items()}
    for number in range(count):
        people = rng.choices(range(len(names["en"])), k=len(VALUES))
        relations = rng.sample(list(VALUES), len(VALUES))
        facts = [
            (who, kind, rng.randrange(len(values[kind]["en"]))) for who, kind in zip(people, relations, strict=True)
        ]
        asked = rng.sample(range(len(facts)), ASKED)
        for language in LANGUAGES:
            context, places = "", []
            for who, relation, what in facts:
                before, after = (
                    SENTENCES[relation][language][0].format(name=names[language][who], value="\0").split("\0")
                )
                context += " " if context and language != "zh" else ""
                places.append(len(context) + len(before))
                context += before + values[relation][language][what] + after
            for index in asked:
                who, relation, what = facts[index]
                question = SENTENCES[relation][language][1].format(name=names[language][who])
                answer = (values[relation][language][what], places[index])
                name, title = f"{part}-{number}-{index}", f"{part} {number}"
                found[language].append(Question(name, title, question, context, (answer,), language, language))
    return found
