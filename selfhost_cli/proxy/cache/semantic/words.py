"""What the guards know of English, and of what developers write. Data.

Written by hand: closed classes (pronouns, prepositions, numerals, units, months) after any grammar's lists; fillers,
equal words and opposites from general English and from the words of programming. The fitting half of the benchmark
showed which were missing, the other half was not looked at. To add an equal word makes the cache serve more and may
make it wrong; a word that is in no table is never wrong: it has to be in both questions.
"""

from __future__ import annotations


def _each(row: str) -> frozenset[str]:
    return frozenset(row.split())


CONTRACTIONS = {
    "can't": "can not",
    "won't": "will not",
    "n't": " not",
    "'re": " are",
    "'ve": " have",
    "'ll": " will",
    "'m": " am",
    "'d": " would",
}
"""Endings."""

WITHOUT_APOSTROPHE = {
    "cannot": "can not",
    "cant": "can not",
    "dont": "do not",
    "doesnt": "does not",
    "didnt": "did not",
    "isnt": "is not",
    "arent": "are not",
    "wasnt": "was not",
    "wont": "will not",
    "shouldnt": "should not",
    "couldnt": "could not",
    "wouldnt": "would not",
    "whats": "what is",
    "wheres": "where is",
    "whos": "who is",
    "hows": "how is",
    "im": "i am",
    "ive": "i have",
}
"""As people type them. Not "its" and "were", which are words of their own."""

FILLERS = (
    "in advance",
    "many thanks",
    "thank you",
    "thanks",
    "thx",
    "cheers",
    "please",
    "pls",
    "kindly",
    "hello",
    "hiya",
    "hey",
    "hi",
    "good morning",
    "so",
    "ok so",
    "okay",
    "well",
    "actually",
    "basically",
    "quick question",
    "quick one",
    "silly question",
    "sorry to bother you",
    "sorry",
    "just wondering",
    "i was wondering",
    "i am wondering",
    "but",
)
"""Say nothing about the answer. "So", "well" and "but" only at the beginning of what is left."""

HESITATIONS = _each("um uh uhm erm er hmm")
"""Fillers wherever they are."""

ASKING = (
    ("what is the meaning of", "what is"),
    ("what are", "what is"),
    ("can you explain", "explain"),
    ("could you explain", "explain"),
    ("can you tell me", "tell me"),
    ("could you tell me", "tell me"),
    ("i would like to know", "tell me"),
    ("i want to know", "tell me"),
    ("do you know", "tell me"),
    ("tell me", ""),
    ("can you", ""),
    ("could you", ""),
    ("would you", ""),
    ("will you", ""),
    ("i would like you to", ""),
    ("i want you to", ""),
    ("explain to me", "explain"),
    ("explain what", "what"),
    ("explain how", "how"),
    ("explain why", "why"),
    ("what is the best way to", "how best do i"),
    ("what is the way to", "how do i"),
    ("what is a way to", "how do i"),
    ("what is the steps to", "how do i"),
    ("what is the command to", "which command"),
    ("is there a way to", "how do i"),
    ("what is the process for", "how do i"),
    ("what is the procedure for", "how do i"),
    ("what is the method for", "how do i"),
    ("how do i go about", "how do i"),
    ("how come", "why"),
    ("how to", "how do i"),
    ("how does one", "how do i"),
    ("what time", "when"),
    ("at what time", "when"),
    ("is it possible to", "can i"),
    ("is it possible for me to", "can i"),
    ("is it ok to", "can i"),
    ("is it okay to", "can i"),
    ("am i allowed to", "can i"),
    ("am i able to", "can i"),
    ("are there", "is there"),
    ("do you have", "is there"),
)
"""Ways to ask: at the beginning, once contractions are written out. Tried in this order, again and again."""

PHRASES = (
    ("in order to", "to"),
    ("turn on", "enable"),
    ("switch on", "enable"),
    ("turn off", "disable"),
    ("switch off", "disable"),
    ("shut down", "shutdown"),
    ("get rid of", "remove"),
    ("set up", "setup"),
    ("log in", "login"),
    ("log out", "logout"),
    ("sign in", "login"),
    ("sign out", "logout"),
    ("regular expression", "regex"),
    ("regular expressions", "regex"),
    ("pull request", "pr"),
    ("pull requests", "pr"),
    ("segmentation fault", "segfault"),
    ("pretty print", "prettyprint"),
    ("command line", "commandline"),
    ("file name", "filename"),
    ("data base", "database"),
    ("code base", "codebase"),
    ("e mail", "email"),
    ("web site", "website"),
    ("no longer", "not"),
    ("rather than", "instead"),
    ("instead of", "instead"),
    ("at least", "minimum"),
    ("at most", "maximum"),
    ("by default", "default"),
)
"""Several words that are as good as one."""

