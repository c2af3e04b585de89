"""Chapter 6: dictionary lookup (Focused Transformer, section 4.5 and figure 10) by the number of definitions in the memory."""

from __future__ import annotations

from typing import Any

from . import measurement
from .needle_memory import by_size


def definitions(documents: int, generator):
    """input_ids and labels [documents, 2, 64]: six definitions in the first chunk, asked for in the second."""
    from ..tasks.dictionary import dictionary
    from ..zoo.recipes.dictionary import CHUNK

    return dictionary(documents, CHUNK, generator=generator)


@measurement("dictionary-lookup", model=None, seed=0)
def dictionary_lookup() -> dict[str, Any]:
    """Values found among up to 24,576 definitions (262,144 tokens) by three models, dense and top-k."""
    from ..tasks.dictionary import KEY, RECORD
    from ..zoo.recipes.dictionary import CHUNK

    models = [(name, 0) for name in ("dictionary", "dictionary-d1", "dictionary-plain")]
    measured = by_size("dictionary-lookup", models, make=definitions, answer=KEY)
    each = (CHUNK - 1) // RECORD
    return {**measured, "rows": [{**r, "entries": each * r["documents"]} for r in measured["rows"]]}
