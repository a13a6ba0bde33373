"""Text in a CSV file, so that a spreadsheet shows it and computes nothing.

Spreadsheets take a cell that begins with one of FORMULA_STARTS for a formula, and a sweep's name
or the message of an error is whatever someone wrote (OWASP, CSV injection). Such text begins with
an apostrophe here; numbers, also those that are recorded as text, stay as they are. The function
`csv` of page.js does the same.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def inert(table: pd.DataFrame) -> pd.DataFrame:
    """The table with an apostrophe before each text that would be a formula."""
    texts = [name for name, kind in table.dtypes.items() if pd.api.types.is_string_dtype(kind)]
    return table.assign(**{str(name): table[name].map(_inert) for name in texts})


def _inert(value: Any) -> Any:
    if not isinstance(value, str) or not value.startswith(FORMULA_STARTS):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value