EQUAL = (
    "get obtain receive",
    "start begin commence",
    "big large",
    "buy purchase",
    "delete remove erase",
    "create make",
    "show display",
    "exit quit",
    "fix repair",
    "need require needed required",
    "road street",
    "shop store",
    "use utilise utilize",
    "check verify",
    "iterate loop",
    "folder directory",
    "repository repo",
    "dictionary dict",
    "argument arg",
    "parameter param",
    "configuration config",
    "database db",
    "environment env",
    "variable var",
    "application app",
    "information info",
    "documentation docs",
    "string str",
    "integer int",
    "boolean bool",
    "character char",
    "library lib",
    "function func",
    "administrator admin",
    "specification spec",
    "postgres postgresql",
    "kubernetes k8s",
    "javascript js",
    "typescript ts",
    "golang go",
    "luggage baggage",
    "picture photo",
    "quotation quote",
    "mistake error",
    "quick fast",
    "simple easy",
    "allowed permitted",
    "assist help",
    "finish end",
    "choose select pick",
    "summarise summarize",
    "virtualenv venv",
    "maximum max",
    "minimum min",
    "smartphone phone",
)
"""Words in the place of which another of the row may stand."""

SPELLINGS = (
    ("centre", "center"),
    ("colour", "color"),
    ("behaviour", "behavior"),
    ("licence", "license"),
    ("catalogue", "catalog"),
    ("dialogue", "dialog"),
    ("grey", "gray"),
    ("instal", "install"),
    ("cheque", "check"),
    ("cancelled", "canceled"),
    ("programme", "program"),
    ("favourite", "favorite"),
    ("neighbour", "neighbor"),
    ("fulfil", "fulfill"),
)
"""British and American. -ise and -ize, -isation and -ization are a rule."""

OPPOSITES = (
    "add remove delete",
    "enable disable",
    "encrypt decrypt",
    "encode decode",
    "upgrade downgrade",
    "compress extract decompress",
    "lock unlock",
    "stage unstage",
    "show hide",
    "ascending descending",
    "start stop end",
    "open close",
    "serialize deserialize",
    "advantage drawback disadvantage",
    "benefit drawback",
    "pro con",
    "allow block deny forbid",
    "pass fail",
    "push pull",
    "import export",
    "install uninstall",
    "mount unmount",
    "increase decrease reduce",
    "join leave split",
    "accept reject",
    "approve reject",
    "attach detach",
    "connect disconnect",
    "expand collapse",
    "grant revoke",
    "include exclude",
    "input output",
    "load unload save store",
    "login logout",
    "read write",
    "send receive",
    "subscribe unsubscribe",
    "success failure",
    "successful unsuccessful",
    "sync async",
    "true false",
    "undo redo",
    "upload download",
    "public private",
    "static dynamic",
    "strong weak",
    "first last",
    "hot cold",
    "safe dangerous",
    "valid invalid",
    "compulsory optional",
    "refundable nonrefundable",
    "client server",
    "left right",
    "in out",
    "up down",
    "on off",
)
"""Each row: words of which one may not stand for another. They name the reason; any unlike word is one."""

NEGATIONS = _each(
    "not no none never neither nor nothing nobody without except excluding unless stop avoid prevent cannot non lack"
)

QUANTIFIERS = {
    "all": "all",
    "every": "all",
    "each": "all",
    "everything": "all",
    "any": "any",
    "anything": "any",
    "some": "some",
    "something": "some",
    "several": "some",
    "only": "only",
    "just": "only",
    "both": "both",
    "either": "either",
    "first": "first",
    "last": "last",
    "latest": "last",
    "next": "next",
    "previous": "previous",
    "always": "always",
    "sometimes": "sometimes",
    "often": "often",
    "usually": "usually",
    "most": "most",
    "other": "other",
    "another": "other",
    "same": "same",
    "or": "or",
    "again": "again",
    "still": "still",
    "already": "already",
    "yet": "yet",
    "too": "too",
    "also": "too",
    "even": "even",
    "entire": "whole",
    "whole": "whole",
}
"""How much of it; those with one value say the same."""

COMPARATIVES = _each(
    "more less fewer most least maximum minimum larger largest smaller smallest bigger biggest greater greatest "
    "lower lowest higher highest longer longest shorter shortest faster fastest slower slowest newer newest older "
    "oldest better best worse worst earlier earliest later cheaper cheapest safer safest stronger weaker easier "
    "easiest harder hardest simpler simplest"
)

