"""The grammar of Scenes: which sentences may be asked about a scene, and which objects each of them means.

Every phrase is built together with its meaning and kept only if that meaning, evaluated on the scene's objects, is
exact: a referring phrase matches one object, an absent one none. A *minimal pair* is a query about what is there and
the same query with one word exchanged, so that nothing is meant. A "shape" is a geometric kind (`GEOMETRIC`), a
"thing" is any object.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import count

import numpy as np

from uground.training.scenes.drawing import (
    COLOURS,
    GEOMETRIC,
    KINDS,
    SIZES,
    TEXTURES,
    Scene,
    SceneObject,
    choose,
)

ATTRIBUTE_WEIGHTS = {"res": 0.3, "rs": 0.15, "fp_res": 0.2, "gres": 0.2, "multi_rs": 0.15}
BARE_SHARE = 0.7
RELATION_SHARE = 0.2
SUPERLATIVE_SHARE = 0.45  # of relations
# Of fp_res: as res and rs together have them.
ABSENT_RIDDLE_SHARE = ATTRIBUTE_WEIGHTS["rs"] / (ATTRIBUTE_WEIGHTS["res"] + ATTRIBUTE_WEIGHTS["rs"])
ABSENT_RELATION_SHARE = (1 - ABSENT_RIDDLE_SHARE) * RELATION_SHARE
EXCHANGE_ALL_SHARE = 0.3
FORM_TRIES = 60
PAIR_TRIES = 200
# Of minimal pairs: the forms that a pair may have.
PAIR_WEIGHTS = {"res": 0.4, "relation": 0.15, "rs": 0.25, "gres": 0.2}
# Of minimal pairs: how often the kind is exchanged where it is said, which is hardest to tell.
PAIR_KIND_SHARE = 0.6
NONE_SHARE = 0.25  # of gres
PARTLY_ABSENT_SHARE = 0.13  # of multi_rs
MULTI_RIDDLE_SHARE = 0.45  # of the phrases of multi_rs
CLEAR_MARGIN = 24.0  # pixels between centres for "left of" to hold
WRONG_MARGIN = 8.0  # pixels on the other side for "left of" not to hold; between the two it is unclear
SUPERLATIVE_MARGIN = 20.0
SUPERLATIVE_RATIO = 1.35

PLURALS = {kind: kind + "s" for kind in KINDS} | {"cross": "crosses", "fish": "fish"}
# "{c}" stands for nothing or for " red"; phrasings without it are only used without a colour.
RIDDLES = {
    "circle": ("something{c} shaped like a coin", "a{c} shape like the full moon", "a{c} disc without a hole"),
    "square": ("a{c} shape with four equal sides", "a{c} shape with four corners", "a{c} shape like a chessboard"),
    "triangle": ("a{c} shape with three corners", "a{c} shape with three sides", "something{c} shaped like a pyramid"),
    "star": (
        "a{c} shape with five points",
        "what twinkles in the night sky",
        "something{c} for the top of a flagpole",
    ),
    "cross": ("a{c} shape like a plus sign", "what marks a first aid kit", "a{c} sign for adding numbers"),
    "ring": ("a{c} round shape with a hole", "something{c} to wear on a finger", "what looks like a doughnut"),
    "tree": ("a{c} plant with leaves", "whatever grows in a forest", "something{c} birds nest in"),
    "house": ("where a family could live", "something{c} with a chimney", "a{c} building to live in"),
    "boat": ("something{c} you could sail in", "what carries people over water", "whatever has sails"),
    "fish": ("what lives in water", "whatever can swim", "a{c} animal with fins"),
    "key": ("what opens a locked door", "something{c} to turn in a lock", "whatever unlocks a chest"),
    "cup": ("something{c} to drink from", "what holds coffee or tea", "whatever you fill with tea"),
    "car": ("something{c} you could drive", "a{c} machine with wheels", "whatever drives on a road"),
    "umbrella": ("something{c} to keep you dry", "what you open when it rains", "whatever keeps the rain off"),
}
WRAPPERS = (
    "please segment {}",
    "Can you find {}?",
    "Where {be} {}?",
    "Show me {}.",
    "Segment {} in this image.",
    "Point out {}, please.",
)
COUNT_WORDS = {2: "two", 3: "three", 4: "four", 5: "five"}
SUPERLATIVES = ("leftmost", "rightmost", "highest", "lowest", "largest", "smallest")
# relation -> (axis, sign): "left of" means a smaller x
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}


@dataclass(frozen=True)
class Description:
    """A noun with adjectives: `noun` is a kind, "shape" or "thing"; None means that property is not spoken of."""

    noun: str
    size: str | None = None
    texture: str | None = None
    colour: str | None = None

    def matches(self, item: SceneObject) -> bool:
        nouns = {"thing": KINDS, "shape": GEOMETRIC}.get(self.noun, (self.noun,))
        return (
            item.kind in nouns
            and self.size in (None, item.size)
            and self.texture in (None, item.texture)
            and self.colour in (None, item.colour)
        )

    @property
    def adjectives(self) -> list[str]:
        return [word for word in (self.size, self.texture, self.colour) if word]

    def words(self, plural: bool = False) -> str:
        noun = (PLURALS.get(self.noun) or self.noun + "s") if plural else self.noun
        return " ".join([*self.adjectives, noun])


@dataclass(frozen=True)
class Phrase:
    """A phrase as it stands in the query, and the indices of the scene objects it means."""

    text: str
    targets: tuple[int, ...]
    plural: bool = False


@dataclass(frozen=True)
class Query:
    """What is asked (`text`), what is to be answered, and per phrase its targets; no targets means [REJ]."""

    attribute: str
    text: str
    answer: str
    phrases: tuple[Phrase, ...]


class Grammar:
    """Builds queries about one scene. `pairs` are the (colour, kind) combinations that may be named."""

    def __init__(self, scene: Scene, pairs: Collection[tuple[str, str]], rng: np.random.Generator):
        self.objects = scene.objects
        self.centres = [item.centre for item in scene.objects]
        self.areas = [int(np.count_nonzero(item.mask)) for item in scene.objects]
        self.pairs = frozenset(pairs)
        self.rng = rng

    # meaning

    def found(self, description: Description) -> tuple[int, ...]:
        return tuple(i for i, item in enumerate(self.objects) if description.matches(item))

    def may_name(self, description: Description) -> bool:
        """Whether the phrase avoids every colour-kind combination this split does not contain."""
        named = description.colour and description.noun in KINDS
        return not named or (description.colour, description.noun) in self.pairs

    def superlative(self, word: str, candidates: tuple[int, ...]) -> int | None:
        """The candidate that is clearly the leftmost, highest, largest … one, or None where that is not clear."""
        if len(candidates) < 2:
            return None
        if word in ("largest", "smallest"):
            # The visible area and the drawn extent must agree, or an overlap could decide.
            power = 1 if word == "largest" else -1
            ranked = sorted(candidates, key=lambda i: -power * self.objects[i].extent)
            first, second = ranked[:2]
            extents = (self.objects[first].extent / self.objects[second].extent) ** power
            areas = min((self.areas[first] / self.areas[i]) ** power for i in ranked[1:])
            return first if extents >= SUPERLATIVE_RATIO and areas >= SUPERLATIVE_RATIO else None
        axis, sign = {"leftmost": (0, 1), "rightmost": (0, -1), "highest": (1, 1), "lowest": (1, -1)}[word]
        first, second = sorted(candidates, key=lambda i: sign * self.centres[i][axis])[:2]
        gap = sign * (self.centres[second][axis] - self.centres[first][axis])
        return first if gap >= SUPERLATIVE_MARGIN else None

    def related(self, candidates: tuple[int, ...], relation: str, anchor: int) -> tuple[int, ...] | None:
        """The candidates that are clearly `relation` the anchor; None where one neither is nor is not."""
        axis, sign = RELATIONS[relation]
        yes = []
        for i in candidates:
            if i == anchor:
                continue
            along = sign * (self.centres[i][axis] - self.centres[anchor][axis])
            across = abs(self.centres[i][1 - axis] - self.centres[anchor][1 - axis])
            if along >= CLEAR_MARGIN and along >= across:
                yes.append(i)
            elif along > -WRONG_MARGIN:
                return None
        return tuple(yes)

    # phrases for one object

    def descriptions(self, item: SceneObject) -> list[Description]:
        """All descriptions of an object with a kind, "shape" or "thing" as the noun."""
        nouns = [item.kind, "thing"] + (["shape"] if item.kind in GEOMETRIC else [])
        return [
            Description(noun, size, texture, colour)
            for noun in nouns
            for size in (None, item.size)
            for texture in (None, item.texture)
            for colour in (None, item.colour)
            if noun in KINDS or size or texture or colour
        ]

    def naming(self, index: int, short: bool | None = None) -> Phrase:
        """A plain phrase that means exactly this object, as short as it can be or redundantly specific."""
        return Phrase("the " + self.describing(index, short).words(), (index,))

    def describing(self, index: int, short: bool | None = None) -> Description:
        """What such a phrase says of the object."""
        unique = [d for d in self.descriptions(self.objects[index]) if self.found(d) == (index,)]
        if self.rng.random() < 0.85:  # mostly by its kind: no two objects of a scene are alike, so one always exists
            unique = [d for d in unique if d.noun in KINDS]
        short = bool(self.rng.random() < 0.5) if short is None else short
        if short:
            fewest = min(len(d.adjectives) for d in unique)
            unique = [d for d in unique if len(d.adjectives) == fewest]
        return choose(self.rng, unique)

    def relation(self) -> Phrase | None:
        """A phrase with a superlative or with another object as the anchor, or None if this try met no clear one."""
        index = int(self.rng.integers(len(self.objects)))
        description = self.loosely(index)
        candidates = self.found(description)
        if self.rng.random() < SUPERLATIVE_SHARE:
            word = choose(self.rng, SUPERLATIVES)
            if self.superlative(word, candidates) != index or (description.size and word in ("largest", "smallest")):
                return None
            return Phrase(f"the {word} {description.words()}", (index,))
        anchor = int(self.rng.integers(len(self.objects)))
        if anchor == index or (candidates == (index,) and self.rng.random() < 0.6):
            return None  # mostly only where the noun alone would not do
        relation = choose(self.rng, tuple(RELATIONS))
        if self.related(candidates, relation, anchor) != (index,):
            return None
        return Phrase(f"the {description.words()} {relation} {self.naming(anchor, short=True).text}", (index,))

    def loosely(self, index: int) -> Description:
        """What is said of an object beside a superlative or a relation: a noun and at most one adjective."""
        loose = [d for d in self.descriptions(self.objects[index]) if len(d.adjectives) <= 1]
        return choose(self.rng, [*loose, Description("thing")])

    def riddle_text(self, kind: str, colour: str | None) -> str:
        fitting = [text for text in RIDDLES[kind] if colour is None or "{c}" in text]
        text = choose(self.rng, fitting).format(c=f" {colour}" if colour else "")
        return text.replace("a orange", "an orange")

    def riddle(self, index: int) -> Phrase | None:
        """A phrase that means just this object by its function or form, or None if even its colour leaves others."""
        item = self.objects[index]
        colours = [c for c in (None, item.colour) if self.found(Description(item.kind, colour=c)) == (index,)]
        if not colours:
            return None
        colour = colours[0] if self.rng.random() < 0.7 else colours[-1]
        return Phrase(self.riddle_text(item.kind, colour), (index,))

    # phrases for nothing: each is made from one for an object, so that its form does not tell that it means nothing

    def absent(self, riddles: float, relations: float, short: bool | None = None) -> Phrase:
        """A phrase that means nothing in the scene; `riddles` and `relations` are the shares of these forms."""
        draw = self.rng.random()
        for attempt in count():
            if attempt == FORM_TRIES:
                draw = 1.0  # this scene offers no riddle, or no relation
            index = int(self.rng.integers(len(self.objects)))
            if draw < riddles:
                phrase = self.absent_riddle(index)
            elif draw < riddles + relations:
                phrase = self.absent_relation(index)
            else:
                description = self.exchanged(self.describing(index, short))
                phrase = description and Phrase("the " + description.words(), ())
            if phrase:
                return phrase

    def exchanged(self, description: Description) -> Description | None:
        """The description with one property, or now and then all, exchanged so that nothing matches it."""
        said = [name for name in ("noun", "size", "texture", "colour") if getattr(description, name)]
        if description.noun not in KINDS:
            said.remove("noun")
        if not said:
            return None
        for _ in range(12):
            changed = said if self.rng.random() < EXCHANGE_ALL_SHARE else [choose(self.rng, said)]
            other = replace(description, **{name: self.other_value(name) for name in changed})
            if not self.found(other) and self.may_name(other):
                return other
        return None

    def one_exchanged(self, description: Description) -> Description | None:
        """The description with one property exchanged, mostly the kind, so that nothing matches it."""
        said = [name for name in ("size", "texture", "colour") if getattr(description, name)]
        named = description.noun in KINDS
        if not said and not named:
            return None
        takes_kind = named and (not said or self.rng.random() < PAIR_KIND_SHARE)
        changed = "noun" if takes_kind else choose(self.rng, said)
        other = replace(description, **{changed: self.other_value(changed)})
        return other if not self.found(other) and self.may_name(other) else None

    def other_value(self, name: str) -> str:
        """A value of a property, preferably one that is seen elsewhere in the scene."""
        if self.rng.random() < 0.6:
            item = choose(self.rng, self.objects)
            return item.kind if name == "noun" else getattr(item, name)
        values = {"noun": KINDS, "size": tuple(SIZES), "texture": TEXTURES, "colour": tuple(COLOURS)}
        return choose(self.rng, values[name])

    def absent_riddle(self, index: int) -> Phrase | None:
        if not (riddle := self.riddle(index)):
            return None
        item = self.objects[index]
        colour = item.colour if item.colour in riddle.text.split() else None
        other = self.exchanged(Description(item.kind, colour=colour))
        return other and Phrase(self.riddle_text(other.noun, other.colour), ())

    def absent_relation(self, index: int) -> Phrase | None:
        """A superlative of what is not there, or a relation of that, or one that clearly does not hold."""
        description = self.loosely(index)
        if self.rng.random() < SUPERLATIVE_SHARE:
            word = choose(self.rng, SUPERLATIVES)
            other = self.exchanged(description)
            if other is None or (other.size and word in ("largest", "smallest")):
                return None
            return Phrase(f"the {word} {other.words()}", ())
        anchor = int(self.rng.integers(len(self.objects)))
        relation = choose(self.rng, tuple(RELATIONS))
        if self.rng.random() < 0.5:
            if anchor in self.found(description) or self.related(self.found(description), relation, anchor) != ():
                return None
        elif (description := self.exchanged(description)) is None:
            return None
        return Phrase(f"the {description.words()} {relation} {self.naming(anchor, short=True).text}", ())

    # whole queries

    def res(self) -> Query | None:
        if self.rng.random() < RELATION_SHARE:
            for _ in range(12):
                if phrase := self.relation():
                    return self.single("res", phrase)
        return self.single("res", self.naming(int(self.rng.integers(len(self.objects)))))

    def rs(self) -> Query | None:
        phrase = self.riddle(int(self.rng.integers(len(self.objects))))
        return phrase and self.single("rs", phrase)

    def fp_res(self) -> Query | None:
        return self.single("fp_res", self.absent(ABSENT_RIDDLE_SHARE, ABSENT_RELATION_SHARE))

    def gres(self) -> Query | None:
        draw = self.rng.random()
        for _ in range(40):
            description = self.group_description()
            targets = self.found(description)
            if (len(targets) == 1) != (NONE_SHARE <= draw < NONE_SHARE + 0.1):
                continue
            if draw < NONE_SHARE:
                description, targets = self.exchanged(description), ()
            if description and self.may_name(description):
                return self.single("gres", self.group_phrase(description, targets))
        return None

    def group_description(self) -> Description:
        """What is said of an object by a kind, "shape" or "thing" as the noun and at most two adjectives."""
        item = choose(self.rng, self.objects)
        noun = choose(self.rng, (item.kind, "shape" if item.kind in GEOMETRIC else "thing", "thing"), (0.4, 0.2, 0.4))
        says_size, says_texture, says_colour = self.rng.random(3) < (0.28, 0.3, 0.5)
        adjectives = int(says_size) + int(says_texture) + int(says_colour)
        if adjectives == 3 or (noun == "thing" and adjectives == 0 and self.rng.random() < 0.85):
            says_size, says_texture, says_colour = False, False, True  # "all things" stays rare
        return Description(
            noun,
            item.size if says_size else None,
            item.texture if says_texture else None,
            item.colour if says_colour else None,
        )

    def group_phrase(self, description: Description, targets: tuple[int, ...]) -> Phrase:
        draw = self.rng.random()
        if len(targets) > 1 and draw < 0.25:
            return Phrase(f"the {COUNT_WORDS[len(targets)]} {description.words(plural=True)}", targets, plural=True)
        if description.noun == "thing" and len(description.adjectives) == 1 and draw < 0.5:
            return Phrase(f"everything that is {description.adjectives[0]}", targets)
        if draw < 0.65:
            return Phrase("every " + description.words(), targets)
        return Phrase("all " + description.words(plural=True), targets, plural=True)

    def multi_rs(self) -> Query | None:
        count = 3 if len(self.objects) > 2 and self.rng.random() < 0.3 else 2
        order = [int(i) for i in self.rng.permutation(len(self.objects))[:count]]
        phrases = []
        for index in order:
            riddle = self.riddle(index) if self.rng.random() < MULTI_RIDDLE_SHARE else None
            phrases.append(riddle or self.naming(index, self.short_in_multi()))
        if self.rng.random() < PARTLY_ABSENT_SHARE:
            short = self.short_in_multi()
            phrases[int(self.rng.integers(count))] = self.absent(MULTI_RIDDLE_SHARE, relations=0.0, short=short)
        texts = [phrase.text for phrase in phrases]
        # A list of phrases must fall apart in only one way, and no phrase may repeat.
        if len(set(texts)) < count or any(" and " in text or "," in text for text in texts):
            return None
        answers = [f"{phrase.text} is {'[SEG]' if phrase.targets else '[REJ]'}" for phrase in phrases]
        return Query("multi_rs", self.wrap(_enumerate(texts), "are"), _enumerate(answers) + ".", tuple(phrases))

    def short_in_multi(self) -> bool | None:
        return True if self.rng.random() < 0.6 else None

    def pair(self) -> tuple[Query, Query] | None:
        """A minimal pair: what is there first; or None if this try led nowhere."""
        form = choose(self.rng, tuple(PAIR_WEIGHTS), tuple(PAIR_WEIGHTS.values()))
        phrases = getattr(self, f"{form}_pair")()
        if not phrases:
            return None
        attributes = ("res" if form == "relation" else form, "gres" if form == "gres" else "fp_res")
        frame = self.wrap("{}", "are" if phrases[0].plural else "is")
        there, absent = map(self.single, attributes, phrases, (frame, frame))
        return there, absent

    def res_pair(self) -> tuple[Phrase, Phrase] | None:
        index = int(self.rng.integers(len(self.objects)))
        description = self.describing(index)
        other = self.one_exchanged(description)
        return other and (Phrase("the " + description.words(), (index,)), Phrase("the " + other.words(), ()))

    def relation_pair(self) -> tuple[Phrase, Phrase] | None:
        index = int(self.rng.integers(len(self.objects)))
        description = self.loosely(index)
        anchor = int(self.rng.integers(len(self.objects)))
        relation = choose(self.rng, tuple(RELATIONS))
        if anchor == index or self.related(self.found(description), relation, anchor) != (index,):
            return None
        if not (other := self.one_exchanged(description)):
            return None
        behind = f"{relation} {self.naming(anchor, short=True).text}"
        return Phrase(f"the {description.words()} {behind}", (index,)), Phrase(f"the {other.words()} {behind}", ())

    def rs_pair(self) -> tuple[Phrase, Phrase] | None:
        phrase = self.riddle(int(self.rng.integers(len(self.objects))))
        if not phrase:
            return None
        item = self.objects[phrase.targets[0]]
        colour = item.colour if item.colour in phrase.text.split() else None
        other = self.one_exchanged(Description(item.kind, colour=colour))
        return other and (phrase, Phrase(self.riddle_text(other.noun, other.colour), ()))

    def gres_pair(self) -> tuple[Phrase, Phrase] | None:
        description = self.group_description()
        targets = self.found(description)
        other = self.one_exchanged(description)
        if not other or len(targets) < 2:
            return None
        phrase = self.group_phrase(description, targets)
        words = description.words(plural=phrase.plural), other.words(plural=phrase.plural)
        if words[0] not in phrase.text:  # "everything that is red"
            words = description.adjectives[0], other.adjectives[0]
        return phrase, Phrase(phrase.text.replace(*words), (), phrase.plural)

    def single(self, attribute: str, phrase: Phrase, frame: str | None = None) -> Query:
        """The query for one phrase, in a sentence of its own or in a given one, "{}" standing for the phrase."""
        if not phrase.targets:
            answer = "There is none: [REJ]."
        else:
            answer = "They are [SEG]." if len(phrase.targets) > 1 else "It is [SEG]."
        text = frame.format(phrase.text) if frame else self.wrap(phrase.text, "are" if phrase.plural else "is")
        return Query(attribute, text, answer, (phrase,))

    def wrap(self, text: str, be: str) -> str:
        if self.rng.random() < BARE_SHARE:
            return text
        wrapper = choose(self.rng, WRAPPERS)
        return wrapper.replace("{be}", be).format(text)

    def query(self, attribute: str) -> Query | None:
        """One query of an attribute, or None if this try led nowhere; trying again draws on."""
        return getattr(self, attribute)()


def _enumerate(texts: list[str]) -> str:
    return " and ".join([", ".join(texts[:-1]), texts[-1]])
