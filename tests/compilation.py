"""torch.compile without a compiler."""

from contextlib import contextmanager

import torch
from torch._dynamo.testing import CompileCounterWithBackend

from diffalign.pipelines import compiled


@contextmanager
def counted(monkeypatch, backend):
    """Compilation by a backend that counts and runs the graph as it is: the C++ compiler is not what is tested."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    original = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **kw: original(self, backend=counter, **kw)
    )
    monkeypatch.setattr(compiled, "_why_not", lambda denoiser: None)
    with torch._dynamo.config.patch(recompile_limit=8):  # what compile_blocks raises is put back
        yield counter
    torch._dynamo.reset()
