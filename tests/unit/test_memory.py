"""The memory against a plain float64 softmax over everything that was ever appended."""

from __future__ import annotations

import errno
import math
import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lcx import lookup
from lcx.errors import CorruptFileError, LcxError
from lcx.memory import Memory, attend, merge

D, SCALE = 6, 0.4
MODEL = {"hidden_size": 64, "memory_layers": (1, 3), "weights": "ab12"}


def normal(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def slots(tokens: int, *, rows=2, heads=2, layers=(1, 3), seed=0, dtype=torch.float64, width=D):
    return {
        i: (
            normal(rows, heads, tokens, width, seed=1000 * seed + 2 * i, dtype=dtype),
            normal(rows, heads, tokens, width, seed=1000 * seed + 2 * i + 1, dtype=dtype),
        )
        for i in layers
    }


def joined(pieces):
    """Several appends as one."""
    return {i: tuple(torch.cat([p[i][j] for p in pieces], 2) for j in (0, 1)) for i in pieces[0]}


def plain(q, k, v, mask=None):
    """Softmax over all slots at once, heads repeated, in float64: an own definition, nothing of lcx in it."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1).expand(len(q), -1, -1, -1) for x in (k, v))
    scores = torch.einsum("bhtd,bhsd->bhts", q, k) * SCALE
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -math.inf)
    out = scores.softmax(-1).nan_to_num(0) @ v  # a row of -inf is NaN in torch's softmax, and nothing in ours
    return out, scores.logsumexp(-1)


def filled(*pieces, mask=None, **options) -> Memory:
    memory = Memory((1, 3), **{"page_tokens": 4, **options})
    start = 0
    for piece in pieces:
        n = piece[1][0].shape[2]
        memory.append(piece, None if mask is None else mask[:, start : start + n])
        start += n
    return memory


def same(found, wanted, tolerance=1e-12):
    for a, b in zip(found, wanted, strict=True):
        assert not a.isnan().any()
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance)


QUERIES = normal(2, 4, 3, D, seed=99)
PIECES = [slots(n, seed=s) for s, n in enumerate((3, 1, 11, 4))]
ALL = joined(PIECES)


# Attention over a tile, and joining tiles ---------------------------------------------------------------------------


def test_tiles_merge_into_one_softmax_with_gradients():
    leaves = [x.clone().requires_grad_() for x in (QUERIES, *ALL[1])]
    mask = torch.rand(2, 1, 3, 19, generator=torch.Generator().manual_seed(0)) > 0.4
    mask[0, :, 1] = False  # a query that sees nothing

    def tiled(q, k, v):
        cuts = (slice(0, 4), slice(4, 5), slice(5, 19))
        return merge([attend(q, k[:, :, c], v[:, :, c], SCALE, mask[..., c]) for c in cuts])

    out, lse = tiled(*leaves)
    same((out, lse), attend(*leaves, SCALE, mask))
    assert (out[0, :, 1] == 0).all() and (lse[0, :, 1] == -math.inf).all()

    def finite(q, k, v):
        out, lse = tiled(q, k, v)
        return out, lse.masked_fill(lse.isneginf(), 0)

    assert torch.autograd.gradcheck(finite, leaves)


def test_half_precision_tiles_are_accumulated_in_float32():
    q, (k, v) = QUERIES.bfloat16(), (x.bfloat16() for x in ALL[1])
    out, lse = attend(q, k, v, SCALE)
    assert out.dtype == lse.dtype == torch.float32
    same((out, lse), plain(q, k, v), 1e-5)


# The memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [1, 3])
def test_memory_equals_softmax_over_the_concatenation(layer):
    memory = filled(*PIECES)
    assert len(memory) == 19 and len(memory.segments) == 5
    same(memory.attend(layer, QUERIES, SCALE), plain(QUERIES, *ALL[layer]))


def test_tile_size_changes_nothing(monkeypatch):
    monkeypatch.setattr(lookup, "SCORES", 1)
    same(filled(*PIECES, page_tokens=7).attend(1, QUERIES, SCALE), plain(QUERIES, *ALL[1]))
    best = filled(*PIECES, page_tokens=7, top_k=5).attend(1, QUERIES, SCALE)
    monkeypatch.undo()
    same(best, filled(*PIECES, page_tokens=7, top_k=5).attend(1, QUERIES, SCALE))


def test_empty_memory_and_empty_append():
    memory = Memory((1, 3))
    out, lse = memory.attend(1, QUERIES, SCALE)
    assert out.shape == QUERIES.shape and (out == 0).all() and (lse == -math.inf).all()
    memory.append(slots(0))
    assert len(memory) == memory.nbytes == memory.bytes_per_token == 0 and not memory.segments


@pytest.mark.parametrize("top_k", [None, 5])
def test_order_of_slots_changes_nothing(top_k):
    order = torch.randperm(19, generator=torch.Generator().manual_seed(1))
    shuffled = {i: tuple(x[:, :, order] for x in pair) for i, pair in ALL.items()}
    one, other = filled(ALL, top_k=top_k), filled(shuffled, top_k=top_k)
    same(one.attend(3, QUERIES, SCALE), other.attend(3, QUERIES, SCALE))


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_k": 5, "lookup": "faiss"}])
def test_masked_slots_are_absent_slots(options):
    """Per row: each row of a masked memory is what a memory of its remaining slots alone would answer."""
    mask = torch.rand(2, 19, generator=torch.Generator().manual_seed(2)) > 0.5
    out, lse = filled(*PIECES, mask=mask, **options).attend(1, QUERIES, SCALE)
    for row in (0, 1):
        kept = {i: tuple(x[row : row + 1, :, mask[row]] for x in pair) for i, pair in ALL.items()}
        wanted = filled(kept, **options).attend(1, QUERIES[row : row + 1], SCALE)
        # faiss ranks in float32; with pages this small it looks into every list
        same((out[row : row + 1], lse[row : row + 1]), wanted, 1e-5 if "lookup" in options else 1e-12)


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_k": 2, "lookup": "faiss"}])
def test_a_row_without_slots_gives_zero_and_no_nan(options):
    mask = torch.ones(2, 19, dtype=torch.bool)
    mask[1] = False
    out, lse = filled(*PIECES, mask=mask, **options).attend(1, QUERIES, SCALE)
    assert (out[1] == 0).all() and (lse[1] == -math.inf).all()
    assert out[0].isfinite().all() and lse[0].isfinite().all()


def test_duplicating_all_slots_adds_a_logarithm():
    once, thrice = filled(ALL).attend(1, QUERIES, SCALE), filled(ALL, ALL, ALL).attend(1, QUERIES, SCALE)
    same(thrice, (once[0], once[1] + math.log(3)))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 1), (6, 2)])
def test_grouped_queries(heads, kv_heads):
    kv, q = slots(9, heads=kv_heads), normal(2, heads, 3, D, seed=5)
    same(filled(kv).attend(1, q, SCALE), plain(q, *kv[1]))
    same(filled(kv, top_k=8).attend(1, q, SCALE), best_of(q, *kv[1], 8))


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_k": 5, "lookup": "faiss"}])
def test_one_row_answers_many_and_is_shared_by_rows_that_follow(options):
    one, more = slots(9, rows=1, seed=7), slots(5, rows=3, seed=8)
    q = normal(3, 4, 2, D, seed=9)
    memory = filled(one, **options)
    tolerance = 1e-5 if "lookup" in options else 1e-12
    k, v = one[1]
    same(memory.attend(1, q, SCALE), best_of(q, k, v, 5 if options else 9), tolerance)
    memory.append(more)
    k, v = (torch.cat([a.expand(3, -1, -1, -1), b], 2) for a, b in zip(one[1], more[1], strict=True))
    same(memory.attend(1, q, SCALE), best_of(q, k, v, 5 if options else 14), tolerance)
    assert memory.nbytes == (9 + 3 * 5) * memory.bytes_per_token  # the shared row is stored once


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 5e-3), (torch.bfloat16, 3e-2)]
)
def test_storage_dtype(dtype, tolerance):
    memory = filled(*PIECES, dtype=dtype)
    assert memory.segments[0].page.kv[1].dtype == dtype
    same(memory.attend(1, QUERIES.float(), SCALE), plain(QUERIES, *ALL[1]), tolerance)
    rounded = [x.to(dtype) for x in ALL[1]]
    same(memory.attend(1, QUERIES, SCALE), plain(QUERIES, *rounded))  # only storage rounds


@pytest.mark.parametrize(("width", "wanted"), [(100, 38_400), (128, 49_152)])
def test_bytes_per_token_of_the_published_models(width, wanted):
    """LongLLaMA 3B and 7B, three memory layers of 32 heads, in bf16."""
    layers = (6, 12, 18)
    memory = Memory(layers, dtype=torch.bfloat16, page_tokens=2)
    memory.append(slots(3, rows=1, heads=32, layers=layers, width=width, dtype=torch.float32))
    assert memory.bytes_per_token == wanted and memory.nbytes == 3 * wanted
    allocated = sum(x.nbytes for s in memory.segments for x in s.page.kv.values())
    assert allocated == 4 * wanted


def test_what_is_appended_is_copied_and_detached():
    kv = {i: tuple(x.clone().requires_grad_() for x in pair) for i, pair in ALL.items()}
    memory = filled(kv)
    for pair in kv.values():
        for x in pair:
            x.data.zero_()
    out, lse = memory.attend(1, QUERIES.clone().requires_grad_(), SCALE)
    assert not out.requires_grad and not lse.requires_grad
    same((out, lse), plain(QUERIES, *ALL[1]))


# Growth -------------------------------------------------------------------------------------------------------------


class Traffic(TorchDispatchMode):
    """Bytes of every tensor that an operation newly makes or writes; views cost nothing."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.nbytes += out.nbytes
        return out


@pytest.mark.parametrize(
    "options", [{}, {"tier": "host"}, {"tier": "disk"}, {"max_tokens": 40}, {"top_k": 4}]
)
def test_appending_costs_the_same_however_full_the_memory_is(options):
    memory, window, costs = Memory((1, 3), page_tokens=8, **options), slots(8), []
    for _ in range(64):
        with Traffic() as traffic:
            memory.append(window)
        costs.append(traffic.nbytes)
    stored = 8 * 2 * memory.bytes_per_token  # 8 slots of 2 rows
    assert len(set(costs)) == 1 and stored <= costs[0] <= 2 * stored, costs


def test_pages_never_move():
    memory = filled(*PIECES)
    before = [x.data_ptr() for s in memory.segments for x in s.page.kv.values()]
    memory.append(slots(30, seed=5))
    assert [x.data_ptr() for s in memory.segments for x in s.page.kv.values()][: len(before)] == before


@pytest.mark.parametrize("limit", [1, 4, 10, 18])
def test_the_oldest_slots_are_evicted(limit):
    memory = Memory((1, 3), page_tokens=4, max_tokens=limit)
    for n, piece in enumerate(PIECES):
        memory.append(piece)
        seen = joined(PIECES[: n + 1])
        kept = [x[:, :, -limit:] for x in seen[1]]
        assert len(memory) == kept[0].shape[2]
        same(memory.attend(1, QUERIES, SCALE), plain(QUERIES, *kept))
        assert 4 * len(memory.segments) <= limit + 2 * 4  # whole pages are given back


def test_eviction_under_faiss_finds_no_evicted_slot():
    memory = filled(*PIECES, top_k=5, lookup="faiss", max_tokens=14)
    same(memory.attend(1, QUERIES, SCALE), best_of(QUERIES, *(x[:, :, -14:] for x in ALL[1]), 5), 1e-5)


@pytest.mark.parametrize("tier", ["device", "host", "disk"])
@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_k": 5, "lookup": "faiss"}, {"max_tokens": 13}])
def test_every_tier_gives_the_same(tier, options, tmp_path):
    mask = torch.rand(2, 19, generator=torch.Generator().manual_seed(4)) > 0.2
    memory = filled(*PIECES, mask=mask, tier=tier, folder=tmp_path, **options)
    same(memory.attend(3, QUERIES, SCALE), filled(*PIECES, mask=mask, **options).attend(3, QUERIES, SCALE), 0)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux to see what is mapped")
def test_disk_tier_is_mapped_from_files_that_vanish_with_it(tmp_path):
    def mapped():
        with open("/proc/self/maps") as f:
            return sum(str(tmp_path) in line for line in f)

    memory = filled(*PIECES, tier="disk", folder=tmp_path)
    assert mapped() == 2 * len(memory.segments)  # one file per layer of every page
    assert not list(tmp_path.iterdir())  # without a name: a killed process leaves nothing behind
    fork = memory.fork()
    del memory
    assert mapped() == 10
    del fork
    assert mapped() == 0


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    memory = filled(*PIECES, tier="disk", folder=tmp_path)
    before, calls = memory.attend(1, QUERIES, SCALE), []
    reserve = os.posix_fallocate

    def full(fd, at, n):
        calls.append(n)
        if len(calls) == 4:  # two pages of two layers each are asked for: the last file no longer fits
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(fd, at, n)

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        LcxError, match=r"disk tier \(No space left on device\); all 19 slots .* are kept"
    ) as e:
        memory.append(slots(9, seed=6))
    assert "\n" not in str(e.value) and len(calls) == 4
    assert len(memory) == 19 and not list(tmp_path.iterdir())
    same(memory.attend(1, QUERIES, SCALE), before, 0)
    monkeypatch.undo()
    memory.append(slots(9, seed=6))  # once there is room again, it goes on
    same(memory.attend(1, QUERIES, SCALE), plain(QUERIES, *joined([ALL, slots(9, seed=6)])[1]))


