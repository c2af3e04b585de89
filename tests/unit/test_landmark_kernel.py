"""The fused kernel against the definition. Without a GPU it runs in Triton's interpreter, which also needs no compiler."""

import importlib
import os
import subprocess
import sys

import pytest
import torch

import lcx
from lcx.kernels import landmark as kernel

triton = pytest.importorskip("triton", reason="Triton is not installed here (it comes for Linux only)")

CUDA = torch.cuda.is_available()
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True, scope="module")
def interpreter():
    """Decorate the kernels, and what of Triton's language is made of kernels, anew for the interpreter; undo it at the end.

    TRITON_INTERPRET=1 does the same, but only if set before anything (transformers, say) has imported Triton.
    """
    if CUDA:
        yield
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    def dot(self, a, b, *rest):
        """The interpreter keeps bfloat16 as its bits and would multiply those."""
        wide = [self.create_fp_ext(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)]
        return create_dot(self, *wide, *rest)

    create_dot = InterpreterBuilder.create_dot
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.knobs.runtime, "interpret", True)
        patch.setattr(InterpreterBuilder, "create_dot", dot)
        for name, value in list(vars(tl.standard).items()):
            if isinstance(value, triton.runtime.JITFunction):
                again = triton.jit(value.fn)
                patch.setattr(tl.standard, name, again)
                if getattr(tl, name, None) is value:
                    patch.setattr(tl, name, again)
        from lcx.kernels import landmark_triton

        importlib.reload(landmark_triton)
        yield
    importlib.reload(landmark_triton)


def inputs(K, Q, H=1, Hkv=1, D=16, dtype=F32, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((H, Q), (Hkv, K), (Hkv, K), (H, Q))
    made = [torch.randn(batch, h, n, D, generator=generator).to(dtype) for h, n in shapes]
    q, k, v, grad = (x.cuda() if CUDA else x for x in made)
    return *(x.requires_grad_() for x in (q, k, v)), grad


def definition(q, k, v, block_size, scale, grad):
    """out, lse and the gradients by grouped_softmax in float64."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    wide_k, wide_v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ wide_k.mT * scale
    out = lcx.grouped_softmax(scores, block_size) @ wide_v
    i = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device)[:, None]
    j = torch.arange(k.shape[2], device=q.device)
    landmark = j % block_size == block_size - 1
    in_main = torch.where(j // block_size == i // block_size, ~landmark & (j <= i), landmark & (j < i))
    lse = scores.masked_fill(~in_main, float("-inf")).logsumexp(-1)
    return out, lse, *torch.autograd.grad(out, (q, k, v), grad.double())


# block size, keys, queries, heads, key heads, head size
SHAPES = [
    pytest.param(16, 64, 64, 1, 1, 16, id="whole blocks"),
    pytest.param(64, 160, 160, 1, 1, 16, id="block of 64, last one incomplete"),
    pytest.param(51, 130, 28, 2, 1, 80, id="block of 51, head of 80, history of two blocks"),
    pytest.param(10, 57, 27, 4, 2, 16, id="block of 10, history, two query heads a key head"),
    pytest.param(16, 37, 5, 2, 2, 16, id="history that ends inside a block"),
    pytest.param(64, 20, 20, 1, 1, 16, id="one incomplete block"),
    pytest.param(2, 7, 7, 1, 1, 8, id="one token a block"),
]


@pytest.mark.parametrize(("block_size", "K", "Q", "H", "Hkv", "D"), SHAPES)
def test_forward_and_gradients_are_those_of_the_definition(block_size, K, Q, H, Hkv, D):
    q, k, v, grad = inputs(K, Q, H, Hkv, D)
    assert kernel.supports(q, k, v, block_size)
    out, lse = kernel.fused(q, k, v, block_size, scale=0.3)
    made = (out, lse, *torch.autograd.grad(out, (q, k, v), grad))
    for name, mine, true in zip(
        ("out", "lse", "dq", "dk", "dv"), made, definition(q, k, v, block_size, 0.3, grad), strict=True
    ):
        torch.testing.assert_close(
            mine.double(), true, atol=1e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
    assert made[4][:, :, block_size - 1 :: block_size].count_nonzero() == 0, (
        "a landmark's value is never read"
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(BF16, 2e-2), (F16, 3e-3)])
def test_16_bit(dtype, tolerance):
    q, k, v, grad = inputs(40, 24, 2, 1, 16, dtype)
    out, lse = kernel.fused(q, k, v, 16)
    made = (out, lse, *torch.autograd.grad(out, (q, k, v), grad))
    assert [x.dtype for x in made] == [dtype, F32, dtype, dtype, dtype]
    for mine, true in zip(made, definition(q, k, v, 16, 0.25, grad), strict=True):
        torch.testing.assert_close(mine.double(), true, atol=tolerance, rtol=tolerance)


def test_scores_far_apart_do_not_overflow():
    q, k, v, grad = inputs(48, 48)
    out, lse = kernel.fused(q, k, v, 16, scale=100.0)
    made = (out, lse, *torch.autograd.grad(out, (q, k, v), grad))
    for mine, true in zip(made, definition(q, k, v, 16, 100.0, grad), strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine.double(), true, atol=1e-2, rtol=1e-3)


def test_batch_heads_and_strides_of_a_model():
    """As a model gives them: views of [B, T, H, D], in a batch; and the gradient of a sum, which has strides of 0."""
    q, k, v, _ = inputs(20, 20, 4, 2, 16, batch=2)
    views = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    assert not views[0].is_contiguous()
    out, lse = kernel.fused(*views, 16)
    assert out.transpose(1, 2).is_contiguous() and not lse.requires_grad
    made = (out, lse, *torch.autograd.grad(out.sum(), views))
    for mine, true in zip(made, definition(q, k, v, 16, 0.25, torch.ones_like(q)), strict=True):
        torch.testing.assert_close(mine.double(), true, atol=1e-5, rtol=1e-5)


def test_what_the_kernel_leaves_to_the_pytorch_form(monkeypatch):
    q, k, v, _ = inputs(32, 32)
    assert kernel.supports(q, k, v, 16) and not kernel.supports(q, k, v, 129)
    assert not kernel.supports(q.double(), k.double(), v.double(), 16)
    assert not kernel.supports(q, k.half(), v, 16)
    mask = torch.ones(1, 32, dtype=torch.bool)
    assert not kernel.supports(q, k, v, 16, mask=mask)
    assert not kernel.supports(q, k, v, 16, documents=torch.zeros(1, 2, dtype=torch.int64))
    monkeypatch.setattr(kernel, "_available", lambda: False)
    assert not kernel.supports(q, k, v, 16)


def test_importing_the_kernels_does_not_import_triton():
    code = "import sys; import lcx.kernels.landmark; sys.exit('lcx.kernels.landmark_triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


COMPILE = """
import os, sys
os.environ.pop("TRITON_INTERPRET", None)
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import lcx.kernels.landmark_triton as kernels

constants = {"B": 64, "D": 64, "M": 64, "N": 64, "P": 64, "DOT": "ieee"}
for function in (kernels.forward, kernels.gradient_q, kernels.gradient_kv):
    kinds = {n: "*bf16" if n[0].isupper() else "fp32" if n == "scale" else "i32" for n in function.arg_names}
    kinds |= {n: "*fp32" for n in ("Lse", "Delta") if n in kinds} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=function, signature=kinds, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 2})
    print(function.__name__, made.metadata.shared, "wgmma" in made.asm["ptx"], len(made.asm["cubin"]))
