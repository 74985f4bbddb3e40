"""Whether an answer to one question may be given to another one that is near to it. Pure; knows words, no vectors.

Vectors do not see what turns an answer round: "not", 30 or 300, from A to B or from B to A. So nothing is taken on
trust: each word of either question has to be in the other one, or be one that says nothing, or have its equal there;
what the words are to each other has to be the same too. What does not understand a sentence can only be careful: it
refuses most of what a person would call the same question.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from itertools import combinations

from selfhost_cli.proxy.cache.semantic import words

GUARDS = (
    "identifier",
    "number",
    "negation",
    "quantifier",
    "comparative",
    "kind",
    "tense",
    "person",
    "name",
    "antonym",
    "word",
    "direction",
)
"""Every reason there is, in the order in which they are looked for."""

_CANON = {word: row.split()[0] for row in words.EQUAL for word in row.split()}
_SPELLING = dict(words.SPELLINGS)
_UNIT = {word: unit for unit, row in words.UNITS.items() for word in row.split()}
_OPPOSITE = frozenset(frozenset(pair) for row in words.OPPOSITES for pair in combinations(row.split(), 2))
_RELATIONS = frozenset(words.RELATIONS.values())
_PREFIXES = ("un", "in", "im", "ir", "il", "non", "dis", "de", "mis")


_QUOTED = re.compile(r"`[^`]+`|\"[^\"]+\"")
_CODE_SIGN = re.compile(r"[_/\\:=<>@#$&|{}()\[\]~^*+%]|[A-Za-z_]\.[A-Za-z_]")
_SHARP = re.compile(r"[A-Za-z](?:\+\+|#)")
_CAMEL = re.compile(r"[a-z][A-Z]")
_NUMBER = re.compile(r"([£$€]?)(\d[\d,]*(?:\.\d+)*)([a-z%]*)")
_TOKEN = re.compile(r"\x00\d+\x00|[£$€]?\d[\d,]*(?:\.\d+)*[^\W\d_]*%?|[^\W\d_]\w*|[,;:.?!]")
_TURNED = (
    (
        re.compile(r"^(?:i (?:would like|want|need) to )?(.+?)[,:;.] how (?:do|can) i do (?:it|that)\b"),
        r"how do i \1",
    ),
    (re.compile(r"^(.+?)[,:] (what is|what are) (?:it|that|they)\b"), r"\2 \1"),
    (re.compile(r"^(.+?), how(?=\W*$)"), r"how do i \1"),
)
"""Questions that begin with what they are about."""
_ABBREVIATIONS = ("e.g.", "i.e.", "etc.")
_ENDS = ",;:?!.…"
_MARK = "\x01"
"""Begins what has a place among the words, and is compared as something else."""


@dataclass
class _Question:
    """What a text says, sorted by the guard that compares it."""

    identifiers: Counter[str] = field(default_factory=Counter)
    numbers: list[str] = field(default_factory=list)
    negations: Counter[str] = field(default_factory=Counter)
    quantifiers: Counter[str] = field(default_factory=Counter)
    comparatives: Counter[str] = field(default_factory=Counter)
    kind: str = ""
    tense: str = ""
    persons: set[str] = field(default_factory=set)
    relations: Counter[str] = field(default_factory=Counter)
    places: list[tuple[str, str]] = field(default_factory=list)
    """Each word and identifier with what it is to the rest, in their order: a relation, a link with "~", or nothing.
    A relation is the last word's of its part ("from a Python list"); those before it have it with "~", too."""
    joined: set[frozenset[str]] = field(default_factory=set)
    """Pairs with a joint between them."""
    names: set[str] = field(default_factory=set)
    """Of the words, those written as names are; and as identifiers are, below."""
    camels: set[str] = field(default_factory=set)

    @property
    def words(self) -> Counter[str]:
        return Counter(word for word, _ in self.places if word not in self.identifiers and word[0] != _MARK)


def refuse(asked: str, known: str, lexicon: Container[str] = ()) -> str:
    """Why the answer to `known` must not be given for `asked`: one of GUARDS; "" when nothing speaks against it.

    The same either way round. `lexicon`: English words. With them a word that is none may be taken for a misspelt one
    that is; without, every misspelling is another word.
    """
    return next(reasons(asked, known, lexicon), "")