def test_a_really_full_disk_raises_and_does_not_crash(tmp_path):
    """A limit on file size stands in for a small disk: the kernel, not a stub, refuses to reserve the blocks."""
    code = (
        "import resource, signal, torch; from lcx.memory import Memory; from lcx.errors import LcxError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"m = Memory((0,), tier='disk', folder={str(tmp_path)!r}, page_tokens=4); x = torch.ones(1, 1, 4, 8)\n"
        "m.append({0: (x, x)}); resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))\n"
        "try: m.append({0: (x, x)})\n"
        "except LcxError as e: print(len(m), float(m.attend(0, x, 1.0)[0].sum()), e)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("4 32.0 no room for") and "File too large" in done.stdout


# Forks, rows, files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"top_k": 6}, {"top_k": 6, "lookup": "faiss"}, {"max_tokens": 20}])
def test_forks_share_what_is_stored_and_nothing_later(options):
    base = filled(*PIECES, **options)
    with Traffic() as traffic:
        forks = [base.fork(), base.fork()]
        forks.append(forks[0].fork())
    assert traffic.nbytes == 0
    futures = [slots(n, seed=20 + n) for n in (2, 7, 1, 13)]
    for _ in range(2):  # turn by turn, so that every fork tries to write where the others do
        for memory, future in zip([base, *forks], futures, strict=True):
            memory.append(future)
    for memory, future in zip([base, *forks], futures, strict=True):
        alone = filled(ALL, future, future, **options)
        tolerance = 1e-5 if "lookup" in options else 1e-12
        same(memory.attend(1, QUERIES, SCALE), alone.attend(1, QUERIES, SCALE), tolerance)


@pytest.mark.parametrize("options", [{}, {"top_k": 6}, {"top_k": 6, "lookup": "faiss"}])
def test_select_reorders_rows_as_beam_search_does(options):
    mask = torch.rand(2, 19, generator=torch.Generator().manual_seed(3)) > 0.3
    memory = filled(*PIECES, mask=mask, **options)
    beams = memory.select(torch.tensor([1, 1, 0])).select(torch.tensor([2, 0, 0]))
    rows, more = torch.tensor([0, 1, 1]), slots(6, rows=3, seed=30)
    q = normal(3, 4, 2, D, seed=31)
    kv = {i: tuple(x[rows] for x in pair) for i, pair in ALL.items()}
    alone = filled(kv, mask=mask[rows], **options)
    tolerance = 1e-5 if "lookup" in options else 1e-12
    same(beams.attend(1, q, SCALE), alone.attend(1, q, SCALE), tolerance)
    beams.append(more)
    alone.append(more)
    same(beams.attend(1, q, SCALE), alone.attend(1, q, SCALE), tolerance)
    assert len(memory) == 19 and memory.shape[0] == 2


def test_beam_search_that_stores_token_by_token_does_not_waste_a_page_per_token():
    memory = filled(slots(3), page_tokens=16)
    swap = torch.tensor([1, 0])
    for n in range(12):
        memory = memory.select(swap)
        memory.append(slots(1, seed=n))
    assert len(memory) == 15 and len(memory.segments) == 1


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"tier": "disk"}, {"page_tokens": 64, "top_k": 4}])
def test_save_and_load(dtype, options, tmp_path):
    mask = torch.rand(2, 19, generator=torch.Generator().manual_seed(3)) > 0.3
    memory = filled(*PIECES, mask=mask, dtype=dtype, max_tokens=17).select(torch.tensor([1, 0]))
    path = memory.save(tmp_path / "novel.safetensors", MODEL)
    assert [p.name for p in tmp_path.iterdir()] == ["novel.safetensors"]
    loaded = Memory.load(path, MODEL, **options)
    alike = filled(*PIECES, mask=mask, dtype=dtype, max_tokens=17, **options).select(torch.tensor([1, 0]))
    assert len(loaded) == 17 and loaded.max_tokens == 17 and loaded.dtype == memory.dtype
    for layer in (1, 3):
        same(loaded.attend(layer, QUERIES, SCALE), alike.attend(layer, QUERIES, SCALE))