_COUNTED = (
    "zero one two three four five six seven eight nine ten eleven twelve "
    "thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty"
)
NUMERALS = {word: str(number) for number, word in enumerate(_COUNTED.split())} | {
    "thirty": "30",
    "forty": "40",
    "fifty": "50",
    "sixty": "60",
    "seventy": "70",
    "eighty": "80",
    "ninety": "90",
    "hundred": "100",
    "thousand": "1000",
    "million": "1000000",
    "billion": "1000000000",
    "once": "1x",
    "twice": "2x",
    "single": "1",
    "half": "0.5",
    "quarter": "0.25",
    "dozen": "12",
    "second": "second",
    "third": "3rd",
    "fourth": "4th",
    "fifth": "5th",
}

UNITS = {
    "ms": "ms millisecond milliseconds msec",
    "s": "s sec secs seconds",
    "min": "min mins minute minutes",
    "h": "h hr hrs hour hours",
    "d": "d day days",
    "week": "week weeks",
    "month": "month months",
    "year": "year years",
    "b": "byte bytes",
    "bit": "bit bits",
    "kb": "kb kib kilobyte kilobytes",
    "mb": "mb mib megabyte megabytes",
    "gb": "gb gib gigabyte gigabytes",
    "tb": "tb tib terabyte terabytes",
    "kg": "kg kilo kilos kilogram kilograms",
    "g": "gram grams",
    "km": "km kilometre kilometres kilometer kilometers",
    "mile": "mile miles",
    "cm": "cm centimetre centimetres",
    "metre": "metre metres meter meters",
    "%": "% percent",
    "gbp": "£ pound pounds gbp",
    "usd": "$ dollar dollars usd",
    "eur": "€ euro euros eur",
    "am": "am",
    "pm": "pm",
    "hz": "hz hertz",
    "px": "px pixel pixels",
    "token": "token tokens",
}

DATES = _each(
    "january february march april june july august september october november december jan feb mar apr jun jul "
    "aug sep sept oct nov dec monday tuesday wednesday thursday friday saturday sunday mondays tuesdays "
    "wednesdays thursdays fridays saturdays sundays today tomorrow yesterday tonight now morning afternoon "
    "evening night noon midnight weekend weekday weekends weekdays daily weekly monthly yearly annual annually "
    "hourly nightly spring summer autumn winter christmas easter"
)
"""Not "may", which is a verb more often, and refuses nothing worse than a pair that has it on one side."""

PAST = _each("was were did had been")
FUTURE = _each("will shall")

RELATIONS = {
    "to": "to",
    "into": "to",
    "onto": "to",
    "towards": "to",
    "from": "from",
    "before": "before",
    "after": "after",
    "until": "until",
    "till": "until",
    "since": "since",
    "than": "than",
    "over": "over",
    "under": "under",
    "above": "above",
    "below": "below",
    "against": "against",
    "within": "within",
    "during": "during",
    "inside": "inside",
    "outside": "outside",
    "like": "like",
    "instead": "instead",
    "through": "through",
    "across": "across",
    "around": "around",
    "behind": "behind",
    "beyond": "beyond",
    "near": "near",
    "per": "per",
    "because": "because",
    "while": "while",
    "when": "when",
    "then": "then",
    "if": "if",
}
"""Words that give what follows them its place: it has to be the same one in both questions."""

LINKS = _each("of in on at for by with using via about as")
"""These too, but people put one for another ("in Python", "with Python", "Python's")."""

KINDS = {
    "what": "what",
    "which": "what",
    "explain": "what",
    "describe": "what",
    "define": "what",
    "how": "how",
    "why": "why",
    "when": "when",
    "where": "where",
    "who": "who",
    "whose": "whose",
    "can": "can",
    "could": "can",
    "may": "can",
    "should": "should",
    "ought": "should",
    "must": "must",
    "is": "is",
    "are": "is",
    "am": "is",
    "was": "is",
    "were": "is",
    "do": "do",
    "does": "do",
    "did": "do",
    "have": "have",
    "has": "have",
    "had": "have",
    "will": "will",
    "would": "would",
}
"""By what a question begins with, what is asked for; in a question of another kind these say nothing."""

MEASURES = _each("much many long often far old big large fast high deep soon quickly likely")
"""Behind "how"; a question of its own."""

JOINTS = _each("and or vs versus")
"""What stands on either side of them may change places."""

ARTICLES = _each("a an the this that these those my our your its s")
"""Belong to the word behind them, and say nothing more once persons are compared."""

EMPTY = _each(
    "it there here i me we us you be is are am was were been being do does did doing done have has had having can "
    "could would will shall may might should must ought"
)
"""Say nothing more once kind, person and tense are compared; a new part of the sentence begins with them."""

PERSONS = {"my": "me", "mine": "me", "our": "me", "your": "you", "yours": "you"}
"""Whose it is: "my" and "your" are not one; "the" goes with either."""
