"""Dictionary lookup, the synthetic task of the Focused Transformer (paper, section 4.5 and appendix F).

A document has two chunks. The first defines: <k> k1 k2 k3 k4 <v> v1 v2 v3 v4, ten tokens a record. The second asks about the
same keys: <q> k1 k2 k3 k4 <v> v1 v2 v3 v4. Only the values of the questions are scored. With 64 content tokens
there are 16.8 million keys, so that a memory of 26,000 definitions (262,144 tokens) is still unambiguous.
"""

from __future__ import annotations

import torch

from ..errors import LcxError

BOS, DEFINE, ASK, VALUE = range(4)  # <bos>, <k>, <q>, <v>
CONTENT = range(4, 68)
VOCAB_SIZE = 68
KEY = 4  # tokens of a key and of a value
RECORD = 2 * KEY + 2


def dictionary(
    documents: int, chunk: int, keys: int | None = None, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make documents of two chunks. Returns (input_ids, labels), both int64 [documents, 2, chunk].

    Each chunk is BOS, then as many records as fit, then BOS to fill it up: definitions in the first, questions about
    them in another order in the second. keys: different keys in a document (default: as many as records fit); with
    fewer, definitions and questions repeat. No key is used by two documents of one call. labels equal input_ids on the
    values of the questions (where a question repeats, of the first) and are -100 elsewhere; they are not shifted
    (transformers shifts them itself).
    generator: a torch.Generator on the CPU; None takes a new one with seed 0. No global state is read or changed.

    Raises LcxError if no record fits into a chunk, if `keys` do not fit, or if there are not as many keys.
    """
    records = (chunk - 1) // RECORD
    if documents < 1 or records < 1:
        raise LcxError(f"chunk {chunk} is too short for a record: use at least {RECORD + 1} tokens")
    keys = records if keys is None else keys
    if not 1 <= keys <= records:
        raise LcxError(f"{keys} keys do not fit: a chunk of {chunk} tokens holds 1 to {records}")
    keys_there_are = len(CONTENT) ** KEY
    if documents * keys > keys_there_are // 4:
        raise LcxError(
            f"{documents} documents need {documents * keys} keys: use at most {keys_there_are // 4}"
        )
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    wanted = documents * keys
    # Draw more than are wanted and leave out what came twice: much cheaper than a permutation of all keys.
    numbers = torch.randint(keys_there_are, (2 * wanted,), generator=generator).unique()
    numbers = numbers[torch.rand(len(numbers), generator=generator).argsort()][:wanted]
    places = len(CONTENT) ** torch.arange(KEY)
    key = (CONTENT.start + numbers[:, None] // places % len(CONTENT)).view(documents, keys, KEY)
    value = torch.randint(CONTENT.start, CONTENT.stop, key.shape, generator=generator)
    which = torch.arange(records).expand(documents, records) % keys
    asked = which.gather(1, torch.rand(documents, records, generator=generator).argsort(1))

    input_ids = torch.full((documents, 2, chunk), BOS)
    labels = torch.full_like(input_ids, -100)
    for half, (mark, chosen) in enumerate([(DEFINE, which), (ASK, asked)]):
        pick = chosen[..., None].expand(-1, -1, KEY)
        marks = [torch.full((documents, records, 1), m) for m in (mark, VALUE)]
        body = torch.cat([marks[0], key.gather(1, pick), marks[1], value.gather(1, pick)], -1).flatten(1)
        input_ids[:, half, 1 : 1 + body.shape[1]] = body
    # A question asked before in the same chunk could be answered from there, so only the first is scored.
    again = (asked[:, :, None] == asked[:, None, :]).tril(-1).any(-1)[..., None]
    scored = labels[:, 1, 1 : 1 + records * RECORD].view(documents, records, RECORD)
    scored[..., -KEY:] = value.gather(1, asked[..., None].expand(-1, -1, KEY)).masked_fill(again, -100)
    return input_ids, labels
