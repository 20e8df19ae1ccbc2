"""Whether two SQL queries say the same: as text, and by what SQLite answers.

By text: case and spaces outside of quotes and a semicolon at the end do not count; everything else does, the
kind of quotes too.

By execution (in the manner of Zhong et al., "Semantic Evaluation for Text-to-SQL with Distilled Test Suites",
2020): the prompt's tables are made in memory, several times with different rows, and both queries must give
the same rows every time: as often each, in the same order where the reference has ORDER BY, columns in the
same order, numbers to six places. There are no real rows to ask; the made ones have, column by column, the
values that either query compares that column with, values next to these, and from a small pool, so that
joins find partners, others. No value is NULL. Where the reference fails, or finds nothing anywhere (no rows,
or only zeros), execution says nothing about a query and the text decides.
"""

from __future__ import annotations

import random
import re
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from contextlib import closing
from typing import Any

_TOKEN = re.compile(
    r"""'(?:[^']|'')*'|"(?:[^"]|"")*"|`[^`]*`|\d+\.\d+|\w+|<=|>=|<>|!=|==|\|\||\S""", re.UNICODE
)
_CREATE = re.compile(r"\bCREATE\s+TABLE\b", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d+(\.\d+)?")
_NUM_DATABASES = 5
_NUM_ROWS = 60  # of each table, less those whose key is taken
_NUM_COMMON = 24  # values that any column may have
_LITERAL_SHARES = (0.5, 1.0)  # of a row's values, where a query compares the column with something
_STEPS = (0, 1, -1)  # from a number in a query to those that are tried
_MAX_INSTRUCTIONS = 2_000_000  # of SQLite's machine for a query; not a time, so that every machine agrees
_MAX_BYTES = 1_000_000  # of a text or statement
_READING = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION)
_FAILURES = (sqlite3.Error, sqlite3.Warning, ValueError)  # ValueError: a zero byte, half a character

Literals = dict[str, list[str]]


def normalise(query: str) -> str:
    """A query in the form in which texts are compared."""
    tokens = [token if token[0] in "'\"`" else token.lower() for token in _TOKEN.findall(query)]
    while tokens and tokens[-1] == ";":
        tokens.pop()
    return " ".join(tokens)


def exact_match(answer: str, reference: str) -> bool:
    """Whether two queries are the same text."""
    return normalise(answer) == normalise(reference)


def create_statements(prompt: str) -> list[str]:
    """The CREATE TABLE statements in a text, each up to its closing parenthesis."""
    statements = []
    for match in _CREATE.finditer(prompt):
        depth = 0
        for token in _TOKEN.finditer(prompt, match.start()):
            depth += {"(": 1, ")": -1}.get(token[0], 0)
            if token[0] == ")" and depth == 0:
                statements.append(prompt[match.start() : token.end()])
                break
    return statements


def execution_match(prompt: str, answer: str, reference: str) -> bool:
    """Whether two queries give the same rows on the tables that a prompt has statements for."""
    statements = create_statements(prompt)
    says_something = False
    for seed in range(_NUM_DATABASES):
        try:
            database = _database(statements, (reference, answer), seed)
        except _FAILURES:
            break
        with closing(database):
            try:
                expected = _rows(database, reference)
            except _FAILURES:
                break
            try:
                got = _rows(database, answer)
            except _FAILURES:
                return False
        if got != expected and (_is_ordered(reference) or Counter(got) != Counter(expected)):
            return False
        says_something |= any(value not in (None, 0) for row in expected for value in row)
    return says_something or exact_match(answer, reference)


def _database(statements: Sequence[str], queries: Sequence[str], seed: int) -> sqlite3.Connection:
    """Tables in memory with rows that make a difference to these queries; from here on it is only read."""
    database = sqlite3.connect(":memory:")
    for statement in statements:
        database.execute(statement)
    names = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    shapes = {name: database.execute(f"PRAGMA table_info({_quoted(name)})").fetchall() for name in names}
    columns = {column.lower() for shape in shapes.values() for _, column, *_ in shape}
    literals: Literals = defaultdict(list)
    for query in queries:
        _find_literals(query, columns, literals)
    rng = random.Random(seed)
    for name, shape in shapes.items():
        marks = ", ".join("?" * len(shape))
        rows = [
            _row(rng, [literals.get(column.lower(), []) for _, column, *_ in shape]) for _ in range(_NUM_ROWS)
        ]
        database.executemany(f"INSERT OR IGNORE INTO {_quoted(name)} VALUES ({marks})", rows)
    database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_BYTES)
    database.set_authorizer(
        lambda action, *_: sqlite3.SQLITE_OK if action in _READING else sqlite3.SQLITE_DENY
    )
    return database


def _rows(database: sqlite3.Connection, query: str) -> list[tuple[Any, ...]]:
    """What a query gives, within the limit."""
    left = _MAX_INSTRUCTIONS // 1000

    def is_over() -> bool:
        nonlocal left
        left -= 1
        return left < 0

    database.set_progress_handler(is_over, 1000)
    return [
        tuple(round(value, 6) if isinstance(value, float) else value for value in row)
        for row in database.execute(query)
    ]


def _find_literals(query: str, columns: Collection[str], found: Literals) -> None:
    """Adds each literal of a query to the column that was named last before it."""
    column, sign = "", ""
    for token in _TOKEN.findall(query):
        name = token.strip('"`').lower()
        if name in columns:
            column = name
        elif token[0] in "'\"":
            text = token[1:-1].replace(token[0] * 2, token[0])
            found[column] += [text, text.strip("%")]  # as a text, and as LIKE looks for it
        elif _NUMBER.fullmatch(token):
            found[column].append(sign + token)
        sign = "-" if token == "-" else ""


def _row(rng: random.Random, literals: Sequence[Sequence[str]]) -> list[str]:
    """A value for each column, near one of the literals that it is compared with or a common one.

    All are texts; a column of numbers makes numbers of those that look like it. Most numbers of a row lie on
    the same side of their literals, so that some rows fulfil several conditions at once.
    """
    share, side = rng.choice(_LITERAL_SHARES), rng.choice(_STEPS)
    row = []
    for of_column in literals:
        value = str(rng.randrange(_NUM_COMMON))
        if of_column and rng.random() < share:
            literal = rng.choice(of_column)
            if _NUMBER.fullmatch(literal):
                value = f"{float(literal) + rng.choice((side, side, *_STEPS)):.15g}"
            else:
                value = rng.choice((literal, literal, f"{literal} b", f"a {literal}"))
        row.append(value)
    return row


def _is_ordered(query: str) -> bool:
    depth = 0
    for token in _TOKEN.findall(query):
        depth += {"(": 1, ")": -1}.get(token, 0)
        if depth == 0 and token.upper() == "ORDER":
            return True
    return False


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
