"""Forms that an answer may have to take, in plain data. Standard library only."""

from __future__ import annotations

from typing import Final

JSON_SCHEMA, JSON_OBJECT, REGEX, LARK = "json_schema", "json_object", "regex", "lark"
KINDS: Final = (JSON_SCHEMA, JSON_OBJECT, REGEX, LARK)
# Between the parts of a JSON text: nothing, a blank, or a line break and its indentation. Without a bound, a model
# that has nothing to say goes on with blanks.
BETWEEN: Final = r"( |\n[ \t]{0,32})?"