def test_an_empty_memory_and_a_shared_row_survive_the_file(tmp_path):
    assert len(Memory.load(Memory((1, 3)).save(tmp_path / "empty", MODEL), MODEL)) == 0
    memory = filled(slots(9, rows=1), slots(5))
    loaded = Memory.load(memory.save(tmp_path / "shared", MODEL), MODEL)
    assert loaded.nbytes == memory.nbytes
    same(loaded.attend(1, QUERIES, SCALE), memory.attend(1, QUERIES, SCALE))


def test_a_memory_of_another_model_is_refused(tmp_path):
    path = filled(*PIECES).save(tmp_path / "m", MODEL)
    with pytest.raises(
        LcxError, match="another model .*hidden_size: 64 in the file, 96 here.*load that model"
    ) as e:
        Memory.load(path, {**MODEL, "hidden_size": 96})
    assert "weights" not in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(LcxError, match="no memory file"):
        Memory.load(tmp_path / "absent", MODEL)


def test_every_kind_of_damage_is_found(tmp_path):
    path = filled(*PIECES).save(tmp_path / "m", MODEL)
    good = path.read_bytes()
    flips = [good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in (3, len(good) // 2, len(good) - 1)]
    from safetensors.torch import save as serialise

    for bad in (*flips, good[:-100], b"", b"plain text", serialise({"weight": torch.ones(3)})):
        path.write_bytes(bad)
        with pytest.raises(CorruptFileError, match="m is damaged, or no memory saved by lcx"):
            Memory.load(path, MODEL)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = filled(*PIECES).save(tmp_path / "m", MODEL)
    before = path.read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(LcxError, match="cannot write the memory .*No space left"):
        filled(ALL, ALL).save(path, MODEL)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["m"]


# Lookup -------------------------------------------------------------------------------------------------------------


def best_of(q, k, v, count):
    """Softmax over the `count` slots of highest q.k, by sorting."""
    k, v = (
        x.double().repeat_interleave(q.shape[1] // x.shape[1], 1).expand(len(q), -1, -1, -1) for x in (k, v)
    )
    scores = torch.einsum("bhtd,bhsd->bhts", q.double(), k) * SCALE
    threshold = scores.sort(-1, descending=True).values[..., count - 1 : count]
    scores = scores.masked_fill(scores < threshold, -math.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


@pytest.mark.parametrize("k", [1, 2, 5, 18])
def test_exact_top_k_is_ranked_by_the_given_query(k):
    memory = filled(*PIECES, top_k=k)
    same(memory.attend(1, QUERIES, SCALE), best_of(QUERIES, *ALL[1], k))
    turned = -QUERIES  # another query, another ranking
    same(memory.attend(1, turned, SCALE), best_of(turned, *ALL[1], k))
    scores, found = lookup.top_k(memory, 1, QUERIES, SCALE, approximate=False)
    keys = ALL[1][0].repeat_interleave(2, 1)
    wanted = torch.einsum("bhtd,bhsd->bhts", QUERIES, keys).topk(k, -1).indices
    assert (found.sort(-1).values == wanted.sort(-1).values).all()


def test_top_k_of_all_slots_is_dense():
    for k in (19, 500):
        same(filled(*PIECES, top_k=k).attend(1, QUERIES, SCALE), plain(QUERIES, *ALL[1]))


def test_ties_are_cut_at_k():
    kv = slots(1)
    same(filled(*[kv] * 9, top_k=4).attend(1, QUERIES, SCALE), filled(*[kv] * 4).attend(1, QUERIES, SCALE))


def test_error_of_exact_top_k_falls_with_k():
    kv, q = slots(300, seed=40), 3 * normal(2, 4, 8, D, seed=41)
    measured = [
        lookup.lookup_error(filled(kv, top_k=k, page_tokens=64), 1, q, SCALE) for k in (1, 8, 64, 300)
    ]
    errors = [m["error"] for m in measured]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.1 and errors[-1] < 1e-12
    assert all(m["recall"] == 1 and m["error"] == m["exact_error"] for m in measured)


def test_faiss_finds_most_of_the_exact_top_k():
    """Keys of 64 topics and queries near them: the index looks into a part of the page and finds nearly all."""
    topics = normal(64, 16, seed=50, dtype=torch.float32)
    which = torch.randint(64, (2, 2, 5000), generator=torch.Generator().manual_seed(51))
    keys = topics[which] + 0.3 * normal(2, 2, 5000, 16, seed=52, dtype=torch.float32)
    kv = {i: (keys, normal(2, 2, 5000, 16, seed=53 + i, dtype=torch.float32)) for i in (1, 3)}
    q = topics[:10].expand(2, 4, 10, 16) + 0.3 * normal(2, 4, 10, 16, seed=60, dtype=torch.float32)
    memory = filled(kv, top_k=32, lookup="faiss", page_tokens=2048)
    measured = lookup.lookup_error(memory, 1, q, 1.0)
    index = memory.segments[0].page.indexes[1][0][0]
    assert (index.nlist, index.nprobe, index.ntotal) == (32, 6, 2048)
    assert not memory.segments[2].page.indexes  # the unfilled page
    assert 0.8 < measured["recall"] < 1  # it is approximate, and good
    assert abs(measured["error"] - measured["exact_error"]) < 0.05


def test_an_index_is_built_once_per_full_page_and_shared_by_forks(monkeypatch):
    built = []
    build = lookup.build
    monkeypatch.setattr(lookup, "build", lambda page, layer: built.append(layer) or build(page, layer))
    memory = filled(*PIECES, top_k=5, lookup="faiss")
    memory.attend(1, QUERIES, SCALE)
    assert len(built) == 4  # 19 slots: four full pages of 4, the fifth is searched exactly
    fork = memory.fork()
    fork.append(slots(2, seed=3))
    fork.attend(1, QUERIES, SCALE)
    assert len(built) == 5
    fork.attend(1, QUERIES, SCALE)
    memory.attend(1, QUERIES, SCALE)
    assert len(built) == 5


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ()}, "at least one layer"),
        ({"layers": (1, 1)}, "each once"),
        ({"tier": "gpu"}, "choose device, host, disk"),
        ({"lookup": "annoy"}, "choose exact or faiss"),
        ({"dtype": torch.int8}, "choose float32"),
        ({"top_k": 0}, "top_k=0: give at least 1"),
        ({"max_tokens": -1}, "max_tokens=-1: give at least 1"),
        ({"lookup": "faiss"}, "say how many"),
        ({"tier": "disk", "folder": "absent"}, "no folder absent"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(LcxError, match=message):
        Memory(**{"layers": (1, 3), **options})


def test_missing_faiss_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(LcxError, match="pip install faiss-cpu"):
        Memory((1,), lookup="faiss", top_k=4)


@pytest.mark.parametrize(
    ("kv", "mask", "message"),
    [
        (slots(3, layers=(1,)), None, r"layers \[1\] for a memory of \[1, 3\]"),
        ({**slots(3), 3: slots(4)[3]}, None, "layer 3: keys and values"),
        (slots(3, rows=3), None, "for a memory of 2 rows"),
        (slots(3, heads=1), None, "for a memory of 2 rows, 2 kv heads"),
        (slots(3), torch.ones(2, 4, dtype=torch.bool), r"give bool \[2, 3\]"),
        (slots(3), torch.ones(2, 3), r"give bool \[2, 3\]"),
    ],
)
def test_a_bad_append_stores_nothing(kv, mask, message):
    memory = filled(*PIECES)
    with pytest.raises(LcxError, match=message):
        memory.append(kv, mask)
    assert len(memory) == 19
    same(memory.attend(3, QUERIES, SCALE), plain(QUERIES, *ALL[3]))


def test_bad_queries_and_rows():
    memory = filled(*PIECES)
    for layer, q in ((2, QUERIES), (1, QUERIES[:, :3]), (1, QUERIES[:1]), (1, QUERIES[..., :4])):
        with pytest.raises(LcxError, match="layer 2 has no memory|queries .* for a memory of 2 rows"):
            memory.attend(layer, q, SCALE)
    with pytest.raises(LcxError, match="of a memory of 2 rows"):
        memory.select(torch.tensor([0, 2]))
    for unfit in (memory, Memory((1,), top_k=2)):
        with pytest.raises(LcxError, match="give the memory a top_k, and store something"):
            lookup.lookup_error(unfit, 1, QUERIES, SCALE)


@pytest.mark.parametrize(("rows", "heads"), [(3, 4), (3, 2), (1, 4), (1, 1)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_fused_kernel_equals_the_formula(rows, heads, causal, stored):
    g = torch.Generator().manual_seed(0)
    T, S = 7, 7 if causal else 19
    q = torch.randn(3, 4, T, 16, generator=g)
    k, v = (torch.randn(rows, heads, S, 16, generator=g).to(stored) for _ in range(2))
    visible = torch.ones(T, S, dtype=torch.bool).tril() if causal else torch.ones(T, S, dtype=torch.bool)
    wanted = attend(q, k, v, 0.3, visible)  # with a mask the formula is used
    got = attend(q, k, v, 0.3, causal=causal)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)


def test_fused_kernel_is_used_where_it_can_be():
    from lcx.softmax import flash

    q, k, v = (torch.randn(2, 4, 5, 8) for _ in range(3))
    assert flash(q, k, v, 1.0, False) is not None
    assert flash(q.requires_grad_(), k, v, 1.0, False) is None, "no gradient flows through its log-sum-exp"
    with torch.no_grad():
        assert flash(q, k, v, 1.0, False) is not None
    assert flash(q.double(), k.double(), v.double(), 1.0, False) is None