"""


@pytest.mark.slow
def test_the_kernels_compile_for_a_gpu_that_is_not_there(tmp_path):
    """Triton's compiler needs no GPU: what would fail on an H100 at the first call fails here."""
    made = subprocess.run(
        [sys.executable, "-c", COMPILE],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert made.returncode == 0, made.stderr
    rows = [line.split() for line in made.stdout.splitlines()]
    assert [r[0] for r in rows] == ["forward", "gradient_q", "gradient_kv"]
    assert all(int(r[1]) < 99 * 1024 and r[2] == "True" and int(r[3]) > 10000 for r in rows), rows


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize(("dtype", "tolerance"), [(BF16, 2e-2), (F16, 3e-3), (F32, 1e-4)])
@pytest.mark.parametrize(("block_size", "D"), [(64, 64), (64, 128), (51, 80), (16, 96), (128, 64)])
def test_on_a_gpu_against_the_pytorch_form(block_size, D, dtype, tolerance):
    q, k, v, grad = inputs(2000, 1000, 8, 2, D, dtype, batch=2)
    assert kernel.supports(q, k, v, block_size)
    out, lse = lcx.landmark_attention(q, k, v, block_size, return_lse=True)
    assert type(out.grad_fn).__name__ == "_FusedBackward", "landmark_attention uses the kernel here"
    made = (out, lse, *torch.autograd.grad(out, (q, k, v), grad))
    again = kernel.fused(q, k, v, block_size)[0]
    again = torch.autograd.grad(again, (q, k, v), grad)
    assert all(torch.equal(a, b) for a, b in zip(made[2:], again, strict=True)), "the same from run to run"
    mask = torch.ones(
        2, 2000, dtype=torch.bool, device="cuda"
    )  # hides nothing, but is the PyTorch form's work
    true_q, true_k, true_v = (x.detach().float().requires_grad_() for x in (q, k, v))
    true, true_lse = lcx.landmark_attention(true_q, true_k, true_v, block_size, mask=mask, return_lse=True)
    true = (true, true_lse, *torch.autograd.grad(true, (true_q, true_k, true_v), grad.float()))
    for mine, expected in zip(made, true, strict=True):
        torch.testing.assert_close(mine.float(), expected, atol=tolerance, rtol=tolerance)
