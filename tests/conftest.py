import logging
import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# a loaded weight lies where its file's header ends, and on some CPUs MKL rounds otherwise there
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import pytest
import tiny
import torch
from marks import slow_except

from diffalign.core import interruption

logging.getLogger("transformers").setLevel(logging.ERROR)


@pytest.fixture(params=slow_except(["flux", "flux2", "sana", "sd3"], sorted(tiny.MODELS)))
def model(request):
    """A tiny random model of every family, float32."""
    torch.manual_seed(0)
    return tiny.MODELS[request.param]()


@pytest.fixture
def sd3():
    return tiny.sd3_model()


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A tiny SD3 pipeline in diffusers' layout."""
    folder = tmp_path_factory.mktemp("base")
    tiny.sd3_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path):
    """Three of them in a file."""
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\na dog\na bird\n")
    return file


@pytest.fixture
def signals(monkeypatch):
    """Signals with their usual handlers, which come back: a shell's background job ignores Ctrl-C."""
    monkeypatch.setattr(interruption, "SETTLING", 0)
    usual = {
        n: signal.default_int_handler if n == signal.SIGINT else signal.SIG_DFL
        for n in interruption.SIGNALS
    }
    before = {n: signal.signal(n, handler) for n, handler in usual.items()}
    yield
    assert {n: signal.getsignal(n) for n in usual} == usual
    for number, handler in before.items():
        signal.signal(number, handler)