def reasons(asked: str, known: str, lexicon: Container[str] = ()) -> Iterator[str]:
    """Every reason to refuse, in the order of GUARDS."""
    if asked.split() == known.split():
        return
    one, other = _read(asked), _read(known)
    _correct(one, other, lexicon)
    yield from _reasons(one, other)


def _correct(one: _Question, other: _Question, lexicon: Container[str]) -> None:
    """Put words in the place of those that are misspelt, where each has exactly one that it can be."""
    right = {}
    for wrong, there in ((one, other), (other, one)):
        for word in wrong.words - there.words:
            meant = [known for known in there.words - wrong.words if known in lexicon and _misspelt(word, known)]
            if len(meant) == 1 and word not in lexicon and word not in wrong.camels:
                right[word] = meant[0]
    for question in (one, other):
        question.places = [(right.get(word, word), place) for word, place in question.places]


def _misspelt(word: str, known: str) -> bool:
    """Letters in between were left out, doubled, hit wrong or in the wrong order. The ends are right: Prism, Prisma."""
    if min(len(word), len(known)) < 5 or word[0] != known[0] or word[-1] != known[-1]:
        return False
    return _distance(word, known) <= (2 if len(known) > 7 else 1)


def _distance(one: str, other: str) -> int:
    """Letters to insert, delete, replace, or swap with their neighbour."""
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        before, last, row = row, before, [i]
        for j, another in enumerate(other, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != another))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == another:
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
    return row[-1]


def _reasons(one: _Question, other: _Question) -> Iterator[str]:
    for guard in ("identifiers", "numbers", "negations", "quantifiers", "comparatives", "kind", "tense"):
        if getattr(one, guard) != getattr(other, guard):
            yield guard.removesuffix("s")
    if one.persons and other.persons and one.persons != other.persons:
        yield "person"
    if one.words != other.words:
        yield _unlike(one, other)
    if one.relations != other.relations or _turned(one, other):
        yield "direction"


def _unlike(one: _Question, other: _Question) -> str:
    """What kind of words are in one of them only."""
    ours, theirs = set(one.words - other.words), set(other.words - one.words)
    if any(_opposite(*sorted((word, another), key=len)) for word in ours for another in theirs):
        return "antonym"
    if (ours | theirs) & (one.camels | other.camels):
        return "identifier"
    if (ours | theirs) & (one.names | other.names):
        return "name"
    return "word"


def _opposite(short: str, long: str) -> bool:
    return frozenset((short, long)) in _OPPOSITE or any(long == prefix + short for prefix in _PREFIXES)


def _turned(one: _Question, other: _Question) -> bool:
    """Whether what is the same in both has another place in them: A to B and B to A."""
    ours, theirs = _unique(one.places), _unique(other.places)
    shared = [word for word in ours if word in theirs]
    if not all(_agree(ours[word][1], theirs[word][1]) for word in shared):
        return True
    for word, another in combinations(shared, 2):
        if theirs[word][0] < theirs[another][0] or frozenset((word, another)) in one.joined & other.joined:
            continue
        here, there = ((question[word][1], question[another][1]) for question in (ours, theirs))
        alike = here[0] == here[1] and there[0] == there[1]
        if alike or here == there[::-1]:
            return True
    return False


def _agree(place: str, another: str) -> bool:
    if "~" not in place + another:
        return place == another
    if {place, another} == {"~in", "~on"}:
        return False
    bases = {place.removeprefix("~"), another.removeprefix("~")}
    return len(bases & _RELATIONS) < 2


def _unique(places: list[tuple[str, str]]) -> dict[str, tuple[int, str]]:
    """Where each word is first, and its place there."""
    found: dict[str, tuple[int, str]] = {}
    for index, (word, place) in enumerate(places):
        found.setdefault(word, (index, place))
    return found


# --- reading ------------------------------------------------------------------------------------------------------


def _read(text: str) -> _Question:
    question = _Question()
    text = text.replace("’", "'").replace("“", '"').replace("”", '"').strip()
    text, identifiers = _without_code(text)
    for word in re.findall(r"(?<=[^.?!:\s]\s)[A-Z]\w*", text):
        question.names.add(_canonical(word.lower()))
    for word in re.findall(r"\w+", text):
        if _CAMEL.search(word):
            question.camels.add(_canonical(word.lower()))
    tokens = _TOKEN.findall(_plain(text.lower()))
    tokens = _measured(_kinded(question, tokens))
    _Sorter(question, identifiers).sort(tokens)
    return question


