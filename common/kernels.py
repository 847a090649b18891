"""Triton kernels with a safety net: every kernel has a reference that defines what it computes.

`op` registers a kernel as a PyTorch operator: ``torch.compile`` sees through it (`triton_op`) or calls it as it
stands (`opaque`), fake tensors get their shapes from the reference, and a CPU runs the reference, so a model that uses
it works everywhere. `fuzz` holds any implementation against its reference in float64, over as many drawn shapes as
asked.
"""

import copy
import functools
import importlib.util
import os

import torch

_TRITON = importlib.util.find_spec("triton") is not None  # looked up once: a compiler cannot trace the search


def interpreting():
    """True when Triton runs its kernels on the CPU, in Python (``TRITON_INTERPRET=1``): slow, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def has_triton():
    """Whether Triton is installed: on Linux it comes with PyTorch, on Windows and macOS it does not."""
    return _TRITON


def op(name, reference, mutates=(), fake=None, opaque=False):
    """Decorate the launcher of a Triton kernel and make it an operator ``roadmap::name``.

    The launcher's arguments and result need type annotations, from which PyTorch reads the schema. Inside it, a
    kernel is launched through `launch`, so that the compiler can trace it.

    Args:
        name: unique within the roadmap.
        reference: plain PyTorch with the same signature; runs on devices without Triton, and says the shapes.
        mutates: names of the arguments that the kernel writes into.
        fake: gives empty tensors shaped like the result; by default the reference, which may do too much for that.
        opaque: the compiler calls the launcher instead of tracing it, for what it cannot trace: tensor descriptors made
            on the host, Gluon, choices by measuring.

    Returns:
        The operator; ``.reference`` holds `reference`.
    """

    def register(launcher):
        @functools.wraps(launcher)
        def implementation(*arguments):
            # decided in here, since a compiler traces this body whatever the device
            on_gpu = has_triton() and any(torch.is_tensor(argument) and argument.is_cuda for argument in arguments)
            return (launcher if on_gpu or interpreting() else reference)(*arguments)

        make = torch.library.custom_op if opaque else torch.library.triton_op
        operator = make(f"roadmap::{name}", implementation, mutates_args=mutates)
        operator.register_fake(fake or reference)
        operator.reference = reference
        return operator

    return register


def plain(x):
    """Whether an operator over this tensor would only run its reference, for no compiler.

    An operator's first call loads PyTorch's compiler, for seconds: who finds this true calls the reference itself.
    """
    return not (x.is_cuda or interpreting() or torch.compiler.is_compiling())


def launch(kernel):
    """Wrap a ``@triton.jit`` kernel for a launch inside an `op`: ``launch(kernel)[grid](...)``."""
    return kernel if interpreting() else torch.library.wrap_triton(kernel)


def relative_error(out, exact):
    """‖out − exact‖ / ‖exact‖ in float64; infinite where `out` is not finite or has another shape."""
    out, exact = out.detach().double().cpu(), exact.detach().double().cpu()
    if out.shape != exact.shape or not torch.isfinite(out).all():
        return float("inf")
    return float((out - exact).norm() / exact.norm().clamp_min(1e-30))


def fuzz(function, reference, draw, cases=20, seed=0, tolerance=1e-2):
    """Hold `function` against `reference` evaluated in float64, over drawn inputs.

    Args:
        function, reference: take the same arguments, return a tensor or a tuple of tensors.
        draw: ``draw(generator) -> arguments``; floating tensors among them are upcast for the reference. Each of the
            two gets copies, with the same strides, so that it may write into them.
        cases: how many draws.
        tolerance: largest allowed relative error.

    Returns:
        The worst relative error.

    Raises:
        AssertionError: a case is worse than `tolerance`; the message holds its number, seed and shapes.
    """
    worst = 0.0
    for case in range(cases):
        arguments = draw(torch.Generator().manual_seed(seed + case))
        wide = copy.deepcopy(arguments)  # `double` alone would hand over the tensor itself where it is float64 already
        exact = reference(*(a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in wide))
        out = function(*copy.deepcopy(arguments))
        pairs = zip(out, exact, strict=True) if isinstance(out, tuple) else [(out, exact)]
        error = max(relative_error(ours, theirs) for ours, theirs in pairs)
        shapes = [tuple(a.shape) for a in arguments if torch.is_tensor(a)]
        if not error <= tolerance:  # also when it is nan
            raise AssertionError(
                f"case {case} (seed {seed + case}, shapes {shapes}): relative error {error:.2e} > {tolerance:.0e}"
            )
        worst = max(worst, error)
    return worst
