"""What turns an answer round is seen, whatever the vectors say; what says nothing is not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfhost_cli.proxy.cache.semantic.guards import GUARDS, reasons, refuse

TRAPS = {
    "identifier": [
        ("What does git reset --soft do?", "What does git reset --hard do?"),
        ("Explain src/auth/login.py", "Explain src/auth/logout.py"),
        ("What does chmod -r do?", "What does chmod -R do?"),
        ("Explain useEffect", "Explain useMemo"),
        ("What does `sort` return?", "What does `sorted` return?"),
    ],
    "number": [
        ("Set the request timeout to 30 s", "Set the request timeout to 300 s"),
        ("Wait 30 seconds between retries", "Wait 30 minutes between retries"),
        ("Does Python 3.1 support match?", "Does Python 3.10 support match?"),
        ("Should we deploy on Friday?", "Should we deploy on Monday?"),
        ("Retry the call three times", "Retry the call five times"),
        ("Set x to 5 and y to 6", "Set x to 6 and y to 5"),
    ],
    "negation": [
        ("Why does this test fail?", "Why does this test not fail?"),
        ("Go ahead and delete the branch", "Don't go ahead and delete the branch"),
        ("How do I run the tests with coverage?", "How do I run the tests without coverage?"),
    ],
    "quantifier": [
        ("Do all browsers support WebP?", "Do any browsers support WebP?"),
        ("Explain the last commit", "Explain the first commit"),
        ("Should I use tabs or spaces?", "Should I use tabs and spaces?"),
    ],
    "comparative": [
        ("Find the largest file in the folder", "Find the smallest file in the folder"),
        ("Use more memory for the cache", "Use less memory for the cache"),
    ],
    "kind": [
        ("How do I use a semaphore in asyncio?", "Why do I use a semaphore in asyncio?"),
        ("Can I delete this?", "Should I delete this?"),
        ("How many users does it have?", "How long does it have users?"),
    ],
    "tense": [("Why does this test fail?", "Why did this test fail?")],
    "person": [("What is your password?", "What is my password?")],
    "name": [("How do I create an index in Postgres?", "How do I create an index in Oracle?")],
    "antonym": [
        ("Add type hints to this module", "Remove type hints from this module"),
        ("How do I encrypt a file?", "How do I decrypt a file?"),
        ("How do I stage a file?", "How do I unstage a file?"),
    ],
    "word": [("Run the unit tests", "Run the integration tests"), ("Explain recursion", "Explain iteration")],
    "direction": [
        ("Rename getUser to fetchUser in this function", "Rename fetchUser to getUser in this function"),
        ("Migrate the schema from Postgres to SQLite", "Migrate the schema from SQLite to Postgres"),
        ("Should I call flush before close?", "Should I call close before flush?"),
        ("Replace tabs with spaces", "Replace spaces with tabs"),
        ("Does the client call the server?", "Does the server call the client?"),
        ("Only Alice may edit the file of Bob", "Alice may edit only the file of Bob"),
        ("Use more memory and less disk", "Use less memory and more disk"),
    ],
}
SAME = [
    ("How do I exit vim?", "how to exit vim"),
    ("How do I exit vim?", "  HOW do I\n quit   vim ?! "),
    ("How do I delete a remote branch in git?", "How can I remove a remote git branch?"),
    ("How do I convert a list to a tuple in Python?", "How do I convert a Python list to a tuple?"),
    ("In Python, how do I sort a dict by value?", "How do I sort a dictionary by value in Python?"),
    ("Explain the difference between TCP and UDP", "What's the difference between UDP and TCP?"),
    ("Wait 30 seconds between the calls", "Please wait 30s between the calls, thanks"),
    ("Summarise this error in one sentence", "Summarize this error in 1 sentence"),
    ("What is dependency injection?", "dependency injection, what is it?"),
]
SOME = (
    "how do i what is the a not never all only rename getUser fetchUser from to before in with 30 300 s --force -r -R "
    "src/a.py Postgres SQLite add remove more less why did can my your and or ? , yes please tests running it's"
)
PROSE = "how do i exit vim in the shell of my laptop"
WORDS = st.sampled_from(SOME.split())
TEXTS = st.one_of(st.lists(WORDS, max_size=12).map(" ".join), st.text(max_size=60))


@pytest.mark.parametrize(("guard", "known", "asked"), [(name, *pair) for name in TRAPS for pair in TRAPS[name]])
def test_each_trap_is_refused_and_the_reason_named(guard: str, known: str, asked: str) -> None:
    assert refuse(asked, known) == guard


@pytest.mark.parametrize("guard", GUARDS)
def test_every_guard_has_a_trap_that_no_other_guard_refuses(guard: str) -> None:
    assert any(list(reasons(asked, known)) == [guard] for known, asked in TRAPS[guard])


@pytest.mark.parametrize(("known", "asked"), SAME)
def test_what_says_the_same_in_other_words_is_let_through(known: str, asked: str) -> None:
    assert refuse(asked, known) == ""


@given(TEXTS)
def test_nothing_speaks_against_the_very_same_question(text: str) -> None:
    assert refuse(text, text) == ""


@given(TEXTS)
def test_blanks_make_no_difference(text: str) -> None:
    assert refuse(" \n ".join(text.split()), f"  {text} ") == ""


@given(TEXTS, TEXTS)
def test_it_is_the_same_either_way_round(one: str, other: str) -> None:
    assert refuse(one, other) == refuse(other, one)
    assert refuse(one, other) in ("", *GUARDS)


@given(
    st.lists(
        st.sampled_from(["how", "do", "i", "exit", "vim", "in", "the", "shell", "of", "my", "laptop"]), max_size=10
    ).map(" ".join)
)
def test_capitals_make_no_difference_in_prose(text: str) -> None:
    assert refuse(text.capitalize(), text) == ""


def test_a_misspelt_word_is_one_that_is_no_word_and_can_be_only_one() -> None:
    words = {"meter", "address", "difference", "debit", "debt", "prism", "australia", "austria", "capital"}
    assert refuse("What is the diffrence?", "What is the difference?", words) == ""
    assert refuse("What is the diffrence?", "What is the difference?") == "word"
    assert refuse("What is a debt?", "What is a debit?", words) == "word"
    assert refuse("What is prisma?", "What is prism?", words) == "word"
    assert refuse("Capital of Austria?", "Capital of Australia?", words) == "name"


def test_a_long_text_is_read_in_no_time() -> None:
    # fails by the time limit of the tests when a pattern backtracks
    for text in ("how " * 5000, "a" * 20000, "a, how " * 3000, "((((" * 5000, "-" * 20000, "1." * 9000):
        assert refuse(text, f"{text}x") in ("", *GUARDS)