def _without_code(text: str) -> tuple[str, list[str]]:
    """The text with a mark for each identifier in it, and the identifiers."""
    found: list[str] = []

    def mark(identifier: str) -> str:
        found.append(identifier)
        return f" \x00{len(found) - 1}\x00 "

    text = _QUOTED.sub(lambda quoted: mark(quoted[0][1:-1].strip()), text.replace("\x00", ""))
    parts = []
    for part in text.split():
        bare = part.rstrip(_ENDS) if not part.startswith("\x00") else part
        bare = bare[1:-1] if bare[:1] == "(" and bare[-1:] == ")" else bare
        if "\x00" not in part and bare.lower() not in _ABBREVIATIONS and _is_code(bare):
            sign = bare.lower() if _SHARP.fullmatch(bare) else bare
            parts.append(mark(sign) + part[len(part.rstrip(_ENDS)) or len(part) :])
        else:
            parts.append(part)
    return " ".join(parts), found


def _is_code(part: str) -> bool:
    if re.fullmatch(r"[£$€]?\d[\d,.]*%?[a-z]*", part):
        return False
    return bool(_CODE_SIGN.search(part)) or bool(re.match(r"--?[A-Za-z]", part)) or bool(re.fullmatch(r"[-.]+", part))


def _plain(text: str) -> str:
    """Without fillers, with contractions written out and the usual ways to ask put in one way."""
    for short, full in words.CONTRACTIONS.items():
        text = re.sub(rf"{short}\b", full, text)
    text = re.sub(r"\b(what|where|who|how|when|why|there|here|it|that)'s\b", r"\1 is", text)
    text = re.sub("['-]", " ", text)
    text = re.sub(r"\w+", lambda word: words.WITHOUT_APOSTROPHE.get(word[0], word[0]), text)
    for phrase, one in words.PHRASES:
        text = re.sub(rf"\b{phrase}\b", one, text)
    return _asked(" ".join(word for word in text.split() if word.strip(_ENDS) not in words.HESITATIONS))


def _asked(text: str) -> str:
    before = ""
    while text != before:
        before = text
        for turned, straight in _TURNED:
            text = turned.sub(straight, text)
        text = text.strip(" ,;:.!…")
        for filler in words.FILLERS:
            text = re.sub(rf"^{filler}\b[\s,;:.!…]*|[\s,;:.!…]+{filler}(?=[\s?!.]*$)", "", text)
        for asking, one in words.ASKING:
            text = re.sub(rf"^{asking}\b\s*", f"{one} " if one else "", text)
    return text


def _kinded(question: _Question, tokens: list[str]) -> list[str]:
    """Find out what is asked for; what is left is the rest."""
    starts = [index for index in range(len(tokens)) if index == 0 or tokens[index - 1] in _ENDS]
    found = next((index for index in starts if tokens[index] in words.KINDS), None)
    if found is None:
        question.kind = "what" if tokens[-1:] == ["?"] else "order"
        return tokens
    question.kind = words.KINDS[tokens[found]]
    if question.kind == "who" and {"i", "we", "you"} & set(tokens):
        question.kind = "whom"
    rest = tokens[:found] + tokens[found + 1 :]
    if question.kind == "how" and rest[found : found + 1] and rest[found] in words.MEASURES:
        question.kind += f" {rest.pop(found)}"
        if question.kind == "how much" and {"cost", "charge"} & set(rest):
            question.kind = "what"
    if question.kind == "what" and {"do", "does"} & set(rest):
        rest = [token for token in rest if token != "mean"]
    for tense, signs in (("past", words.PAST), ("future", words.FUTURE)):
        if signs & set(tokens):
            question.tense = tense
    return rest


def _measured(tokens: list[str]) -> list[str]:
    """Numbers in one form, each with its unit as a token of its own behind it."""
    made: list[str] = []
    for token in tokens:
        number = _NUMBER.fullmatch(token)
        if number:
            before, digits, unit = number.groups()
            digits = digits.replace(",", "")
            if unit and unit not in _UNIT:
                made.append(f"#{digits}{unit}")
                continue
            made.append(f"#{digits}")
            made += [f"#{_UNIT[sign]}" for sign in (before, unit) if sign]
        elif token in _UNIT and (len(token) > 1 or (made[-1:] and made[-1][0] == "#")):
            made.append(f"#{_UNIT[token]}")
        elif token == "second" and made[-1:] and made[-1][0] == "#":
            made.append("#s")
        elif token in words.NUMERALS and not (
            token == "one" and made[-1:] and made[-1] in ("which", "this", "that", "the")
        ):
            made.append(f"#{words.NUMERALS[token]}")
        elif token in words.DATES:
            made.append(f"#{token}")
        else:
            made.append(token)
    return made


