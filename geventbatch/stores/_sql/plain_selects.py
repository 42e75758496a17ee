"""Which SELECTs change nothing and lock nothing, by their text. Imports no vendor."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

from geventbatch.stores._sql.statements import code_of, reads

_LOCKING: Final = re.compile(r"\bFOR (?:(?:NO KEY )?UPDATE|(?:KEY )?SHARE)\b|\bLOCK IN SHARE MODE\b")
_INTO: Final = re.compile(r"\bINTO\b")
_CALLED: Final = re.compile(r"\b([^\W\d][\w.]*)\s*\(")
"""With its schema, in which a function of any name may be the user's own."""

_WORDS: Final = (
    "ALL AND ANY ARRAY AS BETWEEN BY CASE CUBE DISTINCT ELSE EXCEPT EXISTS FILTER FROM GROUP HAVING IN INTERSECT "
    "IS JOIN LATERAL LIKE LIMIT MATERIALIZED NOT OFFSET ON OR OVER ROLLUP ROW SELECT SETS SOME THEN UNION USING "
    "VALUES WHEN WHERE WITHIN"
)
"""Words that stand before a bracket."""

_TYPES: Final = (
    "BINARY BIT CHAR CHARACTER DATETIME DECIMAL FLOAT INTERVAL NUMERIC NVARCHAR TIME TIMESTAMP VARBINARY VARCHAR "
    "VARYING"
)
"""Types with a length."""

_FUNCTIONS: Final = (
    "ABS AGE ARRAY_AGG ARRAY_LENGTH AVG BOOL_AND BOOL_OR CAST CEIL CEILING CHAR_LENGTH COALESCE CONCAT CONCAT_WS "
    "COUNT CURRENT_DATE CURRENT_TIMESTAMP DATE DATE_ADD DATE_FORMAT DATE_PART DATE_SUB DATE_TRUNC DENSE_RANK "
    "EXTRACT FIRST_VALUE FLOOR GREATEST GROUP_CONCAT IF IFNULL JSONB_AGG JSONB_ARRAY_LENGTH JSONB_EXTRACT_PATH "
    "JSONB_EXTRACT_PATH_TEXT JSON_AGG JSON_ARRAY_LENGTH JSON_CONTAINS JSON_EXTRACT JSON_EXTRACT_PATH "
    "JSON_EXTRACT_PATH_TEXT JSON_LENGTH JSON_QUOTE JSON_UNQUOTE JSON_VALUE JULIANDAY LAG LAST_VALUE LEAD LEAST "
    "LEFT LENGTH LOWER LTRIM MAX MD5 MIN MOD NOW NULLIF POSITION POWER RANDOM RANK REPLACE RIGHT ROUND ROW_NUMBER "
    "RTRIM SIGN SPLIT_PART SQRT STRFTIME STRING_AGG SUBSTR SUBSTRING SUM TIMEZONE TO_CHAR TO_DATE TO_TIMESTAMP "
    "TO_TSQUERY TO_TSVECTOR TRIM TRUNC UNIX_TIMESTAMP UNNEST UPPER"
)
"""Functions of the databases' own that only compute."""

_HARMLESS: Final = frozenset(f"{_WORDS} {_TYPES} {_FUNCTIONS}".split())


@lru_cache(maxsize=1024)
def why_not_plain(statement: str) -> str | None:
    """Return why *statement*, a SELECT, may change or lock something, after "which"; None if it does not.

    A function counts as one that may, unless it is known: whether it does stands in no text. Switches: no.
    """
    code = code_of(statement)
    if _LOCKING.search(code):
        return "locks what it selects"
    if not reads(statement) or _INTO.search(code):
        return "writes"
    unknown = set(_CALLED.findall(code)) - _HARMLESS
    return f"calls {min(unknown).lower()}(), and may write or lock by that" if unknown else None
