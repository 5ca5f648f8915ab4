import logging
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# a loaded weight lies where its file's header ends, and on some CPUs MKL rounds otherwise there
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import pytest
import tiny
import torch

logging.getLogger("transformers").setLevel(logging.ERROR)


@pytest.fixture(params=sorted(tiny.MODELS))
def model(request):
    """A tiny random model of every family, float32."""
    torch.manual_seed(0)
    return tiny.MODELS[request.param]()


@pytest.fixture
def sd3():
    return tiny.sd3_model()