class _Sorter:
    """Puts each token where it is compared."""

    def __init__(self, question: _Question, identifiers: list[str]) -> None:
        self._question = question
        self._identifiers = identifiers
        self._place = ""
        self._part = False
        """Whether the last word is of the part of the sentence that the next one is of."""
        self._joint = ("", "")

    def sort(self, tokens: list[str]) -> None:
        letters = {token for token in tokens if len(token) == 1 and token.isalpha()} - {"a", "i", "s"}
        for index, token in enumerate(tokens):
            before, rest = tokens[max(index - 1, 0)], tokens[index + 1 :]
            if token == "a" and letters:
                self._word(token)
            elif token in words.LINKS and all(one in _ENDS for one in rest):
                self._question.relations[token] += 1
            else:
                self._sort(token, literal=before in ("do", "does"))

    def _sort(self, token: str, *, literal: bool) -> None:
        question, canonical = self._question, _canonical(token)
        if token[0] == "\x00":
            identifier = self._identifiers[int(token.strip("\x00"))]
            question.identifiers[identifier] += 1
            self._word(identifier)
        elif token[0] == "#":
            question.numbers.append(token[1:])
            self._mark(token)
        elif token in words.NEGATIONS:
            question.negations["no" if token == "non" else token] += 1
            self._mark(token)
        elif token in words.JOINTS:
            question.quantifiers["or"] += token == "or"
            self._joint, self._part = question.places[-1] if question.places else ("", ""), False
        elif token in words.QUANTIFIERS:
            question.quantifiers[words.QUANTIFIERS[token]] += 1
            self._mark(words.QUANTIFIERS[token])
        elif canonical in words.COMPARATIVES:
            question.comparatives[canonical] += 1
            self._mark(canonical)
        elif token in words.PERSONS:
            question.persons.add(words.PERSONS[token])
        elif token in words.RELATIONS:
            self._begin(words.RELATIONS[token])
            question.relations[self._place] += self._place != "to"
        elif token in words.LINKS:
            self._begin(f"~{token}")
        elif token in words.EMPTY or token in _ENDS:
            self._begin("")
        elif token not in words.ARTICLES:
            # in an order it matters whether one is wanted, or more
            several = self._question.kind == "order" and token.endswith("s") and _stem(token) != token
            self._word(token if literal else f"{canonical}{'s' if several else ''}")

    def _mark(self, mark: str) -> None:
        self._question.places.append((f"{_MARK}{mark}", self._place))

    def _begin(self, place: str) -> None:
        self._place, self._part = place, False

    def _word(self, word: str) -> None:
        places = self._question.places
        joined, place = self._joint
        if joined:
            self._question.joined.add(frozenset((joined, word)))
        if place == self._place or place[:1] != "~":
            self._joint = ("", "")
        if self._part and self._place in _RELATIONS and places[-1][0][0] != _MARK:
            places[-1] = (places[-1][0], f"~{self._place}")
        places.append((word, self._place))
        self._part = True


def _canonical(word: str) -> str:
    """One word for all its equals, forms and spellings."""
    for form in (word, _stem(word)):
        form = _SPELLING.get(form, form)
        if form in _CANON:
            return _CANON[form]
    return _SPELLING.get(_stem(word), _stem(word))


def _stem(word: str) -> str:
    if len(word) > 5:
        word = re.sub(r"is(e|es|ed|ing|ation)$", r"iz\1", word)
    if len(word) > 3 and word[-1] == "s" and word[-2] not in "sui":
        word = re.sub(r"(ss|x|ch|sh)e$|(?<=..)i(?=e$)", lambda end: end[1] or "y", word[:-1])
        word = re.sub(r"ye$", "y", word)
    if len(word) > 5 and word.endswith("ing") and re.search("[aeiouy]", word[:-3]):
        word = re.sub(r"([bdgmnprt])\1$", r"\1", word[:-3])
    return word
